"""Accepted requests that have not ended: how long a newcomer would wait behind them, and then decode beside them.

Waiting is measured in prompt tokens, bounded, and timed as they leave; a newcomer waits for those of its own priority
and of earlier ones. Decoding is measured by the pace at which every request gets its tokens now, which is taken to slow
down as much as the batch grows. Where it does not, the measured pace soon says so, and the batch may grow again: a slow
start. An output is taken to be as long as those whose `max_tokens` was of about the same size. A request that would
wait too long, or end past its deadline, is refused at once, and so what was accepted is finished, unless too many of an
earlier priority come behind it.

Knows no request; each holds its place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from duopool.core.errors import Overloaded

MEMORY_S = 4.0
"""How fast measurements of the past fade."""
LEAST_MEASURED_S = 0.1
"""Time under work before a rate means anything."""
LEAST_RETRY_S = 0.5
FIRST_GUESS = 128
"""Tokens of an output, before any of about the same `max_tokens` has ended."""
SMALL_BATCH = 8
"""Up to this many, a step is taken to cost the same."""
USED_SHARE = 0.65
"""Of the time that a request has. When a load sets in, everything takes up to 1.35 times what the rates of before say
(docs/reliability.md): the stages did not take each other's processor time then."""


class WaitingRoom:
    """One router's; all on its event loop."""

    def __init__(self, *, max_num_tokens: int, max_wait_s: float, clock: Callable[[], float]) -> None:
        self.num_tokens = 0
        """Of prompts that wait."""
        self.num_waiting = 0
        self.num_decoding = 0
        self._by_priority: Counter[int] = Counter()
        """Prompt tokens that wait."""
        self._max_num_tokens = max_num_tokens
        self._max_wait_s = max_wait_s
        self._clock = clock
        self._waits = _Rate()
        """Seconds in which anybody waited, per prompt token that left."""
        self._pace = _Rate()
        """Seconds in which a request decoded, per token that it got."""
        self._output_lengths: dict[int, float] = {}
        """Mean tokens of outputs that finished, the newest count most, by the number of bits of their `max_tokens`."""
        self._noted_at = clock()

    @contextmanager
    def enter(
        self, num_tokens: Sequence[int], *, max_tokens: int, time_left_s: float | None, priority: int = 0
    ) -> Iterator[list[Place]]:
        """A place for each of a call's requests, left at the latest when the block is; Overloaded if there is none."""
        self.check(sum(num_tokens), max_tokens=max_tokens, time_left_s=time_left_s, priority=priority)
        places = [Place(self, number, max_tokens, priority) for number in num_tokens]
        try:
            yield places
        finally:
            for place in places:
                place.leave()

    def check(self, num_tokens: int = 0, *, max_tokens: int, time_left_s: float | None, priority: int = 0) -> None:
        """Overloaded if so many more prompt tokens find no room, or would wait, or end, too late.

        Where nobody is, anything finds room.
        """
        if not self.num_tokens and not self.num_decoding:
            return
        num_then = self.num_tokens + num_tokens
        if self.num_tokens and num_then > self._max_num_tokens:
            full = f"prompts of {self.num_tokens} tokens wait already, the limit is {self._max_num_tokens}"
            raise Overloaded(full, retry_after_s=max(LEAST_RETRY_S, self.wait_s(num_then - self._max_num_tokens)))
        num_ahead = sum(count for other, count in self._by_priority.items() if other <= priority)
        wait_s, limit_s = self.wait_s(num_ahead + num_tokens), self._max_wait_s
        if time_left_s is not None:
            limit_s = min(limit_s, max(0.0, USED_SHARE * time_left_s - self.decoding_s(max_tokens)))
        if wait_s > limit_s:
            raise Overloaded(
                f"the wait is {wait_s:.1f} s, {limit_s:.1f} s are left for it",
                retry_after_s=max(LEAST_RETRY_S, wait_s - limit_s),
            )

    def wait_s(self, num_tokens: int) -> float:
        """How long so many prompt tokens take to leave at the present rate; 0 as long as no rate is known."""
        self._note()
        return num_tokens * self._waits.seconds_each

    def decoding_s(self, max_tokens: int) -> float:
        """How long a newcomer will decode, beside all that are here; 0 as long as no pace is known."""
        self._note()
        growth = (self.num_decoding + self.num_waiting + 1) / max(SMALL_BATCH, self._pace.mean_load)
        num_tokens = min(max_tokens, self._output_lengths.get(max_tokens.bit_length(), FIRST_GUESS))
        return num_tokens * self._pace.seconds_each * max(1.0, growth)

    def _note(self) -> None:
        """Let the time since the last call count."""
        passed_s, self._noted_at = self._clock() - self._noted_at, self._clock()
        if self.num_tokens:
            self._waits.pass_time(passed_s, passed_s)
        if self.num_decoding:
            self._pace.pass_time(passed_s, self.num_decoding * passed_s)

    def _arrive(self, num_tokens: int, priority: int) -> None:
        self._note()
        self.num_tokens += num_tokens
        self._by_priority[priority] += num_tokens
        self.num_waiting += 1

    def _leave(self, num_tokens: int, priority: int, *, is_served: bool) -> None:
        self._note()
        self.num_tokens -= num_tokens
        self._by_priority[priority] -= num_tokens
        if not self._by_priority[priority]:
            del self._by_priority[priority]
        self.num_waiting -= 1
        if is_served:
            self._waits.count += num_tokens
            self.num_decoding += 1

    def _emit(self, num_tokens: int) -> None:
        self._note()
        self._pace.count += num_tokens

    def _end(self, num_tokens: int, max_tokens: int, *, is_finished: bool) -> None:
        self._note()
        self.num_decoding -= 1
        if is_finished:
            kind = max_tokens.bit_length()
            mean = self._output_lengths.get(kind, num_tokens)
            self._output_lengths[kind] = mean + (num_tokens - mean) / 10


class Place:
    """One request's: it waits, decodes, and is over. Each step may be said again."""

    def __init__(self, room: WaitingRoom, num_tokens: int, max_tokens: int, priority: int) -> None:
        self._room = room
        self._num_tokens = num_tokens
        self._max_tokens = max_tokens
        self._priority = priority
        self._num_emitted = 0
        self._is_waiting = True
        self._is_over = False
        room._arrive(num_tokens, priority)

    def decodes(self) -> None:
        """The request is in a batch."""
        if self._is_waiting:
            self._is_waiting = False
            self._room._leave(self._num_tokens, self._priority, is_served=True)

    def emitted(self, num_tokens: int) -> None:
        """The request got tokens."""
        self._num_emitted += num_tokens
        self._room._emit(num_tokens)

    def leave(self, *, is_finished: bool = False) -> None:
        """The request is over; finished, if it has all its tokens."""
        if self._is_over:
            return
        if is_finished:
            self.decodes()
        self._is_over = True
        if self._is_waiting:
            self._is_waiting = False
            self._room._leave(self._num_tokens, self._priority, is_served=False)
        else:
            self._room._end(self._num_emitted, self._max_tokens, is_finished=is_finished)


class _Rate:
    """Seconds per thing counted; both fade with time."""

    def __init__(self) -> None:
        self.count = 0.0
        self._seconds = 0.0
        self._passed_s = 0.0

    @property
    def mean_load(self) -> float:
        """How many counted at a time."""
        return self._seconds / self._passed_s if self._passed_s else 0.0

    @property
    def seconds_each(self) -> float:
        """0 as long as too little was measured."""
        return self._seconds / self.count if self._seconds >= LEAST_MEASURED_S and self.count else 0.0

    def pass_time(self, passed_s: float, counted_s: float) -> None:
        """So much time has passed, and this much of it counts."""
        kept = max(0.0, 1.0 - passed_s / MEMORY_S)
        if self.count * kept >= 1.0:  # a standstill is not forgotten, it is what is measured
            self.count *= kept
            self._seconds *= kept
            self._passed_s *= kept
        self._seconds += counted_s
        self._passed_s += passed_s
