"""Accepted requests that do not decode yet: how much work they are, and how long a newcomer would wait behind them.

Work is measured in prompt tokens, bounded, and timed as it leaves: a request that would wait too long, or too long for
its deadline, is refused at once, and so what was accepted is finished. Knows no request; each holds its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from duopool.core.errors import Overloaded

MEMORY_S = 5.0
"""How fast measurements of the past fade."""
LEAST_MEASURED_S = 0.5
"""Time under work before a rate means anything."""
LEAST_RETRY_S = 0.5
USED_SHARE = 0.8
"""Of the time that a request has; the rest is for what the estimate does not see."""


class WaitingRoom:
    """One router's; all on its event loop."""

    def __init__(self, *, max_num_tokens: int, max_wait_s: float, clock: Callable[[], float]) -> None:
        self.num_tokens = 0
        self._max_num_tokens = max_num_tokens
        self._max_wait_s = max_wait_s
        self._clock = clock
        self._drained_tokens = 0.0
        self._drained_in_s = 0.0
        self._last_drain_at = 0.0
        self._service_s = 0.0
        """From leaving the room to the end, of requests that finished; the newest count most."""

    @contextmanager
    def enter(self, num_tokens: Sequence[int], *, time_left_s: float | None) -> Iterator[list[Place]]:
        """A place for each of a call's requests, left at the latest when the block is; Overloaded if there is none."""
        self.check(sum(num_tokens), time_left_s=time_left_s)
        places = [Place(self, number) for number in num_tokens]
        try:
            yield places
        finally:
            for place in places:
                place.leave()

    def check(self, num_tokens: int = 0, *, time_left_s: float | None) -> None:
        """Overloaded if so many more tokens find no room, or would wait too long. An empty room takes anything."""
        if self.num_tokens == 0:
            return
        num_then = self.num_tokens + num_tokens
        wait_s = self.wait_s(num_then)
        if num_then > self._max_num_tokens:
            full = f"prompts of {self.num_tokens} tokens wait already, the limit is {self._max_num_tokens}"
            raise Overloaded(full, retry_after_s=max(LEAST_RETRY_S, self.wait_s(num_then - self._max_num_tokens)))
        limit_s = self._max_wait_s
        if time_left_s is not None:
            limit_s = min(limit_s, USED_SHARE * time_left_s - self._service_s)
        if wait_s > max(0.0, limit_s):
            raise Overloaded(
                f"the wait is {wait_s:.1f} s, {max(0.0, limit_s):.1f} s are left for it",
                retry_after_s=max(LEAST_RETRY_S, wait_s - limit_s),
            )

    def wait_s(self, num_tokens: int) -> float:
        """How long so much work takes to leave at the present rate; 0 as long as no rate is known."""
        idle_s = self._clock() - self._last_drain_at if self.num_tokens else 0.0
        if self._drained_in_s < LEAST_MEASURED_S or not self._drained_tokens:
            return 0.0
        return num_tokens * (self._drained_in_s + idle_s) / self._drained_tokens

    def _arrive(self, num_tokens: int) -> None:
        if self.num_tokens == 0:
            self._last_drain_at = self._clock()
        self.num_tokens += num_tokens

    def _leave(self, num_tokens: int, *, is_served: bool) -> None:
        if is_served:
            now = self._clock()
            passed_s = now - self._last_drain_at
            kept = max(0.0, 1.0 - passed_s / MEMORY_S)
            self._last_drain_at = now
            self._drained_tokens = self._drained_tokens * kept + num_tokens
            self._drained_in_s = self._drained_in_s * kept + passed_s
        self.num_tokens -= num_tokens

    def _finished(self, service_s: float) -> None:
        kept = 0.9 if self._service_s else 0.0
        self._service_s = self._service_s * kept + service_s * (1.0 - kept)


class Place:
    """One request's."""

    def __init__(self, room: WaitingRoom, num_tokens: int) -> None:
        self._room = room
        self._num_tokens = num_tokens
        self._left_at: float | None = None
        room._arrive(num_tokens)

    def decodes(self) -> None:
        """The request is in a batch. May be said again and again."""
        if self._left_at is None:
            self._left_at = self._room._clock()
            self._room._leave(self._num_tokens, is_served=True)

    def finish(self) -> None:
        """The request has all its tokens."""
        self.decodes()
        assert self._left_at is not None
        self._room._finished(self._room._clock() - self._left_at)

    def leave(self) -> None:
        """The request is over, however it ended; nothing happens if it is not here any more."""
        if self._left_at is None:
            self._left_at = self._room._clock()
            self._room._leave(self._num_tokens, is_served=False)
