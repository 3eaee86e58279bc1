"""Two requests in one system: what both may do, from what each may do, as a world for `search`.

A request takes room on a worker only when both together leave some. A worker's death, the end of its session and the
router's notice of it happen to both at once, and both draw on the same few faults. Each has its own order on every
wire: these are all orders of the one wire that they share, and more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import permutations, product

from model_part import Move, Part, WholePart
from model_setting import Setting, Violation
from model_state import FAULT, Meeting, Next, State
from model_world import World

NAMES = "A", "B"


class Pair:
    """States are three numbers: request A's, request B's, and the faults that are left."""

    def __init__(self, setting: Setting, parts: tuple[Part, Part]) -> None:
        assert setting.room is not None
        self._room = setting.room
        self._parts = parts
        self._moves: tuple[dict[int, Sequence[Move]], ...] = ({}, {})
        self._joint: dict[tuple[int, Meeting], int] = {}
        self._held: tuple[dict[int, tuple[int, ...]], ...] = ({}, {})
        self.first: State = (parts[0].first, parts[1].first, setting.num_faults)

    def next_states(self, state: State) -> Iterator[Next]:
        """What may happen now."""
        *both, num_faults = state
        held = [a + b for a, b in zip(self._holds(0, both[0]), self._holds(1, both[1]), strict=True)]
        if max(held) > self._room:
            raise Violation("a worker has given out more blocks than it has")
        moves = [self._moves_of(index, both[index]) for index in (0, 1)]
        for index in (0, 1):
            for label, kind, meeting, after in moves[index]:
                left = num_faults - (kind == FAULT)
                other = both[1 - index]
                if left < 0:
                    continue
                if meeting is not None and meeting.what != "take":
                    if index == 0:
                        yield label, kind, (after, self._joint[other, meeting], left)
                    continue
                if meeting is not None:
                    if held[meeting.place - 1] >= self._room:
                        continue
                    other = self._parts[1 - index].overwritten(other, meeting.place)
                pair = (after, other) if index == 0 else (other, after)
                yield f"{NAMES[index]}: {label}", kind, (*pair, left)

    def is_over(self, state: State) -> bool:
        """Both have ended, nothing is held anywhere and nothing is on the way."""
        return all(part.is_over(one) for part, one in zip(self._parts, state[:2], strict=True))

    def remains(self, state: State) -> str:
        """What is wrong with a state in which nothing more happens."""
        remains = [part.remains(one) for part, one in zip(self._parts, state[:2], strict=True)]
        return "; ".join(f"{name}: {what}" for name, what in zip(NAMES, remains, strict=True) if what)

    def _moves_of(self, index: int, state: int) -> Sequence[Move]:
        known = self._moves[index].get(state)
        if known is None:
            try:
                known = self._moves[index][state] = self._parts[index].moves(state)
            except Violation as violation:
                raise Violation(f"{NAMES[index]}: {violation}") from violation
            for _, _, meeting, after in known if index == 1 else ():
                if meeting is not None:
                    self._joint[state, meeting] = after
        return known

    def _holds(self, index: int, state: int) -> tuple[int, ...]:
        held = self._held[index].get(state)
        if held is None:
            held = self._held[index][state] = self._parts[index].held(state)
        return held


class Turned:
    """A part in which workers of the same role have changed places."""

    def __init__(self, part: Part, order: Sequence[int]) -> None:
        """`order` are the places, from 0, that the part's workers have here."""
        self._part, self._order = part, order
        self.first = part.first

    def moves(self, state: int) -> Sequence[Move]:
        return [
            move if move.meeting is None else move._replace(meeting=self._turned(move.meeting))
            for move in self._part.moves(state)
        ]

    def held(self, state: int) -> tuple[int, ...]:
        held = self._part.held(state)
        return tuple(held[self._order.index(place)] for place in range(len(held)))

    def overwritten(self, state: int, place: int) -> int:
        return self._part.overwritten(state, self._order.index(place - 1) + 1)

    def is_over(self, state: int) -> bool:
        return self._part.is_over(state)

    def remains(self, state: int) -> str:
        return self._part.remains(state)

    def _turned(self, meeting: Meeting) -> Meeting:
        return meeting._replace(place=self._order[meeting.place - 1] + 1)


def whole_pair(setting: Setting) -> Pair:
    """Two requests with all their states.

    Workers are alike until a request touches them, so request A tries only the first of those that it has not touched.
    """
    return Pair(setting, (WholePart(World(setting)), WholePart(World(setting, all_routes=True))))


def turns(setting: Setting) -> list[tuple[int, ...]]:
    """All ways in which workers of the same role may change places."""
    first = range(setting.num_prefill)
    second = range(setting.num_prefill, setting.num_prefill + setting.num_decode)
    return [(*one, *other) for one, other in product(permutations(first), permutations(second))]
