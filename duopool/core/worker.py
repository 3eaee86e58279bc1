"""What every worker looks like from outside: the same face for gRPC, for the step loop and for a simulation.

Commands come in with the session they came from; what the worker has to say is collected in an outbox, addressed to a
session (one router) or to all of them. A worker never blocks and never does I/O itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType, Protocol

from duopool.core.messages import Command, Event, WorkerLoad

SessionId = NewType("SessionId", int)
"""One connection of one router; a router that reconnects gets a new one."""


@dataclass(frozen=True, slots=True)
class Addressed:
    """An event and whom it is for; None means every session."""

    session: SessionId | None
    event: Event


class Worker(Protocol):
    """All methods may be called from any thread; only `step` takes longer than a moment."""

    def open_session(self, session: SessionId, *, now: float) -> None:
        """A router connected: it gets a KvSnapshot and a WorkerLoad first."""
        ...

    def close_session(self, session: SessionId, *, now: float) -> None:
        """A router is gone: its requests end after the orphan time to live unless they finish before."""
        ...

    def handle(self, command: Command, session: SessionId, *, now: float) -> None:
        """Take in one command. Bad or late commands are answered with Nack or dropped; they never raise."""
        ...

    def step(self, *, now: float) -> bool:
        """Schedule, run and commit one step; False if there was nothing to run. Called from one thread only."""
        ...

    @property
    def rest_s(self) -> float:
        """How long the worker would leave the cores to others before its next step, in seconds."""
        ...

    def tick(self, *, now: float) -> None:
        """Let timers act: leases, orphans, deadlines, tombstones. Called every few hundred milliseconds."""
        ...

    def take_events(self) -> tuple[Addressed, ...]:
        """Empty the outbox."""
        ...

    def load(self) -> WorkerLoad:
        """How busy the worker is now."""
        ...

    @property
    def is_idle(self) -> bool:
        """True if no request, lease or read is alive: the worker may end without anyone noticing."""
        ...

    def check(self) -> None:
        """Prove the worker's invariants; raise AssertionError naming what is wrong."""
        ...
