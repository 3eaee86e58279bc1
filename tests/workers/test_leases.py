"""The promise of a lease: validates say yes only while the blocks are as they were listed, for the right attempt."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from worker_fakes import BLOCK_SIZE, ROUTER, Pair, expected_stream, make_pair

from duopool.core.messages import (
    BlocksReady,
    Cancel,
    Heartbeat,
    Nack,
    NackReason,
    Prefill,
    ReadBlocks,
    Rebind,
    SealedBlock,
    Validate,
)
from duopool.core.types import BlockId, Incarnation, LeaseId, RequestId
from duopool.proto import codec


def leased(num_tokens: int = 10) -> tuple[Pair, BlocksReady]:
    """A pair whose prefill worker holds one finished prompt; nobody reads."""
    pair = make_pair()
    pair.is_forwarding = False
    request = pair.request("r0", list(range(num_tokens)), max_tokens=4, ignore_eos=True)
    pair.to_prefill(Prefill(request=request, attempt=1))
    while pair.step_prefill():
        pass
    ready = [event for event in pair.events if isinstance(event, BlocksReady)]
    return pair, ready[-1]


def ask(pair: Pair, ready: BlocksReady, attempt: int = 1, *, release: bool = False, life: int = 5) -> str:
    question = Validate(lease_id=ready.lease.lease_id, incarnation=Incarnation(life), attempt=attempt, release=release)
    verdict = pair.prefill.validate(question)
    assert verdict.ok == (verdict.reason == "")
    return verdict.reason


def read(ready: BlocksReady, attempt: int = 1, life: int = 5, blocks: tuple[SealedBlock, ...] = ()) -> ReadBlocks:
    return ReadBlocks(
        lease_id=ready.lease.lease_id, incarnation=Incarnation(life), attempt=attempt, blocks=blocks or ready.blocks
    )


def test_a_good_lease_is_confirmed_until_it_is_released() -> None:
    pair, ready = leased()
    assert ask(pair, ready) == ""
    assert not pair.prefill.is_idle
    assert ask(pair, ready, release=True) == ""
    assert "unknown" in ask(pair, ready)
    pair.assert_nothing_is_held()


def test_another_life_or_attempt_is_refused() -> None:
    pair, ready = leased()
    assert ask(pair, ready, life=6)
    assert ask(pair, ready, attempt=2)
    assert pair.prefill.begin_read(read(ready, life=6))
    assert pair.prefill.begin_read(read(ready, attempt=2))
    assert pair.prefill.begin_read(read(ready, blocks=(SealedBlock(BlockId(63), 1, 0),)))
    assert ask(pair, ready, release=True) == ""
    assert pair.prefill.begin_read(read(ready))


@pytest.mark.parametrize("has_ticked", [True, False])
def test_an_expired_lease_is_refused_and_given_back(has_ticked: bool) -> None:
    pair, ready = leased()
    pair.clock.now += 4.9
    assert ask(pair, ready) == ""
    pair.clock.now += 0.2
    if has_ticked:
        pair.prefill.tick(now=pair.clock.now)
    assert ask(pair, ready, release=True)
    assert pair.prefill.begin_read(read(ready))
    pair.prefill.tick(now=pair.clock.now)
    pair.assert_nothing_is_held()


def test_heartbeats_extend_the_leases_they_name() -> None:
    pair, ready = leased()
    for _ in range(10):
        pair.clock.now += 3.0
        pair.prefill.handle(Heartbeat(lease_ids=(ready.lease.lease_id,)), ROUTER, now=pair.clock.now)
        pair.prefill.tick(now=pair.clock.now)
    assert ask(pair, ready) == ""
    pair.pass_time(6.0)
    pair.assert_nothing_is_held()


def test_rebind_hands_the_lease_to_the_newer_attempt_only() -> None:
    pair, ready = leased()
    rebind = Rebind(request_id=RequestId("r0"), lease_id=ready.lease.lease_id, attempt=2)
    pair.to_prefill(rebind)
    pair.to_prefill(rebind)
    assert ask(pair, ready, attempt=1)
    assert ask(pair, ready, attempt=2) == ""
    pair.to_prefill(Cancel(request_id=RequestId("r0"), attempt=1))
    assert ask(pair, ready, attempt=2, release=True) == ""
    pair.to_prefill(rebind)
    assert not pair.nacks()


def test_rebind_of_a_lease_that_is_gone_is_answered() -> None:
    pair, ready = leased()
    pair.pass_time(6.0)
    pair.to_prefill(Rebind(request_id=RequestId("r0"), lease_id=ready.lease.lease_id, attempt=2))
    assert [(nack.reason, nack.attempt) for nack in pair.nacks()] == [(NackReason.LEASE_LOST, 2)]


ENDS: list[Callable[[Pair, BlocksReady], None]] = [
    lambda pair, ready: pair.cancel("r0"),
    lambda pair, ready: pair.pass_time(6.0),
    lambda pair, ready: None if ask(pair, ready, release=True) == "" else pytest.fail("refused"),
]


@pytest.mark.parametrize("end", ENDS)
def test_blocks_stay_while_a_counted_read_is_under_way(end: Callable[[Pair, BlocksReady], None]) -> None:
    pair, ready = leased()
    assert pair.prefill.begin_read(read(ready)) == ""
    assert pair.prefill.begin_read(read(ready)) == ""
    end(pair, ready)
    assert not pair.prefill.is_idle
    assert ask(pair, ready)
    assert pair.prefill_manager.num_available < pair.prefill_manager.num_blocks
    pair.prefill.end_read(ready.lease.lease_id)
    assert not pair.prefill.is_idle
    pair.prefill.check()
    pair.prefill.end_read(ready.lease.lease_id)
    pair.prefill.end_read(LeaseId(99))
    pair.assert_nothing_is_held()


def test_a_read_that_ended_too_late_is_not_used() -> None:
    pair = make_pair(num_prefill_blocks=6)
    pair.send(pair.request("r0", [1] * 20, max_tokens=4, ignore_eos=True))
    while pair.step_prefill():
        pass
    pair.pass_time(6.0)  # the lease is over before anything was read
    pair.is_forwarding = False  # of r1 the decode worker knows nothing
    pair.to_prefill(Prefill(request=pair.request("r1", [2] * 22, max_tokens=2, ignore_eos=True), attempt=1))
    while pair.step_prefill():
        pass
    pair.run_reads()
    reasons = [nack.reason for nack in pair.nacks()]
    assert reasons in ([NackReason.TRANSFER_FAILED], [NackReason.LEASE_LOST])
    assert len(pair.streams["r0"]) == 1
    assert pair.decode.is_idle


def test_every_block_is_listed_once_with_the_digest_of_its_content() -> None:
    for num_tokens in range(1, 3 * BLOCK_SIZE + 2):
        pair, _ = leased(num_tokens)
        ready = [event for event in pair.events if isinstance(event, BlocksReady)]
        blocks = [block for event in ready for block in event.blocks]
        assert [event.first_block for event in ready] == [
            sum(len(earlier.blocks) for earlier in ready[:index]) for index in range(len(ready))
        ]
        assert len(blocks) == -(-num_tokens // BLOCK_SIZE)
        for block in blocks:
            assert block.digest == pair.prefill_store.digest(block.block_id)
            assert block.generation == pair.prefill_manager.generation(block.block_id)
        assert not any(isinstance(event, Nack) for event in pair.events)


def test_a_prompt_that_comes_while_a_step_begins_has_not_waited() -> None:
    """The step's moment was read before it had the worker's lock; a negative time would end the whole session."""
    pair = make_pair()
    request = pair.request("r0", [1, 2, 3], max_tokens=4, ignore_eos=True)
    begun_at = pair.clock.now
    pair.clock.now += 0.01
    pair.to_prefill(Prefill(request=request, attempt=1))
    pair.prefill.step(now=begun_at)
    pair.collect()
    (ready,) = [event for event in pair.events if isinstance(event, BlocksReady)]
    assert ready.queue_s == 0.0
    assert codec.decoder(BlocksReady)(codec.encode(ready)) == ready


@pytest.mark.parametrize("num_damaged", [1, 2])
def test_a_read_that_arrives_damaged_is_made_once_more(num_damaged: int) -> None:
    pair = make_pair()
    request = pair.request("r0", [1] * 5, max_tokens=2, ignore_eos=True)
    pair.send(request)
    while pair.step_prefill():
        pass
    for _ in range(num_damaged):
        assert len(pair.reader.pending) == 1
        pair.reader.run(is_damaged=True)
        pair.collect()
    if num_damaged == 1:
        pair.run()
        assert pair.streams["r0"] == expected_stream([1] * 5, request.params)
    else:
        assert [nack.reason for nack in pair.nacks()] == [NackReason.TRANSFER_FAILED]
        pair.cancel("r0")
    pair.assert_nothing_is_held()
