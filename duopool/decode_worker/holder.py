"""What one request holds on a decode worker, as an audit sees it."""

from __future__ import annotations

from duopool.core.ledger import Holder
from duopool.core.worker import SessionId
from duopool.decode_worker.decode_request import DecodeRequest
from duopool.decode_worker.departures import Departures
from duopool.engine.ledger import lease_entry
from duopool.engine.outbox import Outbox


def holder(request: DecodeRequest, departures: Departures, outbox: Outbox, *, asker: SessionId, now: float) -> Holder:
    lease = departures.lease_of(request)
    return Holder(
        request_id=request.request_id,
        attempt=request.attempt,
        phase=request.phase.name.lower(),
        table=request.table,
        owner=outbox.owner(request.session, asker=asker),
        silent_s=outbox.silent_s(request.session, now=now),
        is_in_step=request.is_in_step,
        num_reads=0 if request.slot is None else request.slot.num_reads,
        lease=None if lease is None else lease_entry(lease),
        moves_to=0 if lease is None else lease.attempt,
    )
