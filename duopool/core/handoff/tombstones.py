"""Remembers the highest attempt seen of each request, so that late or doubled commands find nothing to do."""

from __future__ import annotations

from duopool.core.types import RequestId


class Tombstones:
    """Highest ended attempt per request, kept for `keep_s` seconds (twice the longest time to live)."""

    def __init__(self, *, keep_s: float) -> None:
        self._keep_s = keep_s
        self._ended: dict[RequestId, tuple[int, float]] = {}

    def bury(self, request_id: RequestId, attempt: int, *, now: float) -> None:
        """Attempts up to `attempt` of the request are over."""
        before, _ = self._ended.pop(request_id, (0, 0.0))
        self._ended[request_id] = (max(before, attempt), now)

    def covers(self, request_id: RequestId, attempt: int) -> bool:
        """True if the attempt is over: a command that names it is dropped."""
        ended, _ = self._ended.get(request_id, (0, 0.0))
        return attempt <= ended

    def sweep(self, *, now: float) -> None:
        """Forget what is older than `keep_s`; the oldest burial stands first."""
        while self._ended:
            request_id, (_, buried_at) = next(iter(self._ended.items()))
            if now - buried_at < self._keep_s:
                return
            del self._ended[request_id]

    def __len__(self) -> int:
        return len(self._ended)
