"""Puts a worker's ledger together. What a request holds is its role's to say (`holder.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from duopool.core.handoff.lease import Lease
from duopool.core.kv_manager import KVCacheManager
from duopool.core.ledger import Holder, LeaseEntry, WorkerLedger

Request = TypeVar("Request")


def unique(requests: Iterable[Request]) -> list[Request]:
    """Each request once: one may be ended, in a step and read from at the same time."""
    return list({id(request): request for request in requests}.values())


def lease_entry(lease: Lease) -> LeaseEntry:
    return LeaseEntry(
        lease_id=lease.lease_id,
        attempt=lease.attempt,
        blocks=tuple(sealed.block_id for sealed in lease.blocks),
        num_readers=lease.num_readers,
        is_revoked=lease.revoked,
    )


def make_ledger(manager: KVCacheManager, holders: tuple[Holder, ...], *, check: Callable[[], None]) -> WorkerLedger:
    """Everything at this moment; an invariant that `check` finds broken becomes text, so that the audit goes on."""
    try:
        check()
        fault = ""
    except AssertionError as error:
        tail = error.__traceback__
        while tail is not None and tail.tb_next is not None:
            tail = tail.tb_next
        place = "" if tail is None else f"{tail.tb_frame.f_code.co_qualname}, line {tail.tb_lineno}"
        fault = f"{error} ({place})"
    return WorkerLedger(blocks=manager.ledger(), holders=holders, fault=fault)
