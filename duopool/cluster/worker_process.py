"""A worker in a Ray actor, behind calls that return at once.

The actor hosts one worker's process after another (`engine/nursed_process.py`): when only the worker has died, its
actor, with the model in memory, starts the next one. Owns the actor handle and the answers under way. It decides
nothing: timeouts, restarts and membership are the supervisor's. The supervisor's tests put a fake in its place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, Protocol

import psutil

from duopool.cluster.control_plane import is_alive
from duopool.core.config import WorkerConfig
from duopool.core.messages import WorkerInfo
from duopool.core.types import Role


class ProcessGone(Exception):
    """The worker's process ended, or its start failed; the text says why."""


class WorkerProcess(Protocol):
    """A started worker. No call but `check` waits; all but `kill` may raise ProcessGone."""

    def poll_start(self) -> WorkerInfo | None:
        """The worker's registration once it listens; None before."""
        ...

    def ping(self) -> None:
        """Ask whether it lives and is idle, unless a question is under way."""
        ...

    def poll_ping(self) -> bool | None:
        """Whether it is idle, once per answer; None if there is no new answer."""
        ...

    def drain(self) -> None:
        """Tell it to take nothing new."""
        ...

    def kill(self) -> None:
        """End it and its host now. Never raises."""
        ...

    @property
    def has_host(self) -> bool:
        """True if the worker has died and its host, as far as is known, has not: `start_again` may be called."""
        ...

    def start_again(self) -> None:
        """Have the host start another worker; what follows is as after the first start."""
        ...

    def check(self, *, timeout_s: float) -> None:
        """Wait until it has proved its invariants; raises AssertionError naming what is wrong."""
        ...


class RayWorkerProcess:
    """A worker in a Ray actor that is never restarted by Ray."""

    def __init__(self, config: WorkerConfig, *, options: Mapping[str, Any]) -> None:
        import ray

        self._ray = ray
        self._actor = actor_class(config.role).options(**options).remote(config)
        self._process: psutil.Process | None = None
        self._question: Any = None
        self._start: Any = self._actor.start.remote()

    def poll_start(self) -> WorkerInfo | None:
        info = self._answer(self._start)
        if info is None:
            return None
        assert isinstance(info, WorkerInfo)
        if info.node_id in ("", self._ray.get_runtime_context().get_node_id()):
            with contextlib.suppress(psutil.Error):
                self._process = psutil.Process(info.pid)
        return info

    def ping(self) -> None:
        if self._question is None:
            self._question = self._actor.is_idle.remote()

    def poll_ping(self) -> bool | None:
        if self.has_host:
            raise ProcessGone("the process ended")
        if self._question is None:
            return None
        answer = self._answer(self._question)
        if answer is None:
            return None
        self._question = None
        return bool(answer)

    def drain(self) -> None:
        self._actor.drain.remote()

    def kill(self) -> None:
        with contextlib.suppress(Exception):
            self._ray.kill(self._actor, no_restart=True)
        # Ray's own kill waits for a process that is stopped or hangs in native code. psutil compares the time of birth,
        # so that another process with the same number is safe.
        if self._process is not None:
            with contextlib.suppress(psutil.Error):
                self._process.kill()

    @property
    def has_host(self) -> bool:
        return self._process is not None and not is_alive(self._process)

    def start_again(self) -> None:
        self._process = self._question = None
        self._start = self._actor.start.remote()

    def check(self, *, timeout_s: float) -> None:
        try:
            self._ray.get(self._actor.check.remote(), timeout=timeout_s)
        except self._ray.exceptions.RayTaskError as error:
            raise AssertionError(str(error)) from error
        except self._ray.exceptions.RayError as error:
            raise ProcessGone(str(error)) from error

    def _answer(self, reference: Any) -> Any:
        """Result of a call, or None while it is under way."""
        ready, _ = self._ray.wait([reference], timeout=0)
        if not ready:
            return None
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            cause = getattr(error, "cause", None) or error
            raise ProcessGone(f"{type(cause).__name__}: {cause}") from error
        except self._ray.exceptions.RayError as error:
            raise ProcessGone(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error


def actor_class(role: Role) -> Any:
    """The Ray actor class of a role."""
    if role is Role.PREFILL:
        from duopool.prefill_worker.actor import PrefillActor

        return PrefillActor
    from duopool.decode_worker.actor import DecodeActor

    return DecodeActor
