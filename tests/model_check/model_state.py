"""States as small numbers, the steps between them, and the store of what the numbers stand for."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, NamedTuple, TypeVar

State = tuple[int, ...]
"""Of one request: router, stations, faults left. Of two: either one's number, faults left."""
Next = tuple[str, int, State]
"""What happens, of which kind, and the state then."""

FAULT, CHOICE, PROGRESS = 1, 2, 0
"""Kinds of steps. A choice is the client's."""


class Meeting(NamedTuple):
    """What a step means to other requests."""

    what: str
    """take: room on a worker. crash, break, notice: all requests of a worker see it at the same moment."""
    place: int


Step = tuple[str, int, Meeting | None, State]
"""As Next, with what it means to others; None: they do not notice."""

ValueT = TypeVar("ValueT", bound=Hashable)


class Store(Generic[ValueT]):
    """Values by number and numbers by value."""

    def __init__(self) -> None:
        self._values: list[ValueT] = []
        self._numbers: dict[ValueT, int] = {}

    def number(self, value: ValueT) -> int:
        number = self._numbers.get(value)
        if number is None:
            number = self._numbers[value] = len(self._values)
            self._values.append(value)
        return number

    def __getitem__(self, number: int) -> ValueT:
        return self._values[number]

    def __len__(self) -> int:
        return len(self._values)
