"""What a worker does by itself for a request: it gives blocks, computes, decodes, and gives up what fell silent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import model_decode as decode
import model_prefill as prefill
from model_decode import DecodeSide
from model_prefill import PrefillSide
from model_setting import Setting
from model_station import Move, Station, say


def moves(station: Station, setting: Setting) -> Iterator[Move]:
    """All steps of a worker that need nobody else, but that it gives blocks."""
    if isinstance(station.side, PrefillSide):
        yield from _prefill_moves(station, station.side, setting)
    else:
        yield from _decode_moves(station, station.side, setting)


def admissions(station: Station, setting: Setting) -> Iterator[tuple[str, Station]]:
    """Whoever waits for room there finds it."""
    side, guards = station.side, setting.guards
    table = side.current
    if table is None:
        return
    label = f"{side.worker_id} gives blocks to attempt {table.attempt}"
    if isinstance(side, DecodeSide):
        if decode.wants_blocks(side, guards):
            yield label, say(station, *decode.admit(side, guards), is_silent=table.is_silent)
    elif table.phase == "waiting":
        yield label, say(station, prefill.admit(side), ())


def overwritten(station: Station) -> Station:
    """The station after another request took the room that is free there."""
    side = station.side
    if not isinstance(side, PrefillSide) or side.left is None:
        return station
    return replace(station, side=replace(side, left=None))


def num_held(station: Station) -> int:
    """Tables that have blocks here."""
    side = station.side
    return prefill.num_held(side) if isinstance(side, PrefillSide) else decode.num_held(side)


def _prefill_moves(station: Station, side: PrefillSide, setting: Setting) -> Iterator[Move]:
    table, name = side.current, side.worker_id
    if table is None:
        return
    if table.phase in ("waiting", "filling") and table.is_silent:
        # Steps that nobody hears of make no difference.
        if setting.guards.orphan_ttl:
            yield (
                f"{name} gives attempt {table.attempt} up: its router is silent",
                0,
                say(station, prefill.end(side), ()),
            )
    elif table.phase == "filling":
        after, said = prefill.compute(side)
        what = f"{name} computes block {table.num_listed} for attempt {table.attempt}"
        yield what, 0, say(station, after, said, is_silent=table.is_silent)
    if table.phase == "leased" and not setting.guards.lease_pins:
        yield (
            f"{name} gives the leased blocks of attempt {table.attempt} to others",
            0,
            say(station, prefill.unpin(side), ()),
        )


def expiry(station: Station, setting: Setting) -> Station | None:
    """The station after its lease ran out; None if none stands."""
    side = station.side
    if not isinstance(side, PrefillSide) or not setting.guards.lease_ttl or side.current is None:
        return None
    if side.current.phase not in ("leased", "unpinned"):
        return None
    return say(station, prefill.expire(side), ())


def _decode_moves(station: Station, side: DecodeSide, setting: Setting) -> Iterator[Move]:
    table, name, guards = side.current, side.worker_id, setting.guards
    for one in side.reads:
        if "read" in setting.faults:
            after, said = decode.read_ended(side, one, "", "broken", guards)
            yield f"a read of {name} breaks", 1, say(station, after, said)
            if not guards.digest:
                after, said = decode.read_ended(side, one, "other", "", guards)
                yield f"a page is damaged on its way to {name}", 1, say(station, after, said)
    if table is None:
        return
    if table.phase == "running" and not table.is_silent:
        after, said = decode.decode(side)
        yield f"{name} decodes attempt {table.attempt}", 0, say(station, after, said, is_silent=table.is_silent)
    if "validate" in setting.faults and table.question is not None and table.question_to is not None:
        after, said = decode.take_verdict(side, decode.Verdict(ok=False, reason="timeout"), guards)
        gone = say(station, after, said, is_silent=table.is_silent)
        question = (table.question_to, table.question)
        yield f"{name} waits in vain for a verdict", 1, gone
        yield (
            f"{name} waits in vain for a verdict, its question is late",
            1,
            replace(gone, late_questions=(*gone.late_questions, question)),
        )
    if table.is_silent and guards.orphan_ttl:
        after, said = decode.end(side, guards)
        yield f"{name} gives attempt {table.attempt} up: its router is silent", 0, say(station, after, ())
