"""A prefill and a decode stage behind a waiting room, on a clock of their own: what becomes of a load there.

A decode step costs a fixed time and some for each sequence, a prefill step some for each token. Prompts are prefilled
by priority, else in order, then wait for a seat in the batch. Who is past the deadline leaves at once.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import inf
from random import Random

from duopool.core.errors import Overloaded
from duopool.router.waiting_room import Place, WaitingRoom


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What steps cost, in seconds."""

    step_s: float
    sequence_s: float
    prompt_token_s: float
    max_num_seqs: int
    slowdown: float = 1.0
    """By which a stage is slower while the other works too: 1 where they share nothing."""
    hiccup_s: float = 0.0
    """At the beginning of every 15 s, for so long, everything takes twice as long."""
    max_num_batched_tokens: int = 512

    def pace(self, now: float, *, is_shared: bool) -> float:
        """Seconds that pass for each second of a step's cost."""
        return (self.slowdown if is_shared else 1.0) * (2.0 if now % 15.0 < self.hiccup_s else 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a request wants."""

    prompt_tokens: int
    output_tokens: int
    deadline_s: float = inf
    priority: int = 0


@dataclass(slots=True, eq=False)
class Sequence:
    wish: Wish
    call: ExitStack
    place: Place
    came_at: float
    num_missing: int
    """Prompt tokens."""
    num_emitted: int = 0

    def emit(self) -> None:
        self.num_emitted += 1
        self.place.emitted(1)


@dataclass(slots=True)
class Outcome:
    """What became of a load."""

    num_offered: int = 0
    num_accepted: int = 0
    num_late: int = 0
    ends: list[tuple[float, float]] = field(default_factory=list)
    """When requests finished in time, and how long they took."""

    def goodput(self, start: float, end: float) -> float:
        """Requests per second that finished between two moments."""
        return sum(start <= at < end for at, _ in self.ends) / (end - start)


class System:
    """`now` is its clock."""

    def __init__(self, machine: Machine) -> None:
        self.now = 0.0
        self.outcome = Outcome()
        """Of the load that is offered now."""
        self.num_under_way = 0
        self._room = WaitingRoom(max_num_tokens=10**6, max_wait_s=inf, clock=lambda: self.now)
        self._machine = machine
        self._prompts: list[Sequence] = []
        self._prefilled: list[Sequence] = []
        """They have no seat."""
        self._batch: list[Sequence] = []
        self._prefill_left_s = self._decode_left_s = inf
        """Of what the step under way costs; infinite without one."""
        self._prefilling: list[tuple[Sequence, int]] = []
        self._decoding: list[Sequence] = []

    def offer(self, wish: Wish) -> bool:
        """A request comes; True if it is accepted."""
        self.outcome.num_offered += 1
        call, time_left_s = ExitStack(), None if wish.deadline_s == inf else wish.deadline_s
        try:
            (place,) = call.enter_context(
                self._room.enter(
                    [wish.prompt_tokens],
                    max_tokens=wish.output_tokens,
                    time_left_s=time_left_s,
                    priority=wish.priority,
                )
            )
        except Overloaded:
            return False
        self.outcome.num_accepted += 1
        self.num_under_way += 1
        insort(self._prompts, Sequence(wish, call, place, self.now, wish.prompt_tokens), key=_turn)
        return True

    def advance(self, until: float) -> None:
        """Let time pass."""
        while self.now < until:
            self._begin_steps()
            pace = self._machine.pace(self.now, is_shared=max(self._prefill_left_s, self._decode_left_s) < inf)
            done_s = min((until - self.now) / pace, self._prefill_left_s, self._decode_left_s)
            self.now = min(until, self.now + max(1e-9, done_s * pace))
            self._prefill_left_s -= done_s
            self._decode_left_s -= done_s
            if self._prefill_left_s <= 0:
                self._end_prefill()
            if self._decode_left_s <= 0:
                self._end_decode()
            self._drop_late()

    def _begin_steps(self) -> None:
        machine = self._machine
        if self._prefill_left_s == inf and self._prompts:
            budget, self._prefilling = machine.max_num_batched_tokens, []
            for one in self._prompts:
                self._prefilling.append((one, min(budget, one.num_missing)))
                budget -= min(budget, one.num_missing)
            self._prefill_left_s = machine.prompt_token_s * (machine.max_num_batched_tokens - budget)
        if self._decode_left_s == inf:
            while self._prefilled and len(self._batch) < machine.max_num_seqs:
                self._batch.append(self._prefilled.pop(0))
                self._batch[-1].place.decodes()
            if self._batch:
                self._decoding = list(self._batch)
                self._decode_left_s = machine.step_s + machine.sequence_s * len(self._batch)

    def _end_prefill(self) -> None:
        self._prefill_left_s = inf
        for one, num_tokens in self._prefilling:
            one.num_missing -= num_tokens
            if not one.num_missing and one in self._prompts:
                self._prompts.remove(one)
                insort(self._prefilled, one, key=_turn)
                one.emit()

    def _end_decode(self) -> None:
        self._decode_left_s = inf
        for one in self._decoding:
            if one not in self._batch:
                continue
            one.emit()
            if one.num_emitted >= one.wish.output_tokens:
                one.place.leave(is_finished=True)
                self._leave(self._batch, one)
                self.outcome.ends.append((self.now, self.now - one.came_at))

    def _drop_late(self) -> None:
        for queue in (self._prompts, self._prefilled, self._batch):
            for one in [one for one in queue if one.came_at + one.wish.deadline_s < self.now]:
                self._leave(queue, one)
                self.outcome.num_late += 1

    def _leave(self, queue: list[Sequence], one: Sequence) -> None:
        queue.remove(one)
        one.call.close()
        self.num_under_way -= 1


def _turn(one: Sequence) -> int:
    return one.wish.priority


def open_loop(system: System, wish: Callable[[], Wish], *, rate: float, seconds: float, random: Random) -> Outcome:
    """Poisson arrivals that never wait for answers; what was accepted comes to its end."""
    system.outcome, end = Outcome(), system.now + seconds
    while (arrival := system.now + random.expovariate(rate)) < end:
        system.advance(arrival)
        system.offer(wish())
    while system.num_under_way:
        system.advance(system.now + 0.5)
    return system.outcome


def closed_loop(machine: Machine, wish: Wish, *, num_streams: int, seconds: float = 120.0) -> float:
    """Requests per second that end within their deadline, with always so many under way and nobody refused."""
    system = System(machine)
    while system.now < seconds:
        while system.num_under_way < num_streams:
            system.offer(Wish(prompt_tokens=wish.prompt_tokens, output_tokens=wish.output_tokens))
        system.advance(system.now + 0.02)
    return sum(at >= seconds / 2 and took_s <= wish.deadline_s for at, took_s in system.outcome.ends) / (seconds / 2)
