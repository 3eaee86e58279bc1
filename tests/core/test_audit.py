"""An audit names every kind of disagreement, and finds nothing in ledgers that agree."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from duopool.core.audit import RequestEntry, audit_requests, audit_rest, audit_worker
from duopool.core.handoff.request import Member, Phase
from duopool.core.ledger import BlockLedger, Holder, LeaseEntry, Owner, WorkerLedger
from duopool.core.types import BlockId, Incarnation, LeaseId, RequestId, WorkerId

P = Member(WorkerId("prefill-0"), Incarnation(1))
D = Member(WorkerId("decode-0"), Incarnation(2))
LIMIT_S = 5.0

BLOCKS = BlockLedger(
    num_blocks=8,
    free=(BlockId(6), BlockId(7)),
    cached=(BlockId(0), BlockId(1), BlockId(2)),
    ref_counts={BlockId(0): 2, BlockId(3): 1, BlockId(4): 1, BlockId(5): 1},
    tables={RequestId("a/1"): (BlockId(0), BlockId(3)), RequestId("b/2"): (BlockId(0), BlockId(4))},
    pins={BlockId(5): 1},
)
LEASE = LeaseEntry(lease_id=LeaseId(77), attempt=1, blocks=(BlockId(0), BlockId(3)), num_readers=0, is_revoked=False)
A = Holder(request_id=RequestId("a"), attempt=1, phase="leased", table=RequestId("a/1"), owner=Owner.ASKER, lease=LEASE)
B = Holder(request_id=RequestId("b"), attempt=2, phase="filling", table=RequestId("b/2"), owner=Owner.ASKER)
C = Holder(request_id=RequestId("c"), attempt=1, phase="waiting", table=RequestId("c/1"), owner=Owner.OTHER)
GOOD = WorkerLedger(blocks=BLOCKS, holders=(A, B, C))
VIEW = {
    RequestId("a"): RequestEntry(attempt=1, phase=Phase.LEASED, prefill=P, decode=D),
    RequestId("b"): RequestEntry(attempt=2, phase=Phase.PREFILLING, prefill=P, decode=D),
}


def audit(ledger: WorkerLedger, before=VIEW, after=VIEW, member: Member = P) -> list[str]:
    found = audit_worker(member.worker_id, ledger, orphan_limit_s=LIMIT_S)
    return [str(finding) for finding in [*found, *audit_requests(member, ledger, before, after)]]


def with_blocks(**changes: object) -> WorkerLedger:
    return replace(GOOD, blocks=replace(BLOCKS, **changes))


def with_holder(holder: Holder, **changes: object) -> WorkerLedger:
    return replace(GOOD, holders=tuple(replace(one, **changes) if one is holder else one for one in GOOD.holders))


def test_nothing_is_found_where_all_agree() -> None:
    assert audit(GOOD) == []


@pytest.mark.parametrize(
    ("ledger", "says"),
    [
        (with_blocks(free=(6, 7, 7)), "block 7 stands 2 times in the free list"),
        (with_blocks(free=(7,)), "block 6 is lost: neither free nor cached nor referenced"),
        (with_blocks(free=(6, 7, 4)), "block 4 is free and referenced 1 times"),
        (with_blocks(free=(6, 7, 1)), "block 1 is free and cached"),
        (with_blocks(free=(6, 7, 8)), "block 8 does not exist: there are 8"),
        (with_blocks(pins={}), "block 5 is referenced 1 times, tables and pins hold it 0 times"),
        (with_blocks(ref_counts=BLOCKS.ref_counts | {0: 1}), "block 0 is referenced 1 times, tables and pins"),
        (with_blocks(tables=BLOCKS.tables | {"z/1": ()}), "table z/1 of 0 blocks has 0 holders"),
        (with_blocks(tables=BLOCKS.tables | {"b/2": (4, 4)}), "table b/2 names a block twice"),
        (with_holder(B, phase="waiting"), "request b/2 is waiting and has a table"),
        (with_holder(C, phase="running"), "request c/1 is running and has no table"),
        (with_holder(B, phase="ended"), "request b/2 has ended, and neither a step nor a read keeps its blocks"),
        (with_holder(A, lease=None), "request a/1 is leased and has no lease"),
        (with_holder(A, lease=replace(LEASE, is_revoked=True)), "lease 4d of request a/1 is revoked"),
        (with_holder(A, lease=replace(LEASE, attempt=2)), "lease 4d of request a/1 is bound to attempt 2"),
        (with_holder(A, lease=replace(LEASE, blocks=(0, 2))), "covers blocks that are not in its table: [2]"),
        (
            with_holder(C, owner=Owner.GONE, silent_s=6.5),
            "request c/1 lives without a router for 6.5 s, the limit is 5.0",
        ),
        (replace(GOOD, fault="it is odd"), "its own check fails: it is odd"),
        (with_holder(B, request_id="x"), "request x/2 is filling, unknown to its router"),
        (with_holder(B, attempt=1), "request b/1 is filling, its router is at attempt 2"),
        (with_holder(B, attempt=3), "request b/3 is filling, its router is only at attempt 2"),
    ],
)
def test_each_wrong_is_named(ledger: WorkerLedger, says: str) -> None:
    found = audit(ledger)
    assert any(says in one for one in found), found


def test_a_request_that_the_worker_does_not_know_is_named_if_the_router_never_changed_its_mind() -> None:
    ledger = replace(GOOD, holders=(A, C), blocks=replace(BLOCKS, pins={BlockId(5): 1, BlockId(4): 1, BlockId(0): 1}))
    ledger = replace(ledger, blocks=replace(ledger.blocks, tables={A.table: BLOCKS.tables[A.table]}))
    assert audit(ledger) == ["prefill-0: request b/2 is prefilling there for the router, unknown to it"]
    assert audit(ledger, after={RequestId("a"): VIEW[RequestId("a")]}) == []
    retried = {**VIEW, RequestId("b"): RequestEntry(attempt=3, phase=Phase.PREFILLING, prefill=P, decode=D)}
    assert audit(ledger, after=retried) == []


def test_a_released_lease_that_is_still_held_is_named() -> None:
    decoding = {**VIEW, RequestId("a"): RequestEntry(attempt=1, phase=Phase.DECODING, prefill=P, decode=D)}
    assert audit(GOOD, before=decoding, after=decoding) == [
        "prefill-0: request a/1 is leased, although its decode worker has released it"
    ]


def test_at_rest_everything_held_is_named() -> None:
    found = [str(finding) for finding in audit_rest(WorkerId("prefill-0"), GOOD)]
    assert found == [
        "prefill-0: request a/1 is leased although all is over",
        "prefill-0: request b/2 is filling although all is over",
        "prefill-0: request c/1 is waiting although all is over",
        "prefill-0: blocks 2 free + 2 cached are not 8",
    ]


def test_a_shadow_is_known_to_its_router_and_its_source_leases_for_it() -> None:
    other = Member(WorkerId("decode-1"), Incarnation(3))
    moving = RequestEntry(attempt=1, phase=Phase.MIGRATING, prefill=P, decode=D, shadow=(other, 2))
    source = WorkerLedger(
        blocks=replace(
            BLOCKS, tables={A.table: BLOCKS.tables[A.table]}, pins={BlockId(0): 1, BlockId(4): 1, BlockId(5): 1}
        ),
        holders=(replace(A, phase="running", lease=replace(LEASE, attempt=2), moves_to=2),),
    )
    view = {RequestId("a"): moving}
    assert audit(source, before=view, after=view, member=D) == []
    astray = replace(source, holders=(replace(source.holders[0], moves_to=3),))
    assert audit(astray, before=view, after=view, member=D) == [
        "decode-0: lease 4d of request a/1 is bound to attempt 2"
    ]
    target = replace(source, holders=(replace(A, attempt=2, phase="pulling", lease=None),))
    assert audit(target, before=view, after=view, member=other) == []
    assert audit(target, before=view, after=view, member=D)[0].endswith("its router is only at attempt 1")
