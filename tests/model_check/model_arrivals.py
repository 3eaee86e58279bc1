"""How a worker judges a command that arrives, by the production code, and how it refuses one."""

from __future__ import annotations

from model_setting import REQUEST_ID, Guards

from duopool.core.config import HandoffConfig, SchedulerConfig
from duopool.core.messages import Nack, NackReason
from duopool.engine.arrivals import Arrivals, Standing


def standing(guards: Guards, buried: int, attempt: int, present: int | None) -> Standing:
    """The production judgement on an arriving attempt."""
    arrivals = Arrivals(None, HandoffConfig(), SchedulerConfig())  # type: ignore[arg-type]
    if buried and guards.tombstones:
        arrivals.bury(REQUEST_ID, buried, now=0.0)
    return arrivals.standing(REQUEST_ID, attempt, present=present)


def nack(attempt: int, reason: NackReason) -> Nack:
    return Nack(request_id=REQUEST_ID, attempt=attempt, reason=reason)
