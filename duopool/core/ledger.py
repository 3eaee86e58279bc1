"""What a worker says of itself when it is audited: every block, every table, every request that holds one.

Values only, copied at one moment under the worker's lock. They are raw on purpose: the free list as it stands, counts
as they are kept, tables as they are written, so that `core/audit.py` can compare what the worker's own code takes for
granted.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from duopool.core.types import BlockId, Count, LeaseId, RequestId, Total


class Owner(StrEnum):
    """Whose a request is, seen from the router that asks."""

    ASKER = "asker"
    OTHER = "other"
    """Another router's, whose session is open."""
    GONE = "gone"
    """Its session has ended: it lives on for the orphan's time to live at most."""


class BlockLedger(msgspec.Struct, frozen=True, kw_only=True):
    """All blocks of one worker."""

    num_blocks: Count
    free: tuple[BlockId, ...]
    """The free list; a block that stands in it twice was freed twice."""
    cached: tuple[BlockId, ...]
    """Blocks in the prefix cache, referenced or not."""
    ref_counts: dict[BlockId, int]
    """Those that are not zero."""
    tables: dict[RequestId, tuple[BlockId, ...]]
    pins: dict[BlockId, int]

    @property
    def num_referenced(self) -> int:
        return len(self.ref_counts)

    @property
    def num_cached(self) -> int:
        """Cached blocks that nobody references."""
        return len(set(self.cached) - self.ref_counts.keys())


class LeaseEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One lease on a request's blocks."""

    lease_id: LeaseId
    attempt: int
    blocks: tuple[BlockId, ...]
    num_readers: int
    is_revoked: bool


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt of one request on a worker."""

    request_id: RequestId
    attempt: int
    phase: str
    """`waiting`, `filling`, `leased`, `pulling`, `running` or `ended`."""
    table: RequestId
    """Name of its block table; every phase but `waiting` has one."""
    owner: Owner
    silent_s: float = 0.0
    """How long the owner's session has given no sign of life."""
    is_in_step: bool = False
    num_reads: int = 0
    """Reads under way that touch the table."""
    lease: LeaseEntry | None = None
    moves_to: int = 0
    """Attempt that takes the request over while it decodes here, if one does: its lease is that attempt's."""

    @property
    def is_alive(self) -> bool:
        return self.phase != "ended"


class Resources(msgspec.Struct, frozen=True, kw_only=True):
    """What a process holds of the operating system and of its event loop."""

    pid: Count = 0
    num_fds: Count = 0
    num_threads: Count = 0
    num_tasks: Count = 0
    num_streams: Count = 0
    """Calls being served: sessions of a worker, client streams of a router."""
    resident_bytes: Total = 0


class WorkerLedger(msgspec.Struct, frozen=True, kw_only=True):
    """One worker at one moment."""

    blocks: BlockLedger
    holders: tuple[Holder, ...]
    """Those that have ended but still keep blocks from a step or a read included."""
    fault: str = ""
    """What the worker's own `check` found."""
    resources: Resources = Resources()
