"""How a worker judges a command that arrives, by the production code, and how it refuses one."""

from __future__ import annotations

from dataclasses import dataclass

from model_setting import REQUEST_ID, Guards

from duopool.core.config import HandoffConfig, SchedulerConfig
from duopool.core.messages import Heartbeat, Nack, NackReason
from duopool.engine.arrivals import Arrivals, Standing


def standing(guards: Guards, buried: int, attempt: int, present: int | None) -> Standing:
    """The production judgement on an arriving attempt."""
    return _arrivals(buried if guards.tombstones else 0).standing(REQUEST_ID, attempt, present=present)


def _arrivals(buried: int) -> Arrivals:
    arrivals = Arrivals(None, HandoffConfig(), SchedulerConfig())  # type: ignore[arg-type]
    if buried:
        arrivals.bury(REQUEST_ID, buried, now=0.0)
    return arrivals


def missing(buried: int, present: int | None, command: Heartbeat) -> tuple[int, ...]:
    """The production judgement on what a heartbeat names."""
    here = {} if present is None else {REQUEST_ID: Present(present)}
    return tuple(one.attempt for one in _arrivals(buried).missing(command.attempts, here, now=0.0))


@dataclass(frozen=True, slots=True)
class Present:
    """The request as it is on a worker."""

    attempt: int


def nack(attempt: int, reason: NackReason) -> Nack:
    return Nack(request_id=REQUEST_ID, attempt=attempt, reason=reason)
