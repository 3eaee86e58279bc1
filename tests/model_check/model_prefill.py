"""A prefill worker's bookkeeping for one request, as values: what `prefill_worker/worker.py` does around the lease.

Decisions about leases and late commands are the production ones (`core/handoff/lease.py`, `engine/arrivals.py`, which
asks `core/handoff/tombstones.py`). A table stands for the blocks of one attempt. Blocks that are not in a table may
belong to anybody: the search takes them as overwritten at once, which is the worst that any other request can do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from model_arrivals import missing, nack, standing
from model_setting import NUM_BLOCKS, NUM_TOKENS, REQUEST_ID, Guards, Setting, Violation, token_at

from duopool.core.handoff import lease as leases
from duopool.core.handoff.lease import Lease
from duopool.core.messages import (
    BlocksReady,
    Cancel,
    Command,
    Heartbeat,
    LeaseRef,
    Nack,
    NackReason,
    Prefill,
    Rebind,
    SealedBlock,
    Tokens,
    Validate,
    Verdict,
)
from duopool.core.types import BlockId, FinishReason, Incarnation, LeaseId, WorkerId
from duopool.engine.arrivals import Standing

FOREVER = 1e9
"""A lease's end that is not reached by itself; the search lets it expire where time may have passed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillTable:
    """One attempt on a prefill worker."""

    table: int
    """The attempt that took the blocks; a rebind leaves it as it is."""
    attempt: int
    phase: str = "filling"
    """waiting, if there may be no room, filling, leased; ended while it is read."""
    num_output: int
    """Tokens of the output that belong to the prefix."""
    num_listed: int = 0
    lease: Lease | None = None
    ready: tuple[BlocksReady, ...] = ()
    is_silent: bool = False
    """Its session ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillSide:
    """One life of a prefill worker."""

    worker_id: WorkerId
    incarnation: Incarnation
    current: PrefillTable | None = None
    ended: tuple[PrefillTable, ...] = ()
    """Revoked while a read was served."""
    pages_stay: bool = False
    """Blocks that nobody holds are overwritten when somebody takes them; else at once, the worst that others can do."""
    left: int | None = None
    """The table whose blocks were given back last and still hold what they held."""
    buried: int = 0
    """Attempts up to this one are over."""


Said = tuple[Command | BlocksReady | Nack, ...]
Step = tuple[PrefillSide, Said]


def hear(side: PrefillSide, command: Command, setting: Setting, *, busy: bool = False) -> Step:
    """A command arrives."""
    guards = setting.guards
    match command:
        case Prefill(request=request, attempt=attempt):
            known = side.current
            judged = standing(guards, side.buried, attempt, None if known is None else known.attempt)
            if known is not None and judged is Standing.AGAIN:
                return replace(side, current=replace(known, is_silent=False)), known.ready
            if judged is Standing.STALE:
                return side, (nack(attempt, NackReason.STALE),)
            if judged is Standing.OVER:
                return side, ()
            side = end(side)
            if busy:
                return side, (nack(attempt, NackReason.BUSY),)
            table = PrefillTable(
                table=attempt,
                attempt=attempt,
                num_output=len(request.output_token_ids),
                phase="filling" if setting.room is None else "waiting",
            )
            return replace(side, current=table), ()
        case Cancel(attempt=attempt):
            if side.current is not None and side.current.attempt <= attempt:
                side = end(side)
            return replace(side, buried=max(side.buried, attempt)), ()
        case Rebind(lease_id=lease_id, attempt=attempt):
            table = side.current
            if table is None or table.lease is None or table.lease.lease_id != lease_id:
                is_over = standing(guards, side.buried, attempt, None) in (Standing.OVER, Standing.STALE)
                return side, () if is_over else (nack(attempt, NackReason.LEASE_LOST),)
            lease = leases.rebind(table.lease, attempt)
            table = replace(table, lease=lease, attempt=lease.attempt, is_silent=False)
            return replace(side, current=table), ()
        case Heartbeat():
            gone = missing(side.buried, None if side.current is None else side.current.attempt, command)
            side = replace(side, buried=max((side.buried, *gone)))
            return side, tuple(nack(attempt, NackReason.UNKNOWN) for attempt in gone)
        case _:
            return side, ()


def end(side: PrefillSide) -> PrefillSide:
    """The present attempt is over: its blocks go unless a read is being served."""
    table = side.current
    if table is None:
        return side
    ended = side.ended
    if table.lease is not None and not (lease := leases.revoke(table.lease)).may_be_freed:
        ended = (*ended, replace(table, phase="ended", lease=lease, ready=()))
    elif side.pages_stay and table.phase != "waiting":
        side = replace(side, left=table.table)
    return replace(side, current=None, ended=ended, buried=max(side.buried, table.attempt))


def admit(side: PrefillSide) -> PrefillSide:
    """There is room: the table gets all its blocks."""
    assert side.current is not None
    assert side.current.phase == "waiting"
    return replace(side, current=replace(side.current, phase="filling"), left=None)


def num_held(side: PrefillSide) -> int:
    """Tables that have blocks."""
    return len(side.ended) + (side.current is not None and side.current.phase not in ("waiting", "unpinned"))


def compute(side: PrefillSide) -> Step:
    """A step ends: one more block of the prefix is finished."""
    table = side.current
    assert table is not None
    is_last = table.num_listed + 1 == NUM_BLOCKS
    finishes = is_last and table.num_output + 1 == NUM_TOKENS
    first_token = Tokens(
        request_id=REQUEST_ID,
        attempt=table.attempt,
        index=table.num_output,
        token_ids=(token_at(table.num_output),),
        finish_reason=FinishReason.LENGTH if finishes else None,
    )
    lease = table.lease or Lease(
        # Two lives may well use the same id, which is worse than production's random ones.
        lease_id=LeaseId(table.table),
        request_id=REQUEST_ID,
        attempt=table.attempt,
        expires_at=FOREVER,
    )
    sealed = () if finishes else (SealedBlock(block_of(table.table, table.num_listed), 1, 0),)
    lease = leases.seal(lease, sealed)
    message = BlocksReady(
        request_id=REQUEST_ID,
        attempt=table.attempt,
        lease=LeaseRef(
            lease_id=lease.lease_id,
            worker_id=side.worker_id,
            incarnation=side.incarnation,
            source_address="",
        ),
        first_block=table.num_listed,
        blocks=sealed,
        first_token=first_token if is_last else None,
    )
    table = replace(
        table,
        lease=lease,
        num_listed=table.num_listed + len(sealed),
        ready=(*table.ready, message),
        phase="leased" if is_last else "filling",
        is_silent=table.is_silent and not is_last,
    )
    side = replace(side, current=table)
    return (end(side) if finishes else side), (message,)


def expire(side: PrefillSide) -> PrefillSide:
    """The lease's time is over, and the sweep sees it."""
    table = side.current
    assert table is not None
    assert table.lease is not None
    assert leases.expire(table.lease, now=FOREVER).revoked
    return end(side)


def fall_silent(side: PrefillSide) -> PrefillSide:
    """The session of whatever is here ended."""
    if side.current is None or side.current.phase not in ("waiting", "filling"):
        return side
    return replace(side, current=replace(side.current, is_silent=True))


def begin_read(side: PrefillSide, lease_id: int, attempt: int, guards: Guards) -> PrefillSide | None:
    """P is asked to serve a read; None if it refuses."""
    table = side.current
    lease = None if table is None else table.lease
    if lease is not None and lease.lease_id != lease_id:
        lease = None
    if table is None or lease is None or leases.refusal(lease, attempt=attempt, now=0.0):
        return None
    if guards.reader_count:
        lease = leases.begin_read(lease)
    return replace(side, current=replace(table, lease=lease))


def end_read(side: PrefillSide, lease_id: int, guards: Guards) -> PrefillSide:
    """A served read is over."""
    if not guards.reader_count:
        return side
    ended = []
    for table in side.ended:
        assert table.lease is not None
        lease = table.lease
        if lease.lease_id == lease_id:
            lease = leases.end_read(lease)
        if not lease.may_be_freed:
            ended.append(replace(table, lease=lease))
        elif side.pages_stay:
            side = replace(side, left=table.table)
    table = side.current
    if table is not None and table.lease is not None and table.lease.lease_id == lease_id:
        table = replace(table, lease=leases.end_read(table.lease))
    return replace(side, current=table, ended=tuple(ended))


def readers(side: PrefillSide) -> list[tuple[int, int]]:
    """Leases with reads that are being served, and how many."""
    tables = side.ended if side.current is None else (side.current, *side.ended)
    leases_held = [table.lease for table in tables if table.lease is not None]
    return [(int(lease.lease_id), lease.num_readers) for lease in leases_held if lease.num_readers]


def validate(side: PrefillSide, asked: Validate, guards: Guards) -> tuple[PrefillSide, Verdict]:
    """P's verdict on a lease, which it releases if it is good."""
    if side.incarnation != asked.incarnation:
        # Without the check, another request's lease of the new life may have this id and attempt.
        return side, Verdict(ok=not guards.incarnation_check, reason="another life")
    table = side.current
    lease = None if table is None else table.lease
    if lease is not None and lease.lease_id != asked.lease_id:
        lease = None
    attempt = asked.attempt if guards.lease_fence or lease is None else lease.attempt
    refused = leases.refusal(lease, attempt=attempt, now=0.0)
    if refused or table is None:
        return side, Verdict(ok=False, reason=refused)
    if asked.attempt < table.attempt:
        raise Violation(
            f"{side.worker_id} gives attempt {asked.attempt} the blocks that attempt {table.attempt} has now"
        )
    if table.phase == "unpinned" and side.left != table.table and guards.generation_check:
        return side, Verdict(ok=False, reason="another generation")
    return (end(side) if table.phase in ("leased", "unpinned") else side), Verdict(ok=True)


def unpin(side: PrefillSide) -> PrefillSide:
    """Without `lease_pins`: the blocks go to others while the lease stands."""
    table = side.current
    assert table is not None
    return replace(side, current=replace(table, phase="unpinned"), left=table.table if side.pages_stay else None)


def holds(side: PrefillSide, table: int) -> bool:
    """Whether blocks that were listed from this table still hold what was sealed."""
    if side.left == table:
        return True
    tables = side.ended if side.current is None else (side.current, *side.ended)
    return any(one.table == table and one.phase != "unpinned" for one in tables)


def is_empty(side: PrefillSide) -> bool:
    return side.current is None and not side.ended


def block_of(table: int, index: int) -> BlockId:
    return BlockId(10 * table + index)


def table_of(block: BlockId) -> int:
    return block // 10


def check(side: PrefillSide) -> None:
    """Tables are distinct and counts are sound."""
    tables = [one.table for one in ((side.current,) if side.current else ()) + side.ended]
    if len(set(tables)) != len(tables):
        raise Violation(f"{side.worker_id} holds the blocks of attempt {tables[0]} twice")
    for one in side.ended:
        if one.lease is None or one.lease.num_readers < 1:
            raise Violation(f"{side.worker_id} keeps blocks that nobody reads")
