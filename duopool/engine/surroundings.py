"""Time, randomness and tensors, as a worker's bookkeeping sees them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from duopool.core.types import LeaseId
from duopool.engine.sealer import SealBlocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a worker does not make itself."""

    seal: SealBlocks
    new_lease_id: Callable[[], LeaseId]
    """Ids that were never used before, by any life of any worker."""
    clock: Callable[[], float]
    """The clock that every `now` is taken from."""
