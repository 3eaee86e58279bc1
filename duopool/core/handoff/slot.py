"""D's side of the handoff: how a request's slot gets its blocks, as a pure `(slot, event) -> (slot, actions)`.

    WAITING -> RESERVED -> READING -> VALIDATING -> COMMITTED
                              \\-> QUARANTINED -> GONE          (cancelled while a read may still write)

Owns the guard "validate after read": the slot commits only when every block was read, every digest matched and P
confirmed the lease afterwards. Blocks that a read may still write into are given back only when it has ended.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from duopool.core.messages import BlocksReady, LeaseRef, NackReason, SealedBlock, Tokens
from duopool.core.types import BlockId


class SlotPhase(StrEnum):
    WAITING = "waiting"
    """No head-room yet: it is taken only when P has sealed something, so that nobody keeps it while waiting for P."""
    RESERVED = "reserved"
    """Blocks are held; the source has sealed nothing that is still to be read."""
    READING = "reading"
    VALIDATING = "validating"
    COMMITTED = "committed"
    """The request belongs to the batch now; the slot's part is over."""
    QUARANTINED = "quarantined"
    GONE = "gone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One attempt of one request on its way into D's batch."""

    attempt: int
    is_moving: bool = False
    """The source decodes on: it must hear how far the copy is, and may list more than was reserved at first."""
    phase: SlotPhase = SlotPhase.WAITING
    blocks: tuple[BlockId, ...] = ()
    """The block table that was reserved; the first `num_cached_blocks` need no read."""
    num_cached_blocks: int = 0
    lease: LeaseRef | None = None
    sealed: tuple[SealedBlock, ...] = ()
    """All of P's blocks listed so far, from block 0."""
    num_requested: int = 0
    """Blocks whose read was started (or is not needed), from block 0."""
    num_reads: int = 0
    """Reads under way."""
    num_reported: int = -1
    """Of a moving request: leading blocks that the source knows to be here."""
    first_token: Tokens | None = None
    """Set when the source has listed its last block."""
    output: tuple[int, ...] = ()
    """Tokens before the first one that came with the last block."""
    first_tokens: tuple[Tokens, ...] = ()
    """Of a carrier: the first token of every choice, which came with the last block."""

    @property
    def wants_blocks(self) -> bool:
        """Blocks are taken here only once the source holds them: nobody keeps room here while it waits there."""
        return self.lease is not None


@dataclass(frozen=True, slots=True)
class Granted:
    """Head-room was found: the table's blocks, of which the first few hold their KV already."""

    blocks: tuple[BlockId, ...]
    num_cached_blocks: int


@dataclass(frozen=True, slots=True)
class Listed:
    """The source sealed some more blocks."""

    message: BlocksReady
    blocks: tuple[BlockId, ...] = ()
    """The whole block table, if there is one: it may have grown."""


@dataclass(frozen=True, slots=True)
class ReadEnded:
    """One read finished; `error` is empty if all its digests matched."""

    error: str = ""


@dataclass(frozen=True, slots=True)
class Validated:
    """P's verdict, or `ok=False` when it could not be reached."""

    ok: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Dropped:
    """Cancel, a newer attempt, an orphan's time limit: give everything back."""


SlotEvent = Granted | Listed | ReadEnded | Validated | Dropped


@dataclass(frozen=True, slots=True)
class Read:
    """Pull `sources` into `targets` and come back with ReadEnded."""

    lease: LeaseRef
    sources: tuple[SealedBlock, ...]
    targets: tuple[BlockId, ...]


@dataclass(frozen=True, slots=True)
class Confirm:
    """Ask P whether the lease held, releasing it if so, and come back with Validated."""

    lease: LeaseRef


@dataclass(frozen=True, slots=True)
class Join:
    """Publish the blocks and put the request into the batch behind its first token."""

    first_token: Tokens
    output: tuple[int, ...] = ()
    """Tokens before it that were not known when the slot was reserved."""
    first_tokens: tuple[Tokens, ...] = ()
    """Of a carrier: that of every choice."""


@dataclass(frozen=True, slots=True)
class Report:
    """Tell the source of a moving request that its first `num_blocks` blocks are here."""

    num_blocks: int


@dataclass(frozen=True, slots=True)
class GiveBack:
    """Free the slot's blocks: nothing writes into them any more."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """Tell the router that this attempt is over here."""

    reason: NackReason
    detail: str


SlotAction = Read | Confirm | Join | Report | GiveBack | Refuse
SlotStep = tuple[Slot, tuple[SlotAction, ...]]


def transition(slot: Slot, event: SlotEvent) -> SlotStep:
    """What the event makes of the slot. A COMMITTED or GONE slot is left as it is."""
    if slot.phase in (SlotPhase.COMMITTED, SlotPhase.GONE):
        return slot, ()
    match event:
        case Granted(blocks=blocks, num_cached_blocks=num_cached_blocks):
            if slot.phase is not SlotPhase.WAITING:
                return slot, ()
            slot = replace(
                slot,
                phase=SlotPhase.RESERVED,
                blocks=blocks,
                num_cached_blocks=num_cached_blocks,
                num_requested=num_cached_blocks,
            )
            return _advance(slot)
        case Listed(message=message, blocks=blocks):
            if slot.phase is SlotPhase.QUARANTINED:
                return slot, ()
            slot = replace(slot, blocks=blocks or slot.blocks)
            if message.first_block < len(slot.sealed) or slot.first_token is not None:
                return slot, ()
            if message.first_block > len(slot.sealed):
                fault = f"blocks before block {message.first_block} were never listed"
                return _drop(slot, Refuse(NackReason.TRANSFER_FAILED, fault))
            sealed = slot.sealed + message.blocks
            slot = replace(
                slot,
                lease=message.lease,
                sealed=sealed,
                first_token=message.first_token,
                output=message.output,
                first_tokens=message.first_tokens,
            )
            return _advance(slot)
        case ReadEnded(error=error):
            return _read_ended(replace(slot, num_reads=slot.num_reads - 1), error)
        case Validated(ok=ok, reason=reason):
            if slot.phase is not SlotPhase.VALIDATING or slot.first_token is None:
                return slot, ()
            if ok:
                return replace(slot, phase=SlotPhase.COMMITTED), (
                    Join(slot.first_token, slot.output, slot.first_tokens),
                )
            return _drop(slot, Refuse(NackReason.LEASE_LOST, reason))
        case Dropped():
            return _drop(slot, None)


def _advance(slot: Slot) -> SlotStep:
    """Start the read of what is listed and missing; with nothing left to read, ask P for its verdict."""
    lease = slot.lease
    if slot.phase is SlotPhase.WAITING or lease is None:
        return slot, ()
    begin, end = slot.num_requested, len(slot.sealed)
    if end > len(slot.blocks):
        fault = f"{end} blocks were listed, {len(slot.blocks)} are reserved"
        return _drop(slot, Refuse(NackReason.TRANSFER_FAILED, fault))
    if begin < end:
        read = Read(lease, slot.sealed[begin:end], slot.blocks[begin:end])
        slot = replace(slot, phase=SlotPhase.READING, num_requested=end, num_reads=slot.num_reads + 1)
        return slot, (read,)
    if slot.num_reads > 0 or slot.phase is SlotPhase.VALIDATING:
        return slot, ()
    if slot.first_token is not None:
        return replace(slot, phase=SlotPhase.VALIDATING), (Confirm(lease),)
    if slot.is_moving and end > slot.num_reported:
        return replace(slot, num_reported=end), (Report(end),)
    return slot, ()


def _read_ended(slot: Slot, error: str) -> SlotStep:
    if slot.phase is SlotPhase.QUARANTINED:
        if slot.num_reads > 0:
            return slot, ()
        return replace(slot, phase=SlotPhase.GONE), (GiveBack(),)
    if error:
        return _drop(slot, Refuse(NackReason.TRANSFER_FAILED, error))
    return _advance(slot)


def _drop(slot: Slot, refuse: Refuse | None) -> SlotStep:
    said: tuple[SlotAction, ...] = () if refuse is None else (refuse,)
    if slot.phase is SlotPhase.QUARANTINED:
        return slot, ()
    if slot.num_reads > 0:
        return replace(slot, phase=SlotPhase.QUARANTINED), said
    return replace(slot, phase=SlotPhase.GONE), (*said, GiveBack())
