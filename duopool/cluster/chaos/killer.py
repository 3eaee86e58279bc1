"""Kills workers at failpoints and waits until their successors serve.

Owns the choice of the victim and the record of each kill; sees the system through its Admin service only.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random

import psutil

from duopool.cluster.admin_access import admin_stub
from duopool.cluster.control_plane import is_alive
from duopool.core.errors import DuopoolError
from duopool.core.types import Role
from duopool.engine.failpoints import FAILPOINTS, Failpoint, arm
from duopool.proto import inference_pb2 as pb

ANYWHERE = "anywhere"
"""Not a failpoint: `kill -9` from outside, wherever the worker is."""
MOST_PASSES = 3
POLL_S = 0.02
ARM_TIMEOUT_S = 20.0
"""A failpoint that is not reached for this long is disarmed, and the worker killed from outside."""
READY_TIMEOUT_S = 120.0


class NotBack(DuopoolError):
    """A killed worker's place was not filled again in time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """One worker's death and its successor's birth."""

    worker_id: str
    role: Role
    place: str
    """The failpoint, or `anywhere`."""
    killed_at: float
    back_after_s: float
    """From the death until the successor took requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Freeze:
    """A worker that was stopped and went on as if nothing had been."""

    worker_id: str
    noticed_after_s: float
    """From the stop until the router had given it up."""
    back_after_s: float
    """From its going on until it took requests again."""


class Killer:
    """Kills one worker at a time; which and where is drawn from `random`."""

    def __init__(self, address: str, folder: Path, random: Random) -> None:
        self._calls = ExitStack()
        self._admin = self._calls.enter_context(admin_stub(address))
        self._folder = folder
        self._random = random
        self._next: dict[Role, list[str]] = {role: [] for role in Role}

    def close(self) -> None:
        self._calls.close()

    def kill(self, role: Role) -> Kill:
        """Kill a ready worker of this pool at the next place and wait for its successor. Raises NotBack."""
        victim = self._random.choice([worker for worker in self._workers() if worker.role == role])
        place = self._place(role)
        if place == ANYWHERE or not self._dies_by_itself(victim, Failpoint(place)):
            place = ANYWHERE
            time.sleep(self._random.uniform(0, 0.2))
            os.kill(victim.pid, signal.SIGKILL)
        killed_at = time.monotonic()
        self._wait_for(
            lambda worker: worker.worker_id == victim.worker_id and worker.pid != victim.pid,
            victim.worker_id,
            since=killed_at,
        )
        return Kill(
            worker_id=victim.worker_id,
            role=role,
            place=place,
            killed_at=killed_at,
            back_after_s=time.monotonic() - killed_at,
        )

    def freeze(self, role: Role, seconds: float) -> Freeze:
        """Stop a ready worker of this pool (SIGSTOP), let it go on later, and wait until it serves again."""
        victim = self._random.choice([worker for worker in self._workers() if worker.role == role])
        os.kill(victim.pid, signal.SIGSTOP)
        stopped_at = time.monotonic()
        try:
            while any(worker.pid == victim.pid for worker in self._workers()):
                if time.monotonic() - stopped_at > seconds:
                    raise NotBack(f"{victim.worker_id} was stopped for {seconds:.0f} s and nobody noticed")
                time.sleep(POLL_S)
            noticed_at = time.monotonic()
            time.sleep(max(0.0, stopped_at + seconds - noticed_at))
        finally:
            os.kill(victim.pid, signal.SIGCONT)
        resumed_at = time.monotonic()
        self._wait_for(lambda worker: worker.pid == victim.pid, victim.worker_id, since=resumed_at)
        return Freeze(
            worker_id=victim.worker_id,
            noticed_after_s=noticed_at - stopped_at,
            back_after_s=time.monotonic() - resumed_at,
        )

    def _place(self, role: Role) -> str:
        """Every place once, in a random order, before any comes again."""
        if not self._next[role]:
            self._next[role] = [*FAILPOINTS[role], ANYWHERE]
            self._random.shuffle(self._next[role])
        return self._next[role].pop()

    def _dies_by_itself(self, victim: pb.WorkerState, failpoint: Failpoint) -> bool:
        file = arm(self._folder, victim.worker_id, failpoint, passes=self._random.randint(0, MOST_PASSES))
        deadline = time.monotonic() + ARM_TIMEOUT_S
        while _lives(victim.pid):
            if time.monotonic() > deadline:
                file.unlink(missing_ok=True)
                return not _lives(victim.pid)
            time.sleep(POLL_S / 10)
        return True

    def _wait_for(self, is_back: Callable[[pb.WorkerState], bool], name: str, *, since: float) -> None:
        while not any(map(is_back, self._workers())):
            if time.monotonic() - since > READY_TIMEOUT_S:
                raise NotBack(f"{name} is not back after {READY_TIMEOUT_S:.0f} s")
            time.sleep(POLL_S)

    def _workers(self) -> Sequence[pb.WorkerState]:
        state = self._admin.ClusterState(pb.ClusterStateRequest(), timeout=10, wait_for_ready=True)
        return [worker for worker in state.workers if worker.state == "ready"]


def _lives(pid: int) -> bool:
    try:
        return is_alive(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return False
