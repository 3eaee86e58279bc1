"""Which requests' blocks are leased, and what other workers may do with them.

Owns the table of leases and every change of one, by the pure functions of `core/handoff/lease.py`. Blocks are freed and
requests are ended by the worker: here it learns whether it may. Not thread-safe; the worker's lock covers it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from duopool.core.handoff import lease as transitions
from duopool.core.handoff.lease import Lease
from duopool.core.kv_manager import KVCacheManager
from duopool.core.messages import LeaseRef, ReadBlocks, SealedBlock, Validate, Verdict
from duopool.core.types import Incarnation, LeaseId, RequestId, WorkerId


class Holder(Protocol):
    """Whose blocks a lease is about."""

    attempt: int
    """The attempt that may read them."""
    lease: Lease | None

    @property
    def request_id(self) -> RequestId: ...


HolderT = TypeVar("HolderT", bound=Holder)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceIdentity:
    """Who this worker is to those that read from it."""

    worker_id: WorkerId
    incarnation: Incarnation
    source_address: str
    """host:port of the KV source service."""


class LeaseBook(Generic[HolderT]):
    """Leases by their ids; each is the `lease` of its holder."""

    def __init__(
        self,
        identity: SourceIdentity,
        *,
        manager: KVCacheManager,
        new_lease_id: Callable[[], LeaseId],
        ttl_s: float,
    ) -> None:
        self._identity = identity
        self._manager = manager
        self._new_lease_id = new_lease_id
        self._ttl_s = ttl_s
        self._holders: dict[LeaseId, HolderT] = {}
        """Those included whose revoked lease still has readers."""

    def __len__(self) -> int:
        return len(self._holders)

    @property
    def holders(self) -> tuple[HolderT, ...]:
        return tuple(self._holders.values())

    def holder(self, lease_id: LeaseId) -> HolderT | None:
        return self._holders.get(lease_id)

    # ---- the worker's side ---------------------------------------------------------------------------------------

    def seal(self, holder: HolderT, blocks: tuple[SealedBlock, ...], *, now: float) -> LeaseRef:
        """Put blocks under the request's lease, which is made now or lives on; returns how others name it."""
        lease = holder.lease
        if lease is None:
            lease = Lease(
                lease_id=self._new_lease_id(),
                request_id=holder.request_id,
                attempt=holder.attempt,
                expires_at=now + self._ttl_s,
            )
            self._holders[lease.lease_id] = holder
        else:
            lease = transitions.extend(lease, now=now, ttl_s=self._ttl_s)
        holder.lease = transitions.seal(lease, blocks)
        return LeaseRef(
            lease_id=lease.lease_id,
            worker_id=self._identity.worker_id,
            incarnation=self._identity.incarnation,
            source_address=self._identity.source_address,
        )

    def extend(self, holder: HolderT, *, now: float) -> None:
        """Somebody still wants the blocks."""
        if holder.lease is not None:
            holder.lease = transitions.extend(holder.lease, now=now, ttl_s=self._ttl_s)

    def rebind(self, holder: HolderT, lease_id: LeaseId, attempt: int) -> bool:
        """Hand the request and its lease to a newer attempt; False if it does not hold this lease."""
        if holder.lease is None or holder.lease.lease_id != lease_id:
            return False
        holder.lease = transitions.rebind(holder.lease, attempt)
        holder.attempt = holder.lease.attempt
        return True

    def has_expired(self, holder: HolderT, *, now: float) -> bool:
        return holder.lease is not None and transitions.expire(holder.lease, now=now).revoked

    def revoke(self, holder: HolderT) -> None:
        """Nothing may be read any more; reads that have begun go on."""
        if holder.lease is not None:
            holder.lease = transitions.revoke(holder.lease)

    def close(self, holder: HolderT) -> bool:
        """Strike a lease out once it is revoked and unread; True if none stands against freeing the blocks."""
        if holder.lease is None:
            return True
        if holder.lease.may_be_freed:
            self._holders.pop(holder.lease.lease_id, None)
        return holder.lease.may_be_freed

    # ---- the readers' side ---------------------------------------------------------------------------------------

    def begin_read(self, read: ReadBlocks, *, now: float) -> str:
        """Count a read that this process serves itself; the answer is a refusal or empty."""
        holder = self._holders.get(read.lease_id)
        refusal = self._why_not(holder, read.incarnation, read.attempt, now=now)
        if refusal or holder is None or holder.lease is None:
            return refusal
        if not set(read.blocks) <= set(holder.lease.blocks):
            return "a block is not under this lease"
        holder.lease = transitions.begin_read(holder.lease)
        return ""

    def end_read(self, lease_id: LeaseId) -> HolderT | None:
        """The counted read has ended; returns whose blocks it read."""
        holder = self._holders.get(lease_id)
        if holder is not None and holder.lease is not None:
            holder.lease = transitions.end_read(holder.lease)
        return holder

    def validate(self, validate: Validate, *, now: float) -> Verdict:
        """Whether the lease still holds for this attempt and every generation is unchanged."""
        holder = self._holders.get(validate.lease_id)
        refusal = self._why_not(holder, validate.incarnation, validate.attempt, now=now)
        if refusal or holder is None or holder.lease is None:
            return Verdict(ok=False, reason=refusal)
        for sealed in holder.lease.blocks:
            if self._manager.generation(sealed.block_id) != sealed.generation:
                return Verdict(ok=False, reason=f"block {sealed.block_id} has been given to another request")
        return Verdict(ok=True)

    def check(self) -> None:
        """Raise AssertionError unless every lease is filed under its own id and its blocks are what they were."""
        for lease_id, holder in self._holders.items():
            assert holder.lease is not None
            assert holder.lease.lease_id == lease_id
            for sealed in holder.lease.blocks:
                assert self._manager.generation(sealed.block_id) == sealed.generation

    def _why_not(self, holder: HolderT | None, incarnation: Incarnation, attempt: int, *, now: float) -> str:
        if incarnation != self._identity.incarnation:
            return "the lease is of another incarnation"
        lease = None if holder is None else holder.lease
        return transitions.refusal(lease, attempt=attempt, now=now)
