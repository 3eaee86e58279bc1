"""What a worker tells routers about its prefix cache, so that they know which prefix is warm where.

Owns the two values and how a run of them is summed up; sequence numbers and snapshots belong to the session.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from duopool.core.types import BlockKey


@dataclass(frozen=True, slots=True)
class KvStored:
    """Blocks became cached."""

    keys: tuple[BlockKey, ...]
    """A piece of one path, root side first."""
    parent: BlockKey | None
    """The cached key right before `keys[0]`; None when the piece starts at the root."""


@dataclass(frozen=True, slots=True)
class KvRemoved:
    """Blocks left the cache."""

    keys: tuple[BlockKey, ...]
    """Each before the keys that lead to it: every one was a leaf when it left."""


KvEvent = KvStored | KvRemoved


def net_changes(events: Sequence[KvEvent]) -> tuple[tuple[BlockKey, ...], tuple[KvStored, ...]]:
    """Sum events up as (removed, stored), to be applied in that order; a key that came and went is in neither.

    Removed keys are leaf side first; a stored piece comes after the piece its parent is in.
    """
    was_cached: dict[BlockKey, bool] = {}
    last_event: dict[BlockKey, int] = {}
    for index, event in enumerate(events):
        for key in event.keys:
            was_cached.setdefault(key, isinstance(event, KvRemoved))
            last_event[key] = index
    removed: list[BlockKey] = []
    stored: list[KvStored] = []
    for index, event in enumerate(events):
        is_removal = isinstance(event, KvRemoved)
        changed = [last_event[key] == index and was_cached[key] == is_removal for key in event.keys]
        if isinstance(event, KvRemoved):
            removed += [key for key, counts in zip(event.keys, changed, strict=True) if counts]
        else:
            stored += _pieces(event, changed)
    return tuple(removed), tuple(stored)


def _pieces(event: KvStored, wanted: Sequence[bool]) -> list[KvStored]:
    """The runs of `event.keys` that are wanted, each with the key before it."""
    pieces = []
    run: list[BlockKey] = []
    before, parent = event.parent, event.parent
    for key, counts in zip(event.keys, wanted, strict=True):
        if counts:
            if not run:
                parent = before
            run.append(key)
        elif run:
            pieces.append(KvStored(tuple(run), parent))
            run = []
        before = key
    if run:
        pieces.append(KvStored(tuple(run), parent))
    return pieces
