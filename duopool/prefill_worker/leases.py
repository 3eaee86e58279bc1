"""Which prompts are leased, and what decode workers may do with their blocks.

Owns the table of leases and every change of one, by the pure functions of `core/handoff/lease.py`. Blocks are freed and
requests are ended by the worker: here it learns whether it may. Not thread-safe; the worker's lock covers it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from duopool.core.handoff import lease as transitions
from duopool.core.handoff.lease import Lease
from duopool.core.kv_manager import KVCacheManager
from duopool.core.messages import LeaseRef, ReadBlocks, SealedBlock, Validate, Verdict
from duopool.core.types import Incarnation, LeaseId, WorkerId
from duopool.prefill_worker.prefill_request import PrefillPhase, PrefillRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceIdentity:
    """Who this worker is to decode workers."""

    worker_id: WorkerId
    incarnation: Incarnation
    source_address: str
    """host:port of the KV source service."""


class LeaseBook:
    """Leases by their ids; each is the `lease` of the request that holds it."""

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
        self._holders: dict[LeaseId, PrefillRequest] = {}
        """Those included whose revoked lease still has readers."""

    def __len__(self) -> int:
        return len(self._holders)

    @property
    def holders(self) -> tuple[PrefillRequest, ...]:
        return tuple(self._holders.values())

    def holder(self, lease_id: LeaseId) -> PrefillRequest | None:
        return self._holders.get(lease_id)

    # ---- the worker's side ---------------------------------------------------------------------------------------

    def seal(self, request: PrefillRequest, blocks: tuple[SealedBlock, ...], *, now: float) -> LeaseRef:
        """Put blocks under the request's lease, which is made now or lives on; returns how others name it."""
        lease = request.lease
        if lease is None:
            lease = Lease(
                lease_id=self._new_lease_id(),
                request_id=request.request_id,
                attempt=request.attempt,
                expires_at=now + self._ttl_s,
            )
            self._holders[lease.lease_id] = request
        else:
            lease = transitions.extend(lease, now=now, ttl_s=self._ttl_s)
        request.lease = transitions.seal(lease, blocks)
        return LeaseRef(
            lease_id=lease.lease_id,
            worker_id=self._identity.worker_id,
            incarnation=self._identity.incarnation,
            source_address=self._identity.source_address,
        )

    def extend(self, request: PrefillRequest, *, now: float) -> None:
        """Somebody still wants the blocks."""
        if request.lease is not None:
            request.lease = transitions.extend(request.lease, now=now, ttl_s=self._ttl_s)

    def rebind(self, request: PrefillRequest, lease_id: LeaseId, attempt: int) -> bool:
        """Hand the request and its lease to a newer attempt; False if it does not hold this lease."""
        if request.lease is None or request.lease.lease_id != lease_id:
            return False
        request.lease = transitions.rebind(request.lease, attempt)
        request.attempt = request.lease.attempt
        return True

    def has_expired(self, request: PrefillRequest, *, now: float) -> bool:
        return request.lease is not None and transitions.expire(request.lease, now=now).revoked

    def revoke(self, request: PrefillRequest) -> None:
        """Nothing may be read any more; reads that have begun go on."""
        if request.lease is not None:
            request.lease = transitions.revoke(request.lease)

    def close(self, request: PrefillRequest) -> bool:
        """Strike a lease out once it is revoked and unread; True if none stands against freeing the blocks."""
        if request.lease is None:
            return True
        if request.lease.may_be_freed:
            self._holders.pop(request.lease.lease_id, None)
        return request.lease.may_be_freed

    # ---- the decode workers' side --------------------------------------------------------------------------------

    def begin_read(self, read: ReadBlocks, *, now: float) -> str:
        """Count a read that this process serves itself; the answer is a refusal or empty."""
        request = self._holders.get(read.lease_id)
        refusal = self._why_not(request, read.incarnation, read.attempt, now=now)
        if refusal or request is None or request.lease is None:
            return refusal
        if not set(read.blocks) <= set(request.lease.blocks):
            return "a block is not under this lease"
        request.lease = transitions.begin_read(request.lease)
        return ""

    def end_read(self, lease_id: LeaseId) -> PrefillRequest | None:
        """The counted read has ended; returns whose blocks it read."""
        request = self._holders.get(lease_id)
        if request is not None and request.lease is not None:
            request.lease = transitions.end_read(request.lease)
        return request

    def validate(self, validate: Validate, *, now: float) -> Verdict:
        """Whether the lease still holds for this attempt and every generation is unchanged."""
        request = self._holders.get(validate.lease_id)
        refusal = self._why_not(request, validate.incarnation, validate.attempt, now=now)
        if refusal or request is None or request.lease is None:
            return Verdict(ok=False, reason=refusal)
        for sealed in request.lease.blocks:
            if self._manager.generation(sealed.block_id) != sealed.generation:
                return Verdict(ok=False, reason=f"block {sealed.block_id} has been given to another request")
        return Verdict(ok=True)

    def check(self) -> None:
        """Raise AssertionError unless every lease is filed under its own id and its blocks are held."""
        for lease_id, request in self._holders.items():
            assert request.lease is not None
            assert request.lease.lease_id == lease_id
            assert self._manager.has(request.table)
            assert request.phase is not PrefillPhase.ENDED or request.lease.num_readers or request.is_in_step

    def _why_not(self, request: PrefillRequest | None, incarnation: Incarnation, attempt: int, *, now: float) -> str:
        if incarnation != self._identity.incarnation:
            return "the lease is of another incarnation"
        lease = None if request is None else request.lease
        return transitions.refusal(lease, attempt=attempt, now=now)
