"""What one prompt holds on a prefill worker, as an audit sees it."""

from __future__ import annotations

from duopool.core.ledger import Holder
from duopool.core.worker import SessionId
from duopool.engine.ledger import lease_entry
from duopool.engine.outbox import Outbox
from duopool.prefill_worker.prefill_request import PrefillRequest


def holder(request: PrefillRequest, outbox: Outbox, *, asker: SessionId, now: float) -> Holder:
    lease = request.lease
    return Holder(
        request_id=request.request_id,
        attempt=request.attempt,
        phase=request.phase.name.lower(),
        table=request.table,
        owner=outbox.owner(request.session, asker=asker),
        silent_s=outbox.silent_s(request.session, now=now),
        is_in_step=request.is_in_step,
        num_reads=0 if lease is None else lease.num_readers,
        lease=None if lease is None else lease_entry(lease),
    )
