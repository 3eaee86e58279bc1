"""A request with all that nobody else notices left out: the smallest system that others cannot tell from it.

Two states are one if each can do, now or after steps that nobody else notices, what the other can (branching
bisimilarity). No step leads back, so one pass from the last states to the first finds the classes: a state belongs to
the class of a next one, if it can do nothing that is not left to it there; else to the class of those that can do the
same. What two requests do together is the same with all states as with classes: see the tests.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from model_part import Move, Part
from model_setting import Violation
from model_state import PROGRESS, Meeting

Deed = tuple[int, Meeting | None]
"""What others notice of a step: its kind, and how it meets them. (PROGRESS, None) they do not notice by itself."""
Face = tuple[tuple[int, ...], bool]
"""What others notice of a state: the tables that it holds, and whether it is stuck, which it must never be."""

UNSEEN: Deed = (PROGRESS, None)


class Quotient:
    """The classes of a part's states, as a part."""

    def __init__(self, part: Part) -> None:
        self.num_states = 0
        self.num_steps = 0
        self._remains: list[str] = []
        self._faces: list[Face] = []
        self._deeds: list[frozenset[tuple[Deed, int]]] = []
        self._numbers: dict[tuple[Face, frozenset[tuple[Deed, int]]], int] = {}
        self.first = self._classify(part)
        self._moves = [tuple(_move(deed, after) for deed, after in sorted(deeds, key=repr)) for deeds in self._deeds]

    def __len__(self) -> int:
        return len(self._faces)

    def moves(self, state: int) -> Sequence[Move]:
        return self._moves[state]

    def held(self, state: int) -> tuple[int, ...]:
        return self._faces[state][0]

    def overwritten(self, state: int, place: int) -> int:
        """The same: blocks that nobody holds are taken as overwritten at once."""
        return state

    def is_over(self, state: int) -> bool:
        return not self._faces[state][1] and not any(_goes_on(deed) for deed, _ in self._deeds[state])

    def remains(self, state: int) -> str:
        return self._remains[state]

    def class_of(self, state: int) -> int:
        """The class of one of the part's states."""
        return self._classes[state]

    def _classify(self, part: Part) -> int:
        """All states, each after those that follow it; returns the class of the first."""
        classes = self._classes = array("q")
        opened: dict[int, Sequence[tuple[Deed, int]]] = {}
        way = [part.first]
        while way:
            state = way[-1]
            if len(classes) <= state:
                classes.extend([-1] * (state + 1 - len(classes)))
            if classes[state] >= 0:
                way.pop()
            elif (following := opened.pop(state, None)) is None:
                following = [((kind, meeting), after) for _, kind, meeting, after in part.moves(state)]
                opened[state] = following
                for _, after in following:
                    if after in opened:
                        raise Violation("progress can go round in a circle")
                    if after >= len(classes) or classes[after] < 0:
                        way.append(after)
            else:
                way.pop()
                deeds = frozenset((deed, classes[after]) for deed, after in following)
                classes[state] = self._class(part, state, deeds)
                self.num_states += 1
                self.num_steps += len(following)
        return classes[part.first]

    def _class(self, part: Part, state: int, deeds: frozenset[tuple[Deed, int]]) -> int:
        is_stuck = not any(_goes_on(deed) for deed, _ in deeds) and not part.is_over(state)
        face = part.held(state), is_stuck
        for deed, after in deeds:
            if deed == UNSEEN and self._faces[after] == face and deeds - self._deeds[after] == {(deed, after)}:
                return after
        number = self._numbers.setdefault((face, deeds), len(self._faces))
        if number == len(self._faces):
            self._faces.append(face)
            self._deeds.append(deeds)
            self._remains.append(part.remains(state))
        return number


def _goes_on(deed: Deed) -> bool:
    return deed[0] == PROGRESS


def _move(deed: Deed, after: int) -> Move:
    kind, meeting = deed
    label = f"kind {kind}" if meeting is None else f"{meeting.what} at place {meeting.place}"
    return Move(label, kind, meeting, after)
