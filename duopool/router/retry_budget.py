"""How many further attempts a router starts: a share of its traffic and a trickle, with room for one worker's death.

Owns the balance. A fleet that answers nothing but refusals is asked little more often than its clients ask; what the
budget does not allow is not failed but waits.
"""

from __future__ import annotations

from duopool.core.config import HandoffConfig


class RetryBudget:
    """A bucket of retries: it starts full, every request adds a part of one, and so does time."""

    def __init__(self, config: HandoffConfig) -> None:
        self._share = config.retry_share
        self._per_s = config.retries_per_s
        self._most = float(config.retry_burst)
        self._balance = self._most
        self._filled_at: float | None = None

    def earn(self) -> None:
        """A request was admitted."""
        self._balance = min(self._most, self._balance + self._share)

    def spend(self, *, now: float) -> bool:
        """Take one retry; False, and nothing taken, if there is none."""
        self._fill(now)
        if self._balance < 1:
            return False
        self._balance -= 1
        return True

    def next_at(self, *, now: float) -> float:
        """When time alone will have brought the next retry."""
        self._fill(now)
        return now + max(0.0, 1 - self._balance) / self._per_s

    def _fill(self, now: float) -> None:
        if self._filled_at is not None:
            self._balance = min(self._most, self._balance + (now - self._filled_at) * self._per_s)
        self._filled_at = now
