"""One router of a system: started, attached to, and started again whenever it ends, at the ports that it had.

Owns the process, the link to it and the record by which operators' commands find it. One thread calls everything.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from duopool.cluster.admin_access import RouterRecord, announce, withdraw
from duopool.cluster.launch import LOOPBACK
from duopool.cluster.membership import ClusterView
from duopool.cluster.router_link import RouterLink
from duopool.cluster.router_process import Listening, RouterFailed, RouterProcess
from duopool.core.config import RouterConfig
from duopool.proto import control_pb2
from duopool.proto.internal_access import InternalAccess

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
RETRY_S = 1.0
"""Pause before another try when a router that had served before does not come up again."""
_EVERY_HOST = ("0.0.0.0", "::", "")


class RouterPlace:
    """`launch` once, then `tick` until `stop`."""

    def __init__(
        self,
        config: RouterConfig,
        access: InternalAccess,
        *,
        on_command: Callable[[RouterPlace, control_pb2.ClusterCommand], None],
        system: str = "",
    ) -> None:
        """`on_command` runs on a thread of the link's and must return at once.

        `system` is the same for all routers of one system.
        """
        self._config = config
        self._system = system
        self._access = access
        self._on_command = on_command
        self._process = RouterProcess(config)
        self._link: RouterLink | None = None
        self._listening: Listening | None = None
        self._launched_at = 0.0
        self._retry_at: float | None = None

    @property
    def is_listening(self) -> bool:
        """True once it has listened, for good: its successors take the same ports."""
        return self._listening is not None

    @property
    def pid(self) -> int:
        """Process id of the router now; 0 while there is none."""
        return self._process.pid

    @property
    def port(self) -> int:
        """Port of the public gRPC service."""
        assert self._listening is not None
        return self._listening.port

    @property
    def address(self) -> str:
        """host:port at which clients on this machine reach the router."""
        return f"{_reachable(self._config.host)}:{self.port}"

    @property
    def http_url(self) -> str | None:
        """Where clients on this machine reach the HTTP face; None if there is none."""
        assert self._listening is not None
        scheme = "http" if self._config.tls is None else "https"
        host, port = _reachable(self._config.host), self._listening.http_port
        return f"{scheme}://{host}:{port}" if port else None

    def launch(self, now: float) -> None:
        """Start the process; returns at once."""
        self._launched_at, self._retry_at = now, None
        self._process.launch()

    def tick(self, view: ClusterView, now: float) -> None:
        """Attach once it listens, start it again once it has ended. Raises RouterFailed if it never listened."""
        if self._retry_at is not None:
            if now >= self._retry_at:
                self.launch(now)
            return
        if self._link is not None and self._process.has_ended:
            logger.warning("the router at port %d ended; starting it again", self.port)
            self._detach()
            self.launch(now)
        if self._link is None:
            self._attach(view, now)

    def publish(self, view: ClusterView) -> None:
        """Tell the router the membership."""
        if self._link is not None:
            self._link.publish(view)

    def answer(self, result: control_pb2.CommandResult) -> None:
        """Tell the router how its command ended."""
        if self._link is not None:
            self._link.answer(result)

    def stop(self) -> None:
        """End the router, first kindly. Safe to call twice."""
        self._detach()
        if self._listening is not None:
            withdraw(self.port)

    def _attach(self, view: ClusterView, now: float) -> None:
        try:
            listening = self._process.poll()
            if listening is None and now - self._launched_at > START_TIMEOUT_S:
                raise RouterFailed(f"the router did not listen within {START_TIMEOUT_S:.0f} s")
        except RouterFailed as error:
            self._process.stop()
            if not self.is_listening:
                raise
            logger.warning("%s", error)
            self._retry_at = now + RETRY_S
            return
        if listening is not None:
            self._listening = listening
            address = f"{_reachable(self._config.internal_host)}:{listening.internal_port}"
            record = RouterRecord(internal_address=address, internal=self._config.internal, system=self._system)
            announce(listening.port, record)
            self._link = RouterLink(
                address, view, access=self._access, on_command=lambda command: self._on_command(self, command)
            )

    def _detach(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None
        self._process.stop()


def _reachable(host: str) -> str:
    return LOOPBACK if host in _EVERY_HOST else host
