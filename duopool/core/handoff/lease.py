"""P's side of the handoff: one lease's life as pure functions of `(lease, event, now)`.

A lease keeps a request's sealed blocks readable until it is released or its time runs out, whatever messages are lost.
With one-sided reads P never sees a read begin, so freeing is always allowed and the reader must ask `validate` after
its read; reads that P serves itself (`grpc`) are counted, and a revoked lease is freed only when they have ended.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from duopool.core.messages import SealedBlock
from duopool.core.types import LeaseId, RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """P's promise to keep sealed blocks readable for one attempt of one request."""

    lease_id: LeaseId
    request_id: RequestId
    attempt: int
    """Fence: a read or validate with another attempt is refused; Rebind raises it."""
    blocks: tuple[SealedBlock, ...] = ()
    expires_at: float
    num_readers: int = 0
    revoked: bool = False

    @property
    def may_be_freed(self) -> bool:
        return self.revoked and self.num_readers == 0


def extend(lease: Lease, *, now: float, ttl_s: float) -> Lease:
    """A heartbeat named the lease. A revoked lease stays revoked."""
    return lease if lease.revoked else replace(lease, expires_at=max(lease.expires_at, now + ttl_s))


def seal(lease: Lease, blocks: tuple[SealedBlock, ...]) -> Lease:
    """More blocks are finished and belong to the promise."""
    return replace(lease, blocks=lease.blocks + blocks)


def rebind(lease: Lease, attempt: int) -> Lease:
    """Hand the lease to a newer attempt; an older one never takes it back."""
    return replace(lease, attempt=max(lease.attempt, attempt))


def revoke(lease: Lease) -> Lease:
    """Released, cancelled or out of time: no new reads, and validates fail."""
    return replace(lease, revoked=True)


def expire(lease: Lease, *, now: float) -> Lease:
    """Revoke the lease if its time has come."""
    return revoke(lease) if now >= lease.expires_at else lease


def refusal(lease: Lease | None, *, attempt: int, now: float) -> str:
    """Why a read or validate is refused, or an empty string. Time counts even before the sweep has seen it."""
    if lease is None:
        return "unknown lease"
    if lease.revoked or now >= lease.expires_at:
        return "lease expired"
    if attempt != lease.attempt:
        return f"lease is bound to attempt {lease.attempt}, not {attempt}"
    return ""


def begin_read(lease: Lease) -> Lease:
    return replace(lease, num_readers=lease.num_readers + 1)


def end_read(lease: Lease) -> Lease:
    return replace(lease, num_readers=lease.num_readers - 1)
