"""P's leases against a plain model of what may be read, confirmed and freed; and the tombstones."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from duopool.core.handoff import lease as leases
from duopool.core.handoff.lease import Lease
from duopool.core.handoff.tombstones import Tombstones
from duopool.core.messages import SealedBlock
from duopool.core.types import BlockId, LeaseId, RequestId

TTL_S = 5.0


class LeaseMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.lease = Lease(lease_id=LeaseId(1), request_id=RequestId("r"), attempt=1, expires_at=TTL_S)
        self.last_heartbeat = 0.0
        self.ended = False
        self.highest_attempt = 1
        self.num_blocks = 0
        self.readers = 0

    @property
    def holds(self) -> bool:
        return not self.ended and self.now < self.last_heartbeat + TTL_S

    @rule(seconds=st.floats(0, 4, allow_nan=False))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def heartbeat(self) -> None:
        if self.holds:
            self.last_heartbeat = self.now
            self.lease = leases.extend(self.lease, now=self.now, ttl_s=TTL_S)

    @rule()
    def sweep(self) -> None:
        if not self.holds:
            self.ended = True
        self.lease = leases.expire(self.lease, now=self.now)

    @rule()
    def late_heartbeat_after_revocation(self) -> None:
        if self.ended:
            self.lease = leases.extend(self.lease, now=self.now, ttl_s=TTL_S)

    @rule()
    def release(self) -> None:
        self.ended = True
        self.lease = leases.revoke(self.lease)

    @rule(attempt=st.integers(1, 5))
    def rebind(self, attempt: int) -> None:
        self.highest_attempt = max(self.highest_attempt, attempt)
        self.lease = leases.rebind(self.lease, attempt)

    @rule(num=st.integers(0, 3))
    def seal(self, num: int) -> None:
        blocks = tuple(SealedBlock(BlockId(self.num_blocks + n), 1, 0) for n in range(num))
        self.num_blocks += num
        self.lease = leases.seal(self.lease, blocks)

    @rule(attempt=st.integers(1, 5))
    def begin_read(self, attempt: int) -> None:
        refusal = leases.refusal(self.lease, attempt=attempt, now=self.now)
        assert (refusal == "") == (self.holds and attempt == self.highest_attempt)
        if not refusal:
            self.readers += 1
            self.lease = leases.begin_read(self.lease)

    @precondition(lambda self: self.readers)
    @rule()
    def end_read(self) -> None:
        self.readers -= 1
        self.lease = leases.end_read(self.lease)

    @invariant()
    def freed_only_when_over_and_unread(self) -> None:
        assert self.lease.may_be_freed == (self.ended and self.readers == 0)

    @invariant()
    def only_the_newest_attempt_is_served_and_only_while_it_holds(self) -> None:
        for attempt in range(1, 6):
            refused = leases.refusal(self.lease, attempt=attempt, now=self.now) != ""
            assert refused == (not self.holds or attempt != self.highest_attempt)

    @invariant()
    def every_sealed_block_stays_listed(self) -> None:
        assert [block.block_id for block in self.lease.blocks] == list(range(self.num_blocks))


TestLease = LeaseMachine.TestCase
TestLease.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def test_an_unknown_lease_is_refused() -> None:
    assert leases.refusal(None, attempt=1, now=0.0)


@given(
    burials=st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 5), st.floats(0, 8, allow_nan=False), st.booleans()),
        max_size=20,
    )
)
@settings(max_examples=100, deadline=None)
def test_tombstones_remember_the_highest_attempt_for_their_time(
    burials: list[tuple[str, int, float, bool]],
) -> None:
    tombstones, now = Tombstones(keep_s=10.0), 0.0
    model: dict[str, tuple[int, float]] = {}
    for name, attempt, pause, sweep in burials:
        now += pause
        model[name] = (max(attempt, model.get(name, (0, 0.0))[0]), now)
        tombstones.bury(RequestId(name), attempt, now=now)
        if sweep:
            tombstones.sweep(now=now)
            model = {name: entry for name, entry in model.items() if now - entry[1] < 10.0}
        for name in "abc":
            highest = model.get(name, (0, 0.0))[0]
            for attempt in range(1, 7):
                assert tombstones.covers(RequestId(name), attempt) == (attempt <= highest)
        assert len(tombstones) == len(model)
