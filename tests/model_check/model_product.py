"""All states of two requests, from the classes of one: many millions of pairs, a few million at a time.

The same steps as in `model_pair.py`, on arrays. Workers are alike, so request A's own order of them may be taken as the
order, and request B's are tried in every order (`turns`); requests are alike, so of two states that differ by their
names one is looked at. No way leads round in a circle, as every step leads one of the two on and neither has a circle.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from model_pair import turns
from model_part import Part
from model_search import Result
from model_setting import Setting
from model_state import FAULT, PROGRESS, Meeting
from numpy.typing import NDArray

Ints = NDArray[np.int64]
CHUNK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A part's moves of one kind: those of state `n` stand at `begins[n]` to `begins[n + 1]`."""

    begins: Ints
    afters: Ints
    marks: Ints
    """The faults that a move takes, or the place where it takes room."""

    def of(self, states: Ints) -> tuple[Ints, Ints, Ints]:
        """All moves of these states: (index into `states`, state after, mark)."""
        counts = self.begins[states + 1] - self.begins[states]
        owners = np.repeat(np.arange(len(states)), counts)
        offsets = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
        at = self.begins[states][owners] + offsets
        return owners, self.afters[at], self.marks[at]


class Tables:
    """A part as arrays, its workers in a given order."""

    def __init__(self, part: Part, num_states: int, order: Sequence[int]) -> None:
        own: list[list[tuple[int, int]]] = [[] for _ in range(num_states)]
        takes: list[list[tuple[int, int]]] = [[] for _ in range(num_states)]
        self.joint: dict[Meeting, Ints] = {}
        self.held = np.zeros((num_states, len(order)), dtype=np.int64)
        self.wants = np.zeros((num_states, len(order)), dtype=np.bool_)
        self.goes_on = np.zeros(num_states, dtype=np.bool_)
        self.is_over = np.array([part.is_over(state) for state in range(num_states)])
        for state in range(num_states):
            self.held[state, list(order)] = part.held(state)
            for _, kind, meeting, after in part.moves(state):
                if meeting is None:
                    own[state].append((after, int(kind == FAULT)))
                    self.goes_on[state] |= kind == PROGRESS
                    continue
                place = order[meeting.place - 1]
                if meeting.what == "take":
                    takes[state].append((after, place))
                    self.wants[state, place] = True
                else:
                    at = Meeting(meeting.what, place)
                    afters = self.joint.setdefault(at, np.full(num_states, -1, dtype=np.int64))
                    assert afters[state] < 0, "what both see has one outcome"
                    afters[state] = after
                    self.goes_on[state] |= kind == PROGRESS
        self.own, self.takes = _table(own), _table(takes)


def _table(moves: list[list[tuple[int, int]]]) -> Table:
    flat = np.array([move for some in moves for move in some], dtype=np.int64).reshape(-1, 2)
    begins = np.concatenate([[0], np.cumsum([len(some) for some in moves])]).astype(np.int64)
    return Table(begins=begins, afters=flat[:, 0].copy(), marks=flat[:, 1].copy())


def search_product(setting: Setting, part: Part, num_classes: int) -> Result:
    """Look at every pair of classes that can be reached; without a way to what is wrong."""
    began_at, num_states, num_steps, violation = time.monotonic(), 0, 0, ""
    for order in turns(setting):
        product = Product(setting, part, num_classes, order)
        violation = product.search()
        num_states, num_steps = num_states + product.num_states, num_steps + product.num_steps
        if violation:
            break
    seconds = time.monotonic() - began_at
    return Result(num_states=num_states, num_steps=num_steps, seconds=seconds, is_complete=True, violation=violation)


class Product:
    """The search with one order of request B's workers."""

    def __init__(self, setting: Setting, part: Part, num_classes: int, order: Sequence[int]) -> None:
        assert setting.room is not None
        assert not setting.pages_stay  # a class does not tell what is in blocks that it does not hold
        assert all(order[order[place]] == place for place in range(len(order)))  # else A and B cannot change names
        self._size, self._room, self._num_faults = num_classes, setting.room, setting.num_faults
        self._sides = Tables(part, num_classes, range(len(order))), Tables(part, num_classes, order)
        self._seen = np.zeros(num_classes * num_classes, dtype=np.uint8)
        """One bit for each number of faults that are left."""
        self._first = part.first * num_classes + part.first
        self.num_states = self.num_steps = 0

    def search(self) -> str:
        """What is wrong, or an empty string."""
        layers = {left: np.empty(0, dtype=np.int64) for left in range(self._num_faults + 1)}
        layers[self._num_faults] = np.array([self._first], dtype=np.int64)
        self._seen[self._first] = 1 << self._num_faults
        while any(map(len, layers.values())):
            following: dict[int, list[Ints]] = {left: [] for left in layers}
            for left, layer in layers.items():
                self.num_states += len(layer)
                for begin in range(0, len(layer), CHUNK):
                    first, second = np.divmod(layer[begin : begin + CHUNK], self._size)
                    wrong = self._wrong(first, second)
                    if wrong:
                        return wrong
                    for pairs, then_left in self._next(first, second, left):
                        self.num_steps += len(pairs)
                        following[then_left].append(self._fresh(pairs, then_left))
            layers = {left: np.concatenate([*found, layers[0][:0]]) for left, found in following.items()}
        return ""

    def _fresh(self, pairs: Ints, left: int) -> Ints:
        pairs = np.unique(pairs[self._seen[pairs] >> left & 1 == 0])
        self._seen[pairs] |= 1 << left
        return pairs

    def _next(self, first: Ints, second: Ints, left: int) -> Iterator[tuple[Ints, int]]:
        a, b = self._sides
        for mine, other, me, you in ((first, second, a, b), (second, first, b, a)):
            owners, afters, costs = me.own.of(mine)
            pairs = self._pairs(afters, other[owners])
            for cost in (0, 1) if left else (0,):
                yield pairs[costs == cost], left - cost
            owners, afters, places = me.takes.of(mine)
            has_room = me.held[mine[owners], places] + you.held[other[owners], places] < self._room
            yield self._pairs(afters[has_room], other[owners[has_room]]), left
        for meeting, after_first in a.joint.items():
            cost = int(meeting.what != "notice")
            one, two = after_first[first], b.joint[meeting][second]
            if cost <= left:
                assert ((one >= 0) == (two >= 0)).all(), f"only one of two sees {meeting}"
                yield self._pairs(one[one >= 0], two[one >= 0]), left - cost

    def _pairs(self, first: Ints, second: Ints) -> Ints:
        """Pairs as numbers, the same for a pair and for the pair of the same with names changed."""
        return np.maximum(first, second) * self._size + np.minimum(first, second)

    def _wrong(self, first: Ints, second: Ints) -> str:
        a, b = self._sides
        held = a.held[first] + b.held[second]
        if (held > self._room).any():
            return "a worker has given out more blocks than it has"
        finds_room = ((a.wants[first] | b.wants[second]) & (held < self._room)).any(axis=1)
        goes_on = a.goes_on[first] | b.goes_on[second] | finds_room
        if (~goes_on & ~(a.is_over[first] & b.is_over[second])).any():
            return "a request hangs or keeps its blocks, and nothing more happens"
        return ""
