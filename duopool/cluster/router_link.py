"""The supervisor's stream to a router: the membership goes out, operators' commands come in.

Owns one gRPC stream and the threads around it. Every update carries the whole membership, so a stream that broke is
simply opened again.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator

import grpc
import msgspec

from duopool.cluster.membership import ClusterView
from duopool.proto import control_pb2, control_pb2_grpc
from duopool.proto.internal_access import InternalAccess

logger = logging.getLogger(__name__)

_encoder = msgspec.msgpack.Encoder()


class RouterLink:
    """Stays attached to the router at `address` (host:port) until closed.

    `on_command` runs on a thread of the link's and must return at once.
    """

    def __init__(
        self,
        address: str,
        view: ClusterView,
        *,
        access: InternalAccess,
        on_command: Callable[[control_pb2.ClusterCommand], None],
    ) -> None:
        self._on_command = on_command
        self._outgoing: queue.SimpleQueue[control_pb2.ClusterUpdate | None] = queue.SimpleQueue()
        self._latest = view
        self._is_closed = threading.Event()
        self._channel = access.channel(address)
        self._stub = access.stub(control_pb2_grpc.ControlStub, self._channel)
        self._thread = threading.Thread(target=self._run, name="router-link", daemon=True)
        self._thread.start()

    def publish(self, view: ClusterView) -> None:
        """Tell the router the membership."""
        self._latest = view
        self._outgoing.put(_update(view))

    def answer(self, result: control_pb2.CommandResult) -> None:
        """Tell the router how a command ended."""
        update = _update(self._latest)
        update.results.append(result)
        self._outgoing.put(update)

    def close(self) -> None:
        """Hang up."""
        self._is_closed.set()
        self._outgoing.put(None)
        self._channel.close()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        pause_s = 0.05
        while not self._is_closed.is_set():
            outgoing: queue.SimpleQueue[control_pb2.ClusterUpdate | None] = queue.SimpleQueue()
            self._outgoing = outgoing
            outgoing.put(_update(self._latest))
            try:
                for command in self._stub.Attach(_until_none(outgoing), wait_for_ready=True):
                    pause_s = 0.05
                    self._on_command(command)
            except (grpc.RpcError, ValueError) as error:
                # A closed channel raises ValueError.
                if not self._is_closed.is_set():
                    logger.info("the router's control stream broke: %s", error)
            outgoing.put(None)
            self._is_closed.wait(pause_s)
            pause_s = min(1.0, pause_s * 2)


def _until_none(
    outgoing: queue.SimpleQueue[control_pb2.ClusterUpdate | None],
) -> Iterator[control_pb2.ClusterUpdate]:
    while (update := outgoing.get()) is not None:
        yield update


def _update(view: ClusterView) -> control_pb2.ClusterUpdate:
    return control_pb2.ClusterUpdate(
        members=[control_pb2.MemberUpdate(info=_encoder.encode(info)) for info in view.members],
        wanted={role.value: size for role, size in view.wanted.items()},
    )
