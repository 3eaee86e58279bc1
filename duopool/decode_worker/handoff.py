"""Carries out what a handoff does next: reads of the prefill worker's blocks and the question whether its lease held.

What comes next is decided in `core/handoff/slot.py`. Owns the calls of the reader, which are made without the worker's
lock, and what was read how fast. What a handoff means for the batch, the blocks and the router is left to the worker.
Not thread-safe but for the reader's answers, which are passed on untouched; the worker's lock covers the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from duopool.core.handoff import slot as slots
from duopool.core.handoff.slot import SlotEvent
from duopool.core.messages import Verdict
from duopool.decode_worker.decode_request import DecodeRequest
from duopool.engine.failpoints import Failpoint, reach
from duopool.engine.transfer.transport import BlockReader, ReadOutcome

NUM_TRIES = 2
"""A read whose pages arrive damaged is made once more; then the whole handoff is given up, and others prefill."""

Outcome = slots.Join | slots.Report | slots.Refuse | slots.GiveBack
"""What the worker itself must do for a handoff."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the reader says about one handoff, from a thread of its own."""

    event: SlotEvent
    num_blocks: int = 0
    num_bytes: int = 0


class Handoffs:
    """Drives the slots of requests whose blocks are pulled."""

    def __init__(
        self,
        reader: BlockReader,
        *,
        on_answer: Callable[[DecodeRequest, Answer], None],
        clock: Callable[[], float],
    ) -> None:
        self.num_pulled_blocks = 0
        self._reader = reader
        self._on_answer = on_answer
        """Called without the lock, by any thread; must come back with `take_in`."""
        self._clock = clock
        self._calls: list[Callable[[], None]] = []

    def advance(self, request: DecodeRequest, event: SlotEvent) -> list[Outcome]:
        """Let the request's slot see an event; queue the reads it asks for and return what else it wants, in order."""
        if request.slot is None:
            return []
        num_reads = request.slot.num_reads
        request.slot, actions = slots.transition(request.slot, event)
        self._clock_reads(request, num_reads, request.slot.num_reads)
        outcomes: list[Outcome] = []
        for action in actions:
            match action:
                case slots.Read():
                    self._calls.append(partial(self._read, request, action))
                case slots.Confirm():
                    self._calls.append(partial(self._confirm, request, action))
                case _:
                    outcomes.append(action)
        return outcomes

    def take_in(self, request: DecodeRequest, answer: Answer) -> list[Outcome]:
        """The reader has answered."""
        request.num_pulled_blocks += answer.num_blocks
        request.num_pulled_bytes += answer.num_bytes
        self.num_pulled_blocks += answer.num_blocks
        return self.advance(request, answer.event)

    def take_calls(self) -> list[Callable[[], None]]:
        """Calls of the reader that are to be made as soon as the lock is let go."""
        calls, self._calls = self._calls, []
        return calls

    def _read(self, request: DecodeRequest, read: slots.Read, *, num_tries: int = NUM_TRIES) -> None:
        def done(outcome: ReadOutcome) -> None:
            if outcome.is_damaged and num_tries > 1:
                # To the slot it is one read, so its blocks stay its own meanwhile. A closed reader reads no more.
                with suppress(RuntimeError):
                    self._read(request, read, num_tries=num_tries - 1)
                    return
            is_good, event = not outcome.error, slots.ReadEnded(outcome.error)
            num_blocks, num_bytes = (len(read.sources), outcome.num_bytes) if is_good else (0, 0)
            self._on_answer(request, Answer(event=event, num_blocks=num_blocks, num_bytes=num_bytes))

        self._reader.read(read.lease, request.attempt, read.sources, read.targets, done)
        reach(Failpoint.READING)

    def _confirm(self, request: DecodeRequest, confirm: slots.Confirm) -> None:
        def done(verdict: Verdict) -> None:
            self._on_answer(request, Answer(event=slots.Validated(verdict.ok, verdict.reason)))

        self._reader.confirm(confirm.lease, request.attempt, done)

    def _clock_reads(self, request: DecodeRequest, before: int, after: int) -> None:
        """Count the time in which at least one read is under way."""
        if before == 0 and after > 0:
            request.reading_since = self._clock()
        elif before > 0 and after == 0:
            request.transfer_s += self._clock() - request.reading_since
