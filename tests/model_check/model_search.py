"""Breadth-first search of all states, with the shortest way to the first that is wrong.

Three things are looked for: a step that raises Violation; a state that can go no further by itself although something
is unfinished; and a circle of steps that are progress. Without the last two every way that meets no further fault comes
to its end: so from every state everything can still be free.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
from model_setting import Violation
from model_state import PROGRESS, Next, State


class World(Protocol):
    """What is searched."""

    @property
    def first(self) -> State: ...

    def next_states(self, state: State) -> Iterable[Next]:
        """What may happen; raises Violation if it must never happen."""

    def is_over(self, state: State) -> bool:
        """Whether it is right that nothing more happens."""

    def remains(self, state: State) -> str:
        """What is unfinished, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a search found."""

    num_states: int
    num_steps: int
    seconds: float
    is_complete: bool
    violation: str = ""
    trace: tuple[str, ...] = ()
    """Step by step from the first state to the violation."""

    def report(self) -> str:
        lines = [f"{self.num_states:,} states, {self.num_steps:,} steps, {self.seconds:.1f} s"]
        if self.violation:
            width = len(str(len(self.trace)))
            lines += [f"  {number:>{width}}  {label}" for number, label in enumerate(self.trace, start=1)]
            lines += [f"  =>  {self.violation}"]
        elif not self.is_complete:
            lines += ["not exhausted"]
        return "\n".join(lines)


def search(world: World, *, max_states: int | None = None) -> Result:
    """Look at every state that can be reached; the first that is wrong ends the search."""
    began_at = time.monotonic()
    first = world.first
    numbers: dict[int, int] = {_pack(first): 0}
    parents = array("q", [-1])
    progress_from, progress_to = array("I"), array("I")
    layer, num_steps = [(0, first)], 0
    is_complete = True

    def result(violation: str = "", trace: Sequence[str] = ()) -> Result:
        return Result(
            num_states=len(numbers),
            num_steps=num_steps,
            seconds=time.monotonic() - began_at,
            is_complete=is_complete,
            violation=violation,
            trace=tuple(trace),
        )

    while layer:
        following: list[tuple[int, State]] = []
        for number, state in layer:
            can_go_on = False
            try:
                for _, kind, after in world.next_states(state):
                    num_steps += 1
                    packed = _pack(after)
                    known = numbers.get(packed)
                    if known is None:
                        known = numbers[packed] = len(parents)
                        parents.append(number)
                        following.append((known, after))
                    if kind == PROGRESS:
                        can_go_on = True
                        progress_from.append(number)
                        progress_to.append(known)
            except Violation as violation:
                return result(str(violation), _trace(world, numbers, parents, number))
            if not can_go_on and not world.is_over(state):
                return result(world.remains(state), _trace(world, numbers, parents, number))
        if max_states is not None and len(numbers) > max_states:
            is_complete = False
            return result()
        layer = following
    circle = _circle(len(parents), progress_from, progress_to)
    if circle is not None:
        return result("progress can go round in a circle", _trace(world, numbers, parents, circle))
    return result()


_BITS = 24
"""A part's number has fewer."""


def _pack(state: State) -> int:
    packed = 0
    for number in state:
        packed = packed << _BITS | number
    return packed


def _unpack(packed: int, length: int) -> State:
    return tuple(packed >> _BITS * place & (1 << _BITS) - 1 for place in range(length - 1, -1, -1))


def _trace(world: World, numbers: dict[int, int], parents: array[int], number: int) -> list[str]:
    """The names of the steps from the first state to a state."""
    way = []
    while number >= 0:
        way.append(number)
        number = parents[number]
    in_order = list(numbers)
    states = [_unpack(in_order[one], len(world.first)) for one in reversed(way)]
    return [_label(world, before, after) for before, after in pairwise(states)]


def _label(world: World, before: State, after: State) -> str:
    return next(label for label, _, found in world.next_states(before) if found == after)


def _circle(num_states: int, sources: array[int], targets: array[int]) -> int | None:
    """A state on a circle of progress, or None (Kahn's order)."""
    begin, end = np.asarray(sources, dtype=np.uint32), np.asarray(targets, dtype=np.uint32)
    num_in = np.bincount(end, minlength=num_states)
    order = np.argsort(begin, kind="stable")
    begin, end = begin[order], end[order]
    starts = np.searchsorted(begin, np.arange(num_states + 1))
    ready = np.flatnonzero(num_in == 0)
    num_done = 0
    while len(ready):
        num_done += len(ready)
        spans = [end[starts[one] : starts[one + 1]] for one in ready]
        heads = np.concatenate(spans) if spans else np.empty(0, dtype=np.uint32)
        np.subtract.at(num_in, heads, 1)
        heads = np.unique(heads)
        ready = heads[num_in[heads] == 0]
    return None if num_done == num_states else int(np.flatnonzero(num_in > 0)[0])
