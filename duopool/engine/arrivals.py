"""Judges the commands that bring a request to a worker: new, said twice, late, or not to be taken.

Owns the memory of attempts that are over and whether the worker still takes anything. The requests themselves, and the
answers, are the worker's. Not thread-safe; the worker's lock covers it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum, auto
from typing import Protocol

from duopool.core.config import HandoffConfig, SchedulerConfig
from duopool.core.handoff.tombstones import Tombstones
from duopool.core.messages import AttemptRef, GenerationRequest, NackReason
from duopool.core.types import RequestId
from duopool.engine.served_model import Refusal, ServedModel

PATIENCE_S = 30.0
NOT_HERE = "the worker does not have it"


def due_at(deadline_s: float | None, *, now: float) -> float:
    """When a request that arrives wants its turn: its deadline, or a while from now if it has none or a late one.

    Queues are ordered by this, so nobody is overtaken by what comes more than PATIENCE_S later.
    """
    return now + (PATIENCE_S if deadline_s is None else min(deadline_s, PATIENCE_S))


class _Attempt(Protocol):
    attempt: int


class Standing(Enum):
    """An arriving attempt among the attempts of its request that the worker has seen."""

    NEW = auto()
    """Newer than all others; one that is still here makes way for it."""
    AGAIN = auto()
    """The attempt that is here: the command came twice, or its answer was lost."""
    OVER = auto()
    """It has ended here; nothing is to be said about it any more."""
    STALE = auto()
    """A newer attempt was seen."""


class Arrivals:
    """The door of one worker."""

    def __init__(self, model: ServedModel, timers: HandoffConfig, scheduler: SchedulerConfig) -> None:
        self._model = model
        self._limits = scheduler
        self._tombstones = Tombstones(keep_s=2 * max(timers.lease_ttl_s, timers.orphan_ttl_s))
        self._is_draining = False

    def drain(self) -> None:
        """Take nothing new from now on."""
        self._is_draining = True

    def standing(self, request_id: RequestId, attempt: int, *, present: int | None) -> Standing:
        """Where `attempt` stands; `present` is the attempt of the request that is alive here."""
        if present == attempt:
            return Standing.AGAIN
        if (present is not None and present > attempt) or self.is_over(request_id, attempt + 1):
            return Standing.STALE
        return Standing.OVER if self.is_over(request_id, attempt) else Standing.NEW

    def refusal(
        self,
        request: GenerationRequest,
        *,
        num_tokens_in_pool: int,
        num_tokens_ahead: int,
        num_waiting: int,
        num_pending_tokens: int,
    ) -> Refusal | None:
        """Why a new request is not taken; None if it is. `num_waiting` requests wait before it.

        `num_pending_tokens` are still to be prefilled, of all requests that are here.
        """
        never = self._model.refusal(request, num_tokens_in_pool=num_tokens_in_pool, num_tokens_ahead=num_tokens_ahead)
        if never is not None:
            return never
        if self._is_draining:
            return Refusal(NackReason.DRAINING, "the worker is draining")
        if num_waiting >= self._limits.max_num_waiting:
            return Refusal(NackReason.BUSY, f"{num_waiting} requests are waiting")
        if num_pending_tokens >= self._limits.max_num_waiting_tokens:
            return Refusal(NackReason.BUSY, f"{num_pending_tokens} tokens are still to be prefilled")
        return None

    def is_over(self, request_id: RequestId, attempt: int) -> bool:
        """Whether this attempt, or a newer one, has ended here."""
        return self._tombstones.covers(request_id, attempt)

    def bury(self, request_id: RequestId, attempt: int, *, now: float) -> None:
        """Attempts up to `attempt` are over, whether they were here or not."""
        self._tombstones.bury(request_id, attempt, now=now)

    def missing(
        self, named: Sequence[AttemptRef], present: Mapping[RequestId, _Attempt], *, now: float
    ) -> list[AttemptRef]:
        """What a router takes for present and is not: it went astray or is over, and must not come later."""
        missing = [
            one for one in named if (found := present.get(one.request_id)) is None or found.attempt < one.attempt
        ]
        for one in missing:
            self.bury(one.request_id, one.attempt, now=now)
        return missing

    def sweep(self, *, now: float) -> None:
        """Forget attempts that ended long ago."""
        self._tombstones.sweep(now=now)
