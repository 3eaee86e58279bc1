"""What a worker tells routers about its prefix cache, so that they know which prefix is warm where.

Owns the two values only; sequence numbers and snapshots belong to the session that carries them.
"""

from __future__ import annotations

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
