"""One read on D, from the call of `BlockReader.read` until its `done`, as readers keep it that do not block."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from duopool.core.messages import LeaseRef, SealedBlock
from duopool.core.types import BlockId, Incarnation, WorkerId
from duopool.engine.transfer.transport import ReadOutcome

PeerId = tuple[WorkerId, Incarnation]


@dataclass(slots=True, kw_only=True, eq=False)
class PageRead:
    """P's pages `sources`, to be copied over own pages `targets`."""

    lease: LeaseRef
    attempt: int
    sources: tuple[SealedBlock, ...]
    targets: tuple[BlockId, ...]
    done: Callable[[ReadOutcome], None]
    late_at: float
    """On the monotonic clock."""

    @classmethod
    def of(
        cls,
        lease: LeaseRef,
        attempt: int,
        sources: Sequence[SealedBlock],
        targets: Sequence[BlockId],
        done: Callable[[ReadOutcome], None],
        *,
        timeout_s: float,
    ) -> Self:
        """Begins at this moment. Raises ValueError if there is not one target for each source."""
        if len(sources) != len(targets):
            raise ValueError(f"{len(sources)} sources for {len(targets)} targets")
        return cls(
            lease=lease,
            attempt=attempt,
            sources=tuple(sources),
            targets=tuple(targets),
            done=done,
            late_at=time.monotonic() + timeout_s,
        )

    @property
    def peer_id(self) -> PeerId:
        return self.lease.worker_id, self.lease.incarnation
