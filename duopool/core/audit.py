"""Compares ledgers: each block in exactly one state, each request known on both sides. Pure; names what is wrong.

A router's view is taken twice: when the question is put behind the commands that were sent before, and when the
answer arrives behind the events that were said before. A session keeps its order, so what both views agree on must be
so in the ledger between them; what changed in between proves nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from duopool.core.handoff.request import Member, Phase
from duopool.core.handoff.request_state import must_be_on
from duopool.core.ledger import BlockLedger, Holder, Owner, WorkerLedger
from duopool.core.types import RequestId, WorkerId

ORPHAN_GRACE_S = 1.0
"""Timers act when the worker ticks, not at once."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong."""

    where: str
    """A worker's id, or `router`."""
    subject: str
    """The block, table, request or lease that it is about."""
    problem: str

    def __str__(self) -> str:
        return f"{self.where}: {self.subject} {self.problem}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestEntry:
    """A live request as its router sees it."""

    attempt: int
    phase: Phase
    prefill: Member | None
    decode: Member | None
    shadow: tuple[Member, int] | None = None
    """Who takes the request over, and under which attempt."""

    def must_be_on(self, member: Member) -> bool:
        """Whether the worker would have said so if it had dropped this attempt."""
        return must_be_on(member, phase=self.phase, prefill=self.prefill, decode=self.decode)


RouterView = Mapping[RequestId, RequestEntry]
"""All live requests of one router at one moment."""


def audit_worker(worker_id: WorkerId, ledger: WorkerLedger, *, orphan_limit_s: float) -> list[Finding]:
    """What the worker's ledger says against itself. `orphan_limit_s`: longest life without a router."""
    findings = [Finding(worker_id, *found) for found in (*_blocks(ledger.blocks), *_tables(ledger), *_leases(ledger))]
    for holder in ledger.holders:
        if holder.owner is Owner.GONE and holder.silent_s > orphan_limit_s + ORPHAN_GRACE_S:
            problem = f"lives without a router for {holder.silent_s:.1f} s, the limit is {orphan_limit_s:.1f} s"
            findings.append(Finding(worker_id, _name(holder), problem))
    if ledger.fault:
        findings.append(Finding(worker_id, "its own check", f"fails: {ledger.fault}"))
    return findings


def audit_requests(member: Member, ledger: WorkerLedger, before: RouterView, after: RouterView) -> list[Finding]:
    """Compare the asking router's requests with those of its that the worker holds."""
    found: list[tuple[str, str]] = []
    alive = [holder for holder in ledger.holders if holder.is_alive]
    for holder in alive:
        if holder.owner is Owner.ASKER and (problem := _misplaced(member, holder, before)):
            found.append((_name(holder), problem))
    held = {(holder.request_id, holder.attempt) for holder in alive}
    for request_id, entry in before.items():
        later = after.get(request_id)
        is_settled = later is not None and later.attempt == entry.attempt
        if not is_settled or later is None or not (entry.must_be_on(member) and later.must_be_on(member)):
            continue
        if (request_id, entry.attempt) not in held:
            found.append(
                (f"request {request_id}/{entry.attempt}", f"is {entry.phase} there for the router, unknown to it")
            )
    return [Finding(member.worker_id, *each) for each in found]


def audit_rest(worker_id: WorkerId, ledger: WorkerLedger) -> list[Finding]:
    """Everything that is held, for a system in which nothing should be."""
    findings = [
        Finding(worker_id, _name(holder), f"is {holder.phase} although all is over") for holder in ledger.holders
    ]
    blocks = ledger.blocks
    if len(blocks.free) + blocks.num_cached != blocks.num_blocks:
        counts = f"{len(blocks.free)} free + {blocks.num_cached} cached are not {blocks.num_blocks}"
        findings.append(Finding(worker_id, "blocks", counts))
    return findings


def _misplaced(member: Member, holder: Holder, before: RouterView) -> str:
    """Why this request has no business on the worker; empty if it has."""
    entry = before.get(holder.request_id)
    if entry is None:
        return f"is {holder.phase}, unknown to its router"
    if holder.attempt < entry.attempt:
        return f"is {holder.phase}, its router is at attempt {entry.attempt}"
    if holder.attempt > entry.attempt and entry.shadow != (member, holder.attempt):
        return f"is {holder.phase}, its router is only at attempt {entry.attempt}"
    if entry.phase is Phase.DECODING and member not in (entry.decode, None) and holder.lease is not None:
        return f"is {holder.phase}, although its decode worker has released it"
    return ""


def _blocks(blocks: BlockLedger) -> Iterator[tuple[str, str]]:
    """Free, cached or referenced: exactly one of these; and counts are what tables and pins add up to."""
    times_free = Counter(blocks.free)
    cached = set(blocks.cached)
    expected = Counter(blocks.pins)
    for table in blocks.tables.values():
        expected.update(table)
    for index in range(blocks.num_blocks):
        count, num_free = blocks.ref_counts.get(index, 0), times_free[index]  # type: ignore[call-overload, index]
        block = f"block {index}"
        if num_free > 1:
            yield block, f"stands {num_free} times in the free list"
        if num_free and count:
            yield block, f"is free and referenced {count} times"
        if num_free and index in cached:
            yield block, "is free and cached"
        if not num_free and not count and index not in cached:
            yield block, "is lost: neither free nor cached nor referenced"
        if count != expected[index]:  # type: ignore[index]
            yield block, f"is referenced {count} times, tables and pins hold it {expected[index]} times"  # type: ignore[index]
    for block_id in (*times_free, *cached, *expected):
        if not 0 <= block_id < blocks.num_blocks:
            yield f"block {block_id}", f"does not exist: there are {blocks.num_blocks}"


def _tables(ledger: WorkerLedger) -> Iterator[tuple[str, str]]:
    """Each table has one holder, and each holder that began has its table."""
    holders = Counter(holder.table for holder in ledger.holders)
    for table, block_ids in ledger.blocks.tables.items():
        if holders[table] != 1:
            yield f"table {table}", f"of {len(block_ids)} blocks has {holders[table]} holders"
        if len(set(block_ids)) != len(block_ids):
            yield f"table {table}", "names a block twice"
    for holder in ledger.holders:
        has_table = holder.table in ledger.blocks.tables
        if has_table == (holder.phase == "waiting"):
            yield _name(holder), f"is {holder.phase} and has {'a' if has_table else 'no'} table"
        if not holder.is_alive and not holder.is_in_step and not holder.num_reads:
            yield _name(holder), "has ended, and neither a step nor a read keeps its blocks"


def _leases(ledger: WorkerLedger) -> Iterator[tuple[str, str]]:
    """Each lease covers blocks of its holder's table, for its holder's attempt."""
    for holder in ledger.holders:
        lease = holder.lease
        if lease is None:
            if holder.phase == "leased":
                yield _name(holder), "is leased and has no lease"
            continue
        name = f"lease {lease.lease_id:x} of {_name(holder)}"
        if lease.is_revoked == holder.is_alive:
            yield name, "is revoked" if lease.is_revoked else "outlives its request"
        if lease.attempt != (holder.moves_to or holder.attempt):
            yield name, f"is bound to attempt {lease.attempt}"
        foreign = set(lease.blocks) - set(ledger.blocks.tables.get(holder.table, ()))
        if foreign:
            yield name, f"covers blocks that are not in its table: {sorted(foreign)}"


def _name(holder: Holder) -> str:
    return f"request {holder.request_id}/{holder.attempt}"
