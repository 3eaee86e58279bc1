"""The source's side of a live migration: what of a running request is listed when, as pure functions.

    COPYING -> LEAVING -> PARKED
       ^---------------------'  (the shadow was dropped: the departure ends and the request decodes on)

While it is COPYING the request decodes on and full blocks are listed as they fill. Once the target has nearly all of
them the request is LEAVING: its next step is its last one here, and lists all blocks with the token it gave. PARKED, it
waits until the router has made the target's attempt the current one and cancels this one. The promise that the listed
blocks stay readable is a lease (`lease.py`), like a prefill worker's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

NUM_TAIL_BLOCKS = 2
"""So many blocks may be left to copy while the request stands still: the partial one, and one that has just filled."""


class DeparturePhase(StrEnum):
    COPYING = "copying"
    LEAVING = "leaving"
    PARKED = "parked"


@dataclass(frozen=True, slots=True, kw_only=True)
class Departure:
    """How far a request is on its way out."""

    to_attempt: int
    """The shadow attempt that its blocks are listed for."""
    phase: DeparturePhase = DeparturePhase.COPYING
    num_listed: int = 0
    """Leading blocks that the target was told of."""


def copied(departure: Departure, num_copied: int, *, num_blocks: int) -> Departure:
    """The target has the first `num_copied` of `num_blocks` blocks; with little left the next step is the last one."""
    if departure.phase is not DeparturePhase.COPYING or num_blocks - num_copied > NUM_TAIL_BLOCKS:
        return departure
    return replace(departure, phase=DeparturePhase.LEAVING)


def end_of_listing(departure: Departure, *, num_full: int, num_blocks: int, max_new: int, is_decoding: bool) -> int:
    """Up to which block a step lists. `num_full` of `num_blocks` blocks are full when it has ended.

    A step that gives the request no token (`is_decoding` is false) lists full blocks only, whatever the phase.
    """
    if departure.phase is DeparturePhase.PARKED:
        return departure.num_listed
    if departure.phase is DeparturePhase.LEAVING and is_decoding:
        return num_blocks
    return max(departure.num_listed, min(num_full, departure.num_listed + max_new))


def listed(departure: Departure, num_listed: int, *, is_last: bool) -> Departure:
    """The target was told of the first `num_listed` blocks; with the last of them the request stands still."""
    phase = DeparturePhase.PARKED if is_last else departure.phase
    return replace(departure, phase=phase, num_listed=num_listed)
