"""Worker processes without processes: a test says when they start, answer and die."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from duopool.cluster.worker_process import ProcessGone
from duopool.core.messages import WorkerInfo
from duopool.core.types import Incarnation, Role, WorkerId


def info_of(worker_id: WorkerId, role: Role, incarnation: int, **changes: object) -> WorkerInfo:
    fields: dict[str, object] = {
        "model": "m",
        "model_digest": "digest",
        "layout_digest": "layout",
        "block_size": 16,
        "num_blocks": 64,
        "max_model_len": 512,
        "vocab_size": 100,
    }
    return WorkerInfo(
        worker_id=worker_id,
        role=role.value,
        incarnation=Incarnation(incarnation),
        address="127.0.0.1:1",
        **(fields | changes),  # type: ignore[arg-type]
    )


@dataclass
class FakeProcess:
    info: WorkerInfo
    is_started: bool = False
    is_idle: bool = True
    is_silent: bool = False
    is_dead: bool = False
    was_killed: bool = False
    is_draining: bool = False
    has_question: bool = False
    has_host: bool = False
    num_starts: int = 1

    def start_again(self) -> None:
        self.is_started, self.is_dead, self.has_host = False, False, False
        self.num_starts += 1
        self.info = msgspec.structs.replace(self.info, incarnation=Incarnation(1000 * self.num_starts))

    def _must_live(self) -> None:
        if self.is_dead or self.was_killed:
            raise ProcessGone("killed by the test")

    def poll_start(self) -> WorkerInfo | None:
        self._must_live()
        return self.info if self.is_started else None

    def ping(self) -> None:
        self.has_question = True

    def poll_ping(self) -> bool | None:
        self._must_live()
        if not self.has_question or self.is_silent:
            return None
        self.has_question = False
        return self.is_idle

    def drain(self) -> None:
        self._must_live()
        self.is_draining = True

    def kill(self) -> None:
        self.was_killed = True

    def check(self, *, timeout_s: float) -> None:
        self._must_live()


@dataclass
class FakeSpawner:
    """Keeps every process ever started, in order."""

    processes: list[FakeProcess] = field(default_factory=list)
    changes: dict[str, object] = field(default_factory=dict)
    """Fields in which processes to come differ from the others."""

    def __call__(self, worker_id: WorkerId, role: Role) -> FakeProcess:
        process = FakeProcess(info_of(worker_id, role, len(self.processes) + 1, **self.changes))
        self.processes.append(process)
        return process

    def newest(self, worker_id: str) -> FakeProcess:
        return next(p for p in reversed(self.processes) if p.info.worker_id == worker_id)

    @property
    def alive(self) -> list[FakeProcess]:
        return [p for p in self.processes if not (p.is_dead or p.was_killed)]
