"""A decode worker's bookkeeping for one request, as values: what `decode_worker/worker.py` does around the slot.

Decisions about the handoff and late commands are the production ones (`core/handoff/slot.py`, `engine/arrivals.py`).
A read writes all its blocks at the moment it ends: an earlier write into blocks of the same table makes no difference.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from model_arrivals import missing, nack, standing
from model_prefill import block_of
from model_setting import NUM_BLOCKS, NUM_TOKENS, REQUEST_ID, WRONG_TOKEN, Guards, Violation, token_at

from duopool.core.handoff import slot as slots
from duopool.core.handoff.slot import Slot, SlotEvent
from duopool.core.messages import (
    BlocksReady,
    Cancel,
    Command,
    Heartbeat,
    Joined,
    LeaseRef,
    Nack,
    NackReason,
    Reserve,
    Reserved,
    Tokens,
    Validate,
    Verdict,
)
from duopool.core.types import FinishReason, WorkerId
from duopool.engine.arrivals import Standing


@dataclass(frozen=True, slots=True)
class OpenRead:
    """A read that may still write."""

    read: slots.Read
    attempt: int
    is_served: bool = False
    """P has begun to send (gRPC)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeTable:
    """One attempt on a decode worker."""

    attempt: int
    phase: str = "waiting"
    slot: Slot | None
    """None when the prefix is computed here."""
    output: tuple[int, ...]
    content: tuple[str, ...] = ("empty",) * NUM_BLOCKS
    """What is in the blocks: empty, sealed (what P promised) or other."""
    question: Validate | None = None
    """Asked of P and not answered."""
    question_to: WorkerId | None = None
    is_silent: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSide:
    """One life of a decode worker."""

    worker_id: WorkerId
    current: DecodeTable | None = None
    ended: tuple[DecodeTable, ...] = ()
    """Quarantined: reads may still write into their blocks."""
    reads: tuple[OpenRead, ...] = ()
    buried: int = 0


Said = tuple[Reserved | Joined | Tokens | Nack, ...]
Step = tuple[DecodeSide, Said]


def hear(side: DecodeSide, command: Command, guards: Guards, *, busy: bool = False) -> Step:
    """A command arrives."""
    match command:
        case Reserve(request=request, attempt=attempt, local_prefill=local_prefill):
            known = side.current
            judged = standing(guards, side.buried, attempt, None if known is None else known.attempt)
            if known is not None and judged is Standing.AGAIN:
                side = replace(side, current=replace(known, is_silent=False))
                return side, (_reserved(attempt),) if known.phase != "waiting" else ()
            if judged is Standing.STALE:
                return side, (nack(attempt, NackReason.STALE),)
            if judged is Standing.OVER:
                return side, ()
            side, _ = end(side, guards)
            if busy:
                return side, (nack(attempt, NackReason.BUSY),)
            slot = None if local_prefill else Slot(attempt=attempt)
            table = DecodeTable(attempt=attempt, slot=slot, output=request.output_token_ids)
            return replace(side, current=table), ()
        case BlocksReady(attempt=attempt):
            table = side.current
            if table is None or table.attempt < attempt:
                if standing(guards, side.buried, attempt, None) is not Standing.NEW:
                    return side, ()
                return replace(side, buried=attempt), (nack(attempt, NackReason.TRANSFER_FAILED),)
            if table.slot is None or table.attempt != attempt:
                return side, ()
            return _advance(side, slots.Listed(command), guards)
        case Cancel(attempt=attempt):
            said: Said = ()
            if side.current is not None and side.current.attempt <= attempt:
                side, said = end(side, guards)
            return replace(side, buried=max(side.buried, attempt)), said
        case Heartbeat():
            gone = missing(side.buried, None if side.current is None else side.current.attempt, command)
            side = replace(side, buried=max((side.buried, *gone)))
            return side, tuple(nack(attempt, NackReason.UNKNOWN) for attempt in gone)
        case _:
            return side, ()


def end(side: DecodeSide, guards: Guards) -> Step:
    """The present attempt is over, wherever it is."""
    table = side.current
    if table is None:
        return side, ()
    if table.slot is None:
        return replace(side, current=None, buried=max(side.buried, table.attempt)), ()
    return _advance(side, slots.Dropped(), guards)


def admit(side: DecodeSide, guards: Guards) -> Step:
    """There is head-room: the table gets its blocks."""
    table = side.current
    assert table is not None
    assert table.phase == "waiting"
    if table.slot is None:
        table = replace(table, phase="running")
        return replace(side, current=table), (_reserved(table.attempt),)
    side = replace(side, current=replace(table, phase="pulling"))
    blocks = tuple(block_of(table.attempt, index) for index in range(NUM_BLOCKS))
    side, said = _advance(side, slots.Granted(blocks, 0), guards)
    return side, (_reserved(table.attempt), *said)


def wants_blocks(side: DecodeSide, guards: Guards) -> bool:
    """Whether somebody waits for room who has a use for it."""
    table = side.current
    if table is None or table.phase != "waiting":
        return False
    return table.slot is None or table.slot.wants_blocks or not guards.listed_first


def num_held(side: DecodeSide) -> int:
    """Tables that have blocks."""
    return len(side.ended) + (side.current is not None and side.current.phase != "waiting")


def decode(side: DecodeSide) -> Step:
    """One step of the batch."""
    table = side.current
    assert table is not None
    index = len(table.output)
    is_right = all(one == token_at(i) for i, one in enumerate(table.output))
    token = token_at(index) if is_right else WRONG_TOKEN
    is_last = index + 1 == NUM_TOKENS
    tokens = Tokens(
        request_id=REQUEST_ID,
        attempt=table.attempt,
        index=index,
        token_ids=(token,),
        finish_reason=FinishReason.LENGTH if is_last else None,
    )
    if is_last:
        return replace(side, current=None, buried=max(side.buried, table.attempt)), (tokens,)
    return replace(side, current=replace(table, output=(*table.output, token))), (tokens,)


def read_ended(side: DecodeSide, one: OpenRead, content: str, error: str, guards: Guards) -> Step:
    """A read writes what it found and is over."""
    side = replace(side, reads=tuple(other for other in side.reads if other is not one))
    tables = (() if side.current is None else (side.current,)) + side.ended
    table = next((table for table in tables if table.attempt == one.attempt), None)
    if table is None or table.slot is None:
        raise Violation(f"a read writes into blocks that {side.worker_id} has given back")
    if content:
        written = list(table.content)
        for target in one.read.targets:
            written[target % 10] = content
        table = replace(table, content=tuple(written))
    if side.current is not None and side.current.attempt == one.attempt:
        return _advance(replace(side, current=table), slots.ReadEnded(error), guards)
    slot, actions = slots.transition(table.slot, slots.ReadEnded(error))
    rest = tuple(other for other in side.ended if other.attempt != one.attempt)
    if any(isinstance(action, slots.GiveBack) for action in actions):
        return replace(side, ended=rest), ()
    return replace(side, ended=(*rest, replace(table, slot=slot))), ()


def served(side: DecodeSide, one: OpenRead) -> DecodeSide:
    """P has begun to send."""
    return replace(side, reads=tuple(replace(o, is_served=True) if o is one else o for o in side.reads))


def num_served(side: DecodeSide, worker_id: str, lease_id: int) -> int:
    """Reads of a lease that this worker still listens to."""
    leases = [one.read.lease for one in side.reads if one.is_served]
    return sum(lease.worker_id == worker_id and lease.lease_id == lease_id for lease in leases)


def take_verdict(side: DecodeSide, verdict: Verdict, guards: Guards) -> Step:
    """P's answer, or the end of waiting for it, arrives."""
    assert side.current is not None
    side = replace(side, current=replace(side.current, question=None, question_to=None))
    return _advance(side, slots.Validated(verdict.ok, verdict.reason), guards)


def fall_silent(side: DecodeSide) -> DecodeSide:
    """The session of whatever is here ended."""
    return side if side.current is None else replace(side, current=replace(side.current, is_silent=True))


def is_empty(side: DecodeSide) -> bool:
    return side.current is None and not side.ended and not side.reads


def _advance(side: DecodeSide, event: SlotEvent, guards: Guards) -> Step:
    """Let the present attempt's slot see an event and do what it wants."""
    table = side.current
    assert table is not None
    assert table.slot is not None
    slot = table.slot
    if isinstance(event, slots.Dropped) and not guards.quarantine:
        slot = replace(slot, num_reads=0)
    slot, actions = slots.transition(slot, event)
    table = replace(table, slot=slot)
    said: list[Reserved | Joined | Tokens | Nack] = []
    over = isinstance(event, slots.Dropped)
    gives_back = False
    for action in actions:
        match action:
            case slots.Read():
                side = replace(side, reads=(*side.reads, OpenRead(action, table.attempt)))
            case slots.Confirm(lease=lease) if guards.validate_after_read:
                table = replace(table, question=_question(lease, table.attempt), question_to=lease.worker_id)
            case slots.Confirm():
                side, said_too = _advance(replace(side, current=table), slots.Validated(True), guards)
                return side, (*said, *said_too)
            case slots.Join(first_token=first_token):
                if table.content != ("sealed",) * NUM_BLOCKS:
                    raise Violation(f"{side.worker_id} joins on blocks that hold {' and '.join(table.content)}")
                output = table.output + first_token.token_ids
                table = DecodeTable(
                    attempt=table.attempt, phase="running", slot=None, output=output, is_silent=table.is_silent
                )
                said.append(
                    Joined(
                        request_id=REQUEST_ID,
                        attempt=table.attempt,
                        num_pulled_blocks=0,
                        num_pulled_bytes=0,
                        transfer_s=0.0,
                    )
                )
            case slots.Refuse(reason=reason):
                said.append(nack(table.attempt, reason))
                over = True
            case slots.GiveBack():
                gives_back = True
    if not over:
        return replace(side, current=table), tuple(said)
    ended = side.ended if gives_back else (*side.ended, replace(table, question=None, question_to=None))
    return replace(side, current=None, ended=ended, buried=max(side.buried, table.attempt)), tuple(said)


def _question(lease: LeaseRef, attempt: int) -> Validate:
    return Validate(lease_id=lease.lease_id, incarnation=lease.incarnation, attempt=attempt, release=True)


def _reserved(attempt: int) -> Reserved:
    return Reserved(request_id=REQUEST_ID, attempt=attempt, num_cached_tokens=0)


def check(side: DecodeSide) -> None:
    """Tables are distinct; ended ones are kept for a reason."""
    attempts = [one.attempt for one in ((side.current,) if side.current else ()) + side.ended]
    if len(set(attempts)) != len(attempts):
        raise Violation(f"{side.worker_id} holds the blocks of attempt {attempts[0]} twice")
    for table in side.ended:
        if table.slot is None or table.slot.num_reads != sum(one.attempt == table.attempt for one in side.reads):
            raise Violation(f"{side.worker_id} counts reads that it does not have")
