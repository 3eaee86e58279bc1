"""One request as a part of a system that it shares with others: its steps, and which of them others have to do with.

Requests meet in four things only: the room for blocks on a worker, a worker's death, the end of a session, and the
number of faults. Everything else that a worker keeps, it keeps per request, under ids that no other request has. What a
request may do at all is therefore searched once, beside others that may do anything at any time (`Part`); what two of
them do together is the product of two parts (`model_pair.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from model_state import Meeting, State, Store
from model_world import World


class Move(NamedTuple):
    """One step of one request."""

    label: str
    kind: int
    """FAULT, CHOICE or PROGRESS."""
    meeting: Meeting | None
    """None: nobody else hears of it."""
    after: int


class Part(Protocol):
    """A request as numbered states."""

    @property
    def first(self) -> int: ...

    def moves(self, state: int) -> Sequence[Move]:
        """What may happen, whatever others do."""

    def held(self, state: int) -> tuple[int, ...]:
        """How many tables have blocks, place by place."""

    def overwritten(self, state: int, place: int) -> int:
        """The state after others took the room that is free at a place."""

    def is_over(self, state: int) -> bool: ...

    def remains(self, state: int) -> str:
        """What is unfinished, in words."""


class WholePart:
    """A request with all its states."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._states = Store[State]()
        self.first = self._states.number(world.first)

    def __len__(self) -> int:
        return len(self._states)

    def moves(self, state: int) -> Sequence[Move]:
        steps = self._world.steps(self._states[state])
        return [Move(label, kind, meeting, self._states.number(after)) for label, kind, meeting, after in steps]

    def held(self, state: int) -> tuple[int, ...]:
        return self._world.held(self._states[state])

    def overwritten(self, state: int, place: int) -> int:
        return self._states.number(self._world.overwritten(self._states[state], place))

    def is_over(self, state: int) -> bool:
        return self._world.is_over(self._states[state])

    def remains(self, state: int) -> str:
        return self._world.remains(self._states[state])
