"""Steps of a prefill and a decode worker together: reads, and questions whether a lease held.

A read writes what it found at the moment it ends. With one-sided reads P does not notice; a read that P serves begins
and ends there too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import model_decode as decode
import model_prefill as prefill
from model_decode import DecodeSide
from model_prefill import PrefillSide
from model_setting import Setting, Violation
from model_station import Station, say

from duopool.core.types import WorkerId

Transfer = tuple[str, Station, Station]
"""What happens, and what decode and prefill worker are then."""

AWAITED = -1
"""Stands for the question whose answer is waited for; others are late ones, by their place among these."""


def open_reads(station: Station) -> list[tuple[int, WorkerId]]:
    """Reads under way, and where from."""
    side = station.side
    assert isinstance(side, DecodeSide)
    return [(index, one.read.lease.worker_id) for index, one in enumerate(side.reads)]


def read(station: Station, index: int, source: Station, setting: Setting) -> Transfer:
    """The next thing that a read does."""
    side, giver, guards = station.side, source.side, setting.guards
    assert isinstance(side, DecodeSide)
    assert isinstance(giver, PrefillSide)
    one = side.reads[index]
    lease = one.read.lease
    what = f"{side.worker_id}'s read for attempt {one.attempt}"

    def over(content: str, error: str, giver: PrefillSide) -> tuple[Station, Station]:
        after, said = decode.read_ended(side, one, content, error, guards)
        is_silent = side.current is not None and side.current.is_silent
        return say(station, after, said, is_silent=is_silent), replace(source, side=giver)

    if lease.incarnation != giver.incarnation and guards.incarnation_check:
        return f"{what} finds nobody", *over("", "gone", giver)
    table = prefill.table_of(one.read.sources[0].block_id)
    is_there = lease.incarnation == giver.incarnation and prefill.holds(giver, table)
    content = "sealed" if is_there else "other"
    if setting.one_sided:
        return f"{what} ends and has found {content} pages", *over(content, "", giver)
    if not one.is_served:
        begun = prefill.begin_read(giver, lease.lease_id, one.attempt, guards)
        if begun is None:
            return f"{what} is refused", *over("", "refused", giver)
        return (
            f"{what} begins to be served",
            replace(station, side=decode.served(side, one)),
            replace(source, side=begun),
        )
    if not is_there:
        raise Violation(f"{giver.worker_id} serves blocks that it has given away")
    return f"{what} ends well", *over(content, "", prefill.end_read(giver, lease.lease_id, guards))


def open_questions(station: Station) -> list[tuple[int, WorkerId]]:
    """Questions that are not answered, and who is asked."""
    found = [(index, source) for index, (source, _) in enumerate(station.late_questions)]
    table = station.side.current
    if isinstance(station.side, DecodeSide) and table is not None and table.question is not None:  # type: ignore[union-attr]
        found.append((AWAITED, table.question_to))  # type: ignore[union-attr]
    return found


def ask(station: Station, index: int, source: Station, setting: Setting) -> Transfer:
    """A question is answered."""
    side, giver = station.side, source.side
    assert isinstance(side, DecodeSide)
    assert isinstance(giver, PrefillSide)
    asked = station.late_questions[index][1] if index != AWAITED else side.current and side.current.question
    assert asked is not None
    after, verdict = prefill.validate(giver, asked, setting.guards)
    says = f"{giver.worker_id} answers {side.worker_id} {'yes' if verdict.ok else 'no'}"
    there = replace(source, side=after)
    if index != AWAITED:
        left = station.late_questions[:index] + station.late_questions[index + 1 :]
        return f"{says}, too late", replace(station, late_questions=left), there
    is_silent = side.current is not None and side.current.is_silent
    here = say(station, *decode.take_verdict(side, verdict, setting.guards), is_silent=is_silent)
    return f"{says} for attempt {asked.attempt}", here, there


def hang_ups(source: Station, listeners: Sequence[Station], setting: Setting) -> Iterator[tuple[str, Station]]:
    """P serves somebody who does not listen any more: the call ends."""
    giver = source.side
    assert isinstance(giver, PrefillSide)
    for table, num_readers in prefill.readers(giver):
        num_open = sum(
            decode.num_served(listener.side, giver.worker_id, table)
            for listener in listeners
            if isinstance(listener.side, DecodeSide)
        )
        if num_open < num_readers:
            ended = prefill.end_read(giver, table, setting.guards)
            yield f"{giver.worker_id} finds that nobody listens to a read", replace(source, side=ended)
