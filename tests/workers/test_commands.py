"""Commands that come twice, late, too early or never: nothing is done twice and nothing stays."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
from worker_fakes import ROUTER, Pair, expected_stream, make_pair

from duopool.core.messages import (
    AttemptRef,
    BlocksReady,
    Cancel,
    Command,
    Heartbeat,
    KvChanged,
    KvSnapshot,
    NackReason,
    Prefill,
    Rebind,
    Reserve,
    Reserved,
    SnapshotWanted,
    WorkerLoad,
)
from duopool.core.types import LeaseId, RequestId
from duopool.core.worker import SessionId
from duopool.engine.arrivals import PATIENCE_S


def test_the_earliest_deadline_is_served_first_and_those_without_one_in_their_order() -> None:
    pair = make_pair(prefill={"max_num_seqs": 1}, decode={"max_num_seqs": 1})
    for name, deadline_s in (("late", 20.0), ("first", None), ("second", None), ("soon", 5.0)):
        pair.send(pair.request(name, [ord(name[0]) % 40] * 6, max_tokens=2, ignore_eos=True), deadline_s=deadline_s)
    pair.run()
    order = [event.request_id for event in pair.events if isinstance(event, BlocksReady) and event.first_token]
    assert order == ["soon", "late", "first", "second"]
    assert list(pair.finished) == order


def test_priority_goes_before_the_deadline_and_is_preempted_last() -> None:
    pair = make_pair(prefill={"max_num_seqs": 1}, decode={"max_num_seqs": 1})
    asked = (("later", 1, 0.5), ("plain", 0, None), ("soon", 0, 5.0), ("first", -3, None))
    for name, priority, deadline_s in asked:
        request = pair.request(name, [ord(name[0]) % 40] * 6, max_tokens=2, ignore_eos=True)
        pair.send(msgspec.structs.replace(request, priority=priority), deadline_s=deadline_s)
    pair.run()
    order = [event.request_id for event in pair.events if isinstance(event, BlocksReady) and event.first_token]
    assert order == ["first", "soon", "plain", "later"]
    assert list(pair.finished)[-1] == "later"


def test_the_request_of_the_least_priority_gives_its_blocks_up_first() -> None:
    pair = make_pair(num_decode_blocks=12, decode={"watermark": 0.0})
    for number, priority in enumerate((5, 0, 1)):
        request = pair.request(f"r{number}", [number] * 6, max_tokens=24, ignore_eos=True)
        request = msgspec.structs.replace(request, priority=priority)
        pair.to_decode(Reserve(request=request, attempt=1, local_prefill=True))
    waits: list[str] = []
    for _ in range(200):
        pair.step_decode()
        pair.decode.check()
        waits += [table.removesuffix("/1") for table in _waiting(pair) if pair.decode.load().num_preemptions]
    assert waits[0] == "r0"
    assert list(pair.finished) == ["r1", "r2", "r0"]
    pair.assert_nothing_is_held()


def _waiting(pair: Pair) -> list[str]:
    alive = {f"r{number}/1" for number in range(3) if f"r{number}" not in pair.finished}
    return sorted(table for table in alive if not pair.decode_manager.has(RequestId(table)))


def test_nobody_is_overtaken_for_ever() -> None:
    pair = make_pair(prefill={"max_num_seqs": 1})
    pair.send(pair.request("patient", [1] * 6, max_tokens=2, ignore_eos=True))
    pair.clock.now += PATIENCE_S
    pair.send(pair.request("hasty", [2] * 6, max_tokens=2, ignore_eos=True), deadline_s=0.5)
    pair.run()
    order = [event.request_id for event in pair.events if isinstance(event, BlocksReady) and event.first_token]
    assert order == ["patient", "hasty"]


def test_what_is_past_its_deadline_is_neither_prefilled_nor_given_room() -> None:
    pair = make_pair(decode={"max_num_seqs": 1})
    pair.to_decode(Reserve(request=pair.request("holder", [1] * 6), attempt=1, local_prefill=True))
    pair.send(pair.request("late", [2] * 6), deadline_s=1.0)
    local = pair.request("local", [3] * 6)
    pair.to_decode(Reserve(request=local, attempt=1, local_prefill=True, deadline_s=1.0))
    pair.clock.now += 1.0
    pair.cancel("holder")
    pair.run()
    assert not any(
        chunk.request_id.startswith(("late", "local")) for plan in pair.prefill_runner.plans for chunk in plan.chunks
    )
    assert pair.decode_runner.plans == []
    assert sorted((nack.request_id, nack.reason) for nack in pair.nacks()) == [
        ("late", NackReason.DEADLINE),
        ("late", NackReason.DEADLINE),
        ("local", NackReason.DEADLINE),
    ]


def test_what_a_heartbeat_names_and_is_not_here_is_refused_and_does_not_come_later() -> None:
    pair = make_pair()
    pair.send(pair.request("here", [1] * 6, max_tokens=2, ignore_eos=True))
    beat = Heartbeat(attempts=(AttemptRef(RequestId("here"), 1), AttemptRef(RequestId("astray"), 1)))
    pair.to_prefill(beat)
    pair.to_decode(beat)
    assert [(nack.request_id, nack.attempt, nack.reason) for nack in pair.nacks()] == [
        ("astray", 1, NackReason.UNKNOWN),
        ("astray", 1, NackReason.UNKNOWN),
    ]
    pair.send(pair.request("astray", [2] * 6))
    pair.run()
    assert list(pair.finished) == ["here"]
    pair.assert_nothing_is_held()


def test_doubled_commands_change_nothing() -> None:
    pair = make_pair()
    request = pair.request("r0", [1] * 30, max_tokens=6, ignore_eos=True)
    commands = [Prefill(request=request, attempt=1), Reserve(request=request, attempt=1)]

    def again() -> None:
        pair.to_prefill(commands[0])
        pair.to_decode(commands[1])
        for event in [event for event in pair.events if isinstance(event, BlocksReady)]:
            pair.to_decode(event)

    for _ in range(30):
        again()
        pair.step_prefill()
        again()
        pair.step_decode()
        if pair.reader.pending:
            pair.reader.run()
            pair.collect()
        again()
    pair.run()
    assert pair.streams["r0"] == expected_stream([1] * 30, request.params)
    assert pair.prefill.load().num_computed_tokens == 30
    assert pair.reader.num_blocks_read == 8
    assert pair.decode.load().num_computed_tokens == 5
    assert not pair.nacks()
    pair.assert_nothing_is_held()


def test_an_older_attempt_is_refused_and_the_same_one_ignored_after_its_end() -> None:
    pair = make_pair()
    request = pair.request("r0", [1] * 5, max_tokens=2, ignore_eos=True)
    pair.send(request, attempt=2)
    pair.send(request, attempt=1)
    assert {(nack.reason, nack.attempt) for nack in pair.nacks()} == {(NackReason.STALE, 1)}
    pair.run()
    pair.cancel("r0", attempt=2)
    pair.send(request, attempt=2)
    assert len(pair.nacks()) == 2
    pair.send(request, attempt=1)
    assert len(pair.nacks()) == 4
    pair.assert_nothing_is_held()


def test_a_newer_attempt_takes_the_place_of_the_older_one() -> None:
    pair = make_pair()
    pair.send(pair.request("r0", [1] * 30, max_tokens=6, ignore_eos=True))
    pair.step_prefill()
    pair.reader.run()
    pair.collect()
    pair.send(pair.request("r0", [1] * 30, max_tokens=6, ignore_eos=True), attempt=2)
    pair.run()
    assert pair.streams["r0"] == expected_stream([1] * 30, pair.request("x", [1], max_tokens=6, ignore_eos=True).params)
    assert not pair.nacks()
    pair.assert_nothing_is_held()


def test_a_cancel_that_overtakes_its_request_still_counts() -> None:
    pair = make_pair()
    pair.cancel("r0", attempt=3)
    for attempt in (1, 2, 3):
        pair.send(pair.request("r0", [1] * 5, max_tokens=2), attempt=attempt)
    assert not pair.step_prefill()
    pair.assert_nothing_is_held()
    pair.send(pair.request("r0", [1] * 5, max_tokens=2, ignore_eos=True), attempt=4)
    pair.run()
    assert len(pair.streams["r0"]) == 2


def test_blocks_listed_before_their_reservation_are_refused_and_the_late_reservation_is_nothing() -> None:
    pair = make_pair()
    request = pair.request("r0", [1] * 5, max_tokens=2, ignore_eos=True)
    pair.to_prefill(Prefill(request=request, attempt=2))
    while pair.step_prefill():
        pass
    assert [(nack.attempt, nack.reason) for nack in pair.nacks()] == [(2, NackReason.TRANSFER_FAILED)]
    pair.to_decode(Reserve(request=request, attempt=2))
    assert not pair.step_decode()
    pair.cancel("r0", attempt=2)
    pair.assert_nothing_is_held()


def test_a_cancel_of_an_older_attempt_leaves_the_newer_one_alone() -> None:
    pair = make_pair()
    pair.send(pair.request("r0", [1] * 5, max_tokens=2, ignore_eos=True), attempt=2)
    pair.cancel("r0", attempt=1)
    pair.run()
    assert len(pair.streams["r0"]) == 2


def test_a_request_after_its_deadline_is_never_prefilled() -> None:
    pair = make_pair(prefill={"max_num_batched_tokens": 8})
    pair.is_forwarding = False  # the decode worker has reserved nothing
    request = pair.request("late", [1] * 12, max_tokens=2)
    pair.to_prefill(Prefill(request=request, attempt=1, deadline_s=1.0))
    pair.to_prefill(Prefill(request=pair.request("long", [2] * 12, max_tokens=2), attempt=1, deadline_s=2.0))
    pair.clock.now += 1.0
    assert pair.step_prefill()
    assert all(chunk.request_id.startswith("long") for plan in pair.prefill_runner.plans for chunk in plan.chunks)
    pair.clock.now += 1.0
    assert not pair.step_prefill()  # half computed, and late now
    assert [(nack.request_id, nack.reason) for nack in pair.nacks()] == [
        ("late", NackReason.DEADLINE),
        ("long", NackReason.DEADLINE),
    ]
    pair.assert_nothing_is_held()


def test_a_reservation_that_waits_past_its_deadline_is_refused() -> None:
    pair = make_pair(decode={"max_num_seqs": 1})
    pair.to_decode(Reserve(request=pair.request("r0", [1] * 5), attempt=1))
    pair.to_decode(Reserve(request=pair.request("r1", [1] * 5), attempt=1, deadline_s=1.0))
    pair.pass_time(1.5)
    assert [(nack.request_id, nack.reason) for nack in pair.nacks()] == [("r1", NackReason.DEADLINE)]


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ([1] * 64, NackReason.TOO_LARGE),
        ([1] * 400, NackReason.TOO_LARGE),
        ([], NackReason.INTERNAL),
        ([50], NackReason.INTERNAL),
        ([-1], NackReason.INTERNAL),
        ([2**40], NackReason.INTERNAL),
    ],
)
def test_what_can_never_run_is_refused_at_once(prompt: list[int], reason: NackReason) -> None:
    pair = make_pair(num_prefill_blocks=15, num_decode_blocks=15, max_model_len=200)
    pair.send(pair.request("r0", prompt))
    assert [nack.reason for nack in pair.nacks()] == [reason, reason]
    pair.assert_nothing_is_held()


def test_a_queue_is_full_of_tokens_too() -> None:
    pair = make_pair(prefill={"max_num_waiting_tokens": 12, "max_num_seqs": 1})
    for index in range(5):
        pair.send(pair.request(f"r{index}", [index] * 5))
    busy = [nack for nack in pair.nacks() if nack.reason is NackReason.BUSY]
    assert [nack.request_id for nack in busy] == ["r3", "r4"]
    assert all(nack.retry_after_s > 0 for nack in busy)


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    limits: dict[str, int | float] = {"max_num_waiting": 2, "max_num_seqs": 1}
    pair = make_pair(prefill=limits, decode=limits)
    for index in range(5):
        pair.send(pair.request(f"r{index}", [index] * 5))
        pair.to_decode(Reserve(request=pair.request(f"local-{index}", [index] * 5), attempt=1, local_prefill=True))
    busy = [nack for nack in pair.nacks() if nack.reason is NackReason.BUSY]
    assert [nack.request_id for nack in busy] == ["r2", "r3", "r3", "local-3", "r4", "r4", "local-4"]
    assert all(nack.retry_after_s > 0 for nack in busy)


def test_who_waits_for_blocks_elsewhere_keeps_neither_room_nor_a_place_in_the_queue() -> None:
    pair = make_pair(decode={"max_num_waiting": 1, "max_num_seqs": 1})
    for index in range(5):
        pair.to_decode(Reserve(request=pair.request(f"r{index}", [index] * 5), attempt=1))
    pair.send(pair.request("here", [9] * 5, max_tokens=2, ignore_eos=True))
    pair.run()
    assert list(pair.finished) == ["here"]
    assert not pair.nacks()


def test_a_draining_worker_finishes_what_it_has() -> None:
    pair = make_pair()
    pair.send(pair.request("r0", [1] * 9, max_tokens=4, ignore_eos=True))
    pair.prefill.drain()
    pair.decode.drain()
    pair.send(pair.request("r1", [1] * 9))
    assert [nack.reason for nack in pair.nacks()] == [NackReason.DRAINING] * 2
    pair.run()
    assert len(pair.streams["r0"]) == 4
    pair.assert_nothing_is_held()


@pytest.mark.parametrize("is_closed", [True, False])
def test_requests_of_a_router_that_is_gone_or_silent_end(is_closed: bool) -> None:
    pair = make_pair(prefill={"max_num_batched_tokens": 8})
    pair.send(pair.request("r0", [1] * 5, max_tokens=1000, ignore_eos=True))
    pair.step_prefill()
    pair.run_reads()
    pair.send(pair.request("r1", [2] * 30, max_tokens=1000, ignore_eos=True))
    pair.step_prefill()
    pair.step_decode()
    if is_closed:
        for worker in (pair.prefill, pair.decode):
            worker.close_session(ROUTER, now=pair.clock.now)
    pair.pass_time(1.9, heartbeat=False)
    assert not pair.decode.is_idle
    pair.pass_time(0.2, heartbeat=False)
    pair.run_reads()
    pair.assert_nothing_is_held()
    if not is_closed:
        assert {nack.reason for nack in pair.nacks()} == {NackReason.STALE}


def test_a_reservation_that_no_block_comes_for_is_told_so_that_a_lost_cancel_can_be_repeated() -> None:
    pair = make_pair()
    request = pair.request("r0", [1] * 8, max_tokens=2, ignore_eos=True)
    pair.to_decode(Reserve(request=request, attempt=1))
    assert not [event for event in pair.events if isinstance(event, Reserved)]
    for _ in range(7):
        pair.pass_time(1.0)  # the router lives, and its Cancel was lost on the way
    assert len([event for event in pair.events if isinstance(event, Reserved)]) == 1
    pair.cancel("r0")
    pair.assert_nothing_is_held()


def test_commands_for_the_other_role_are_refused_or_ignored() -> None:
    pair = make_pair()
    request = pair.request("r0", [1])
    pair.to_prefill(Reserve(request=request, attempt=1))
    pair.to_decode(Prefill(request=request, attempt=1))
    assert [nack.reason for nack in pair.nacks()] == [NackReason.INTERNAL] * 2
    pair.to_decode(Rebind(request_id=RequestId("r0"), lease_id=LeaseId(1), attempt=1))
    pair.assert_nothing_is_held()


@pytest.mark.parametrize("num_blocks", [8, 64])
def test_kv_events_add_up_to_what_is_cached(num_blocks: int) -> None:
    pair = make_pair(num_prefill_blocks=num_blocks, num_decode_blocks=num_blocks)
    for index in range(6):
        pair.send(pair.request(f"r{index}", [index // 2] * (5 + 3 * index), max_tokens=5, ignore_eos=True))
        pair.run()
        pair.to_prefill(SnapshotWanted())
        pair.to_decode(SnapshotWanted())
    pair.assert_kv_events_tell_what_is_cached()
    has_evicted = any(isinstance(event, KvChanged) and event.removed for event in pair.events)
    assert has_evicted == (num_blocks == 8)


def test_a_session_hears_the_snapshot_first_and_nothing_of_other_routers() -> None:
    pair = make_pair()
    watcher = SessionId(2)
    pair.send(pair.request("r0", [1] * 9, max_tokens=5, ignore_eos=True))
    pair.prefill.step(now=pair.clock.now)
    pair.prefill.open_session(watcher, now=pair.clock.now)
    events = [addressed.event for addressed in pair.prefill.take_events() if addressed.session == watcher]
    assert [type(event) for event in events] == [KvSnapshot, WorkerLoad]


STAGES: list[Callable[[Pair], None]] = [
    lambda pair: None,
    lambda pair: _steps(pair, 1),
    lambda pair: _steps(pair, 2),
    lambda pair: _steps(pair, 9),
    lambda pair: (_steps(pair, 9), _reads(pair, 1))[0],
    lambda pair: (_steps(pair, 9), _reads(pair, 2))[0],
    lambda pair: (_steps(pair, 9), pair.run_reads())[0],
    lambda pair: (_steps(pair, 9), pair.run_reads(), _decodes(pair, 3))[0],
]


def _steps(pair: Pair, count: int) -> None:
    for _ in range(count):
        pair.step_prefill()


def _reads(pair: Pair, count: int) -> None:
    for _ in range(count):
        pair.reader.run()
        pair.collect()


def _decodes(pair: Pair, count: int) -> None:
    for _ in range(count):
        pair.step_decode()


@pytest.mark.parametrize("stage", range(len(STAGES)))
@pytest.mark.parametrize("is_counted", [True, False])
@pytest.mark.parametrize("late_error", ["", "broken"])
def test_cancel_at_every_stage_gives_every_block_back(stage: int, is_counted: bool, late_error: str) -> None:
    pair = make_pair(prefill={"max_num_batched_tokens": 8})
    pair.reader.is_counted = is_counted
    pair.send(pair.request("r0", [1] * 22, max_tokens=50, ignore_eos=True))
    STAGES[stage](pair)
    pair.cancel("r0")
    said = len(pair.streams.get("r0", ()))
    while pair.reader.pending:
        pair.reader.run(error=late_error)
        pair.collect()
    assert not pair.step_prefill()
    assert not pair.step_decode()
    assert len(pair.streams.get("r0", ())) == said
    assert not pair.nacks()
    pair.assert_nothing_is_held()


@pytest.mark.parametrize("command", ["cancel", "newer attempt", "deadline"])
def test_what_ends_during_a_step_keeps_its_blocks_until_the_step_has_ended(command: str) -> None:
    pair = make_pair(prefill={"max_num_batched_tokens": 8})
    request = pair.request("r0", [1] * 22, max_tokens=5, ignore_eos=True)
    pair.to_prefill(Prefill(request=request, attempt=1, deadline_s=10.0))
    pair.to_decode(Reserve(request=pair.request("d0", [2] * 9, max_tokens=5), attempt=1, local_prefill=True))
    seen: list[int] = []

    def during(worker_name: str, name: str, manager_name: str) -> None:
        worker, manager = getattr(pair, worker_name), getattr(pair, manager_name)
        commands: dict[str, Command] = {
            "cancel": Cancel(request_id=RequestId(name), attempt=1),
            "newer attempt": Cancel(request_id=RequestId(name), attempt=2),
        }
        if command == "deadline":
            pair.clock.now += 11.0
            worker.tick(now=pair.clock.now)
        else:
            worker.handle(commands[command], ROUTER, now=pair.clock.now)
        seen.append(manager.num_available)
        worker.check()
        assert not worker.is_idle

    pair.prefill_runner.during_step = lambda: during("prefill", "r0", "prefill_manager")
    pair.decode_runner.during_step = lambda: during("decode", "d0", "decode_manager")
    pair.step_prefill()
    pair.step_decode()
    assert all(available < 64 for available in seen)
    assert not pair.streams
    pair.assert_nothing_is_held()


@pytest.mark.parametrize("is_confirm", [False, True])
def test_a_failed_transfer_is_told_and_gives_everything_back(is_confirm: bool) -> None:
    pair = make_pair()
    pair.send(pair.request("r0", [1] * 9, max_tokens=5, ignore_eos=True))
    pair.step_prefill()
    if is_confirm:
        pair.reader.run()
        pair.cancel("other")
        pair.to_prefill(Cancel(request_id=RequestId("r0"), attempt=1))
        pair.reader.run()
    else:
        pair.reader.run(error="the network broke")
    pair.collect()
    expected = NackReason.LEASE_LOST if is_confirm else NackReason.TRANSFER_FAILED
    assert [nack.reason for nack in pair.nacks()] == [expected]
    assert pair.decode.is_idle
    pair.cancel("r0")
    pair.assert_nothing_is_held()


def test_more_blocks_than_the_prefix_has_are_refused() -> None:
    pair = make_pair()
    pair.is_forwarding = False
    request = pair.request("r0", [1] * 30, max_tokens=5, ignore_eos=True)
    pair.to_prefill(Prefill(request=request, attempt=1))
    while pair.step_prefill():
        pass
    pair.to_decode(Reserve(request=pair.request("r0", [1] * 5, max_tokens=5), attempt=1))
    for event in [event for event in pair.events if isinstance(event, BlocksReady)]:
        pair.to_decode(event)
    pair.run_reads()
    assert [nack.reason for nack in pair.nacks()] == [NackReason.TRANSFER_FAILED]
    assert pair.decode.is_idle
