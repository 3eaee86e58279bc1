"""P's KV source, whatever carries it: refuses what names another life, other pages or a lost lease, then serves.

Leases belong to the `LeaseKeeper`; carrying requests and pages belongs to `grpc_source.py` and `in_process.py`.
"""

from __future__ import annotations

from typing import Protocol

from duopool.core.messages import ReadBlocks, SourceDescription, Validate, Verdict
from duopool.core.types import Incarnation, LeaseId
from duopool.engine.transfer.page_store import PageStore
from duopool.engine.transfer.transport import LeaseKeeper


class RemoteReadable(Protocol):
    """An agent that has registered the pages, so that others may read them one-sidedly."""

    @property
    def agent_metadata(self) -> bytes: ...


class KvSource:
    """Answers the questions of decode workers. Any thread; each call takes only a moment."""

    def __init__(
        self, *, keeper: LeaseKeeper, store: PageStore, incarnation: Incarnation, nixl: RemoteReadable | None = None
    ) -> None:
        self.store = store
        self._keeper = keeper
        self._incarnation = incarnation
        self._nixl = nixl

    def describe(self, transport: str) -> SourceDescription:
        """How the pages can be read; without agent metadata or shared memory only as bytes on a stream."""
        metadata = self._nixl.agent_metadata if transport == "nixl" and self._nixl is not None else b""
        return SourceDescription(
            incarnation=self._incarnation,
            layout_digest=self.store.digest,
            num_blocks=self.store.num_blocks,
            page_bytes=self.store.page_bytes,
            base_address=self.store.base_address if metadata else 0,
            agent_metadata=metadata,
            memory=self.store.shared_memory if transport == "shared_memory" else None,
        )

    def begin_read(self, read: ReadBlocks) -> str:
        """Count a read; the answer is a refusal or empty, and then `end_read` must follow."""
        if read.incarnation != self._incarnation:
            return self._other_life(read.incarnation)
        for block in read.blocks:
            if not 0 <= block.block_id < self.store.num_blocks:
                return f"block {block.block_id} is outside the store of {self.store.num_blocks}"
        return self._keeper.begin_read(read)

    def end_read(self, lease_id: LeaseId) -> None:
        """A read that was begun is over, well or not."""
        self._keeper.end_read(lease_id)

    def validate(self, validate: Validate) -> Verdict:
        """Whether the lease still held until now."""
        if validate.incarnation != self._incarnation:
            return Verdict(ok=False, reason=self._other_life(validate.incarnation))
        return self._keeper.validate(validate)

    def _other_life(self, incarnation: Incarnation) -> str:
        return f"this is incarnation {self._incarnation:016x}, not {incarnation:016x}"
