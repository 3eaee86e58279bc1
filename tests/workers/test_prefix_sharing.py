"""Equal prefixes are computed once, pulled once, and never shared between tenants."""

from __future__ import annotations

import pytest
from worker_fakes import BLOCK_SIZE, Pair, expected_stream, make_pair

from duopool.core.messages import (
    Accepted,
    BlocksReady,
    Cancel,
    Joined,
    Nack,
    NackReason,
    Prefill,
    Reserve,
    Reserved,
    Tokens,
)
from duopool.core.types import RequestId

PREFIX = list(range(10, 10 + 5 * BLOCK_SIZE))


def computed_on_prefill(pair: Pair) -> int:
    return pair.prefill.load().num_computed_tokens


def test_second_request_computes_and_pulls_only_its_own_part() -> None:
    pair = make_pair()
    pair.send(pair.request("r0", [*PREFIX, 1, 2], max_tokens=3, ignore_eos=True))
    pair.run()
    computed, pulled = computed_on_prefill(pair), pair.reader.num_blocks_read
    assert (computed, pulled) == (22, 6)

    pair.send(pair.request("r1", [*PREFIX, 3, 4, 5], max_tokens=3, ignore_eos=True))
    pair.run()
    assert computed_on_prefill(pair) - computed == 3
    assert pair.reader.num_blocks_read - pulled == 1
    assert [event.num_cached_tokens for event in pair.events if isinstance(event, Accepted)] == [0, 20]
    assert [event.num_cached_tokens for event in pair.events if isinstance(event, Reserved)] == [0, 20]
    joined = [event for event in pair.events if isinstance(event, Joined)]
    assert [(event.num_pulled_blocks, event.num_pulled_bytes) for event in joined] == [(6, 600), (1, 100)]


def test_a_prompt_that_is_all_cached_computes_its_last_token_and_pulls_nothing() -> None:
    pair = make_pair()
    for name in ("r0", "r1"):
        pair.send(pair.request(name, PREFIX, max_tokens=2, ignore_eos=True))
        pair.run()
    assert computed_on_prefill(pair) == 20 + BLOCK_SIZE
    assert pair.reader.num_blocks_read == 5
    assert pair.streams["r0"] == pair.streams["r1"]


@pytest.mark.parametrize("budget", [3, 7, 16, 64])
def test_a_prefix_in_flight_is_computed_once(budget: int) -> None:
    pair = make_pair(prefill={"max_num_batched_tokens": budget})
    for index in range(4):
        pair.send(pair.request(f"r{index}", [*PREFIX, 1, 2, index], max_tokens=2, ignore_eos=True))
    pair.run()
    assert computed_on_prefill(pair) == 23 + 3 * 3
    for index in range(4):
        params = pair.request("x", [0], max_tokens=2, ignore_eos=True).params
        assert pair.streams[f"r{index}"] == expected_stream([*PREFIX, 1, 2, index], params)


def test_twins_of_a_burst_pull_what_the_first_has_brought_only_once() -> None:
    pair = make_pair(prefill={"max_num_batched_tokens": 8})
    for index in range(4):
        pair.send(pair.request(f"r{index}", [*PREFIX, 1, 2, index], max_tokens=2, ignore_eos=True))
    for _ in range(30):
        pair.step_prefill()
        pair.run_reads()
    assert pair.reader.num_blocks_read < 4 * 6
    pair.run()
    for index in range(4):
        params = pair.request("x", [0], max_tokens=2, ignore_eos=True).params
        assert pair.streams[f"r{index}"] == expected_stream([*PREFIX, 1, 2, index], params)
    pair.assert_nothing_is_held()


def test_a_waiting_twin_takes_over_when_the_first_is_cancelled() -> None:
    pair = make_pair(prefill={"max_num_batched_tokens": 8})
    for name in ("r0", "r1"):
        pair.send(pair.request(name, [*PREFIX, 1], max_tokens=2, ignore_eos=True))
    pair.step_prefill()
    pair.cancel("r0")
    pair.run()
    assert len(pair.streams["r1"]) == 2
    assert computed_on_prefill(pair) == 21
    pair.assert_nothing_is_held()


def test_another_prompt_is_not_held_up_behind_a_waiting_twin() -> None:
    pair = make_pair(prefill={"max_num_batched_tokens": 24})
    pair.send(pair.request("r0", [*PREFIX, 1], max_tokens=1))
    pair.send(pair.request("r1", [*PREFIX, 2], max_tokens=1))
    pair.send(pair.request("r2", [9, 9], max_tokens=1))
    pair.step_prefill()
    assert set(pair.streams) == {"r0", "r2"}


def test_tenants_with_other_salts_share_nothing() -> None:
    pair = make_pair()
    for name, salt in (("r0", b"a"), ("r1", b"b")):
        pair.send(pair.request(name, PREFIX, salt=salt, max_tokens=2, ignore_eos=True))
        pair.run()
    assert computed_on_prefill(pair) == 2 * len(PREFIX)
    assert pair.reader.num_blocks_read == 2 * 5


def test_generated_blocks_are_a_prefix_for_the_next_turn() -> None:
    pair = make_pair()
    pair.send(pair.request("r0", PREFIX, max_tokens=9, ignore_eos=True))
    pair.run()
    turn = [*PREFIX, *pair.streams["r0"], 1, 2]
    pair.send(pair.request("r1", turn, max_tokens=2, ignore_eos=True))
    pair.run()
    reserved = [event for event in pair.events if isinstance(event, Reserved)]
    assert reserved[-1].num_cached_tokens == 28  # the 29th token was sampled last and never computed


@pytest.mark.parametrize("budget", [1, 5, 64])
def test_prompt_logprobs_cover_every_prompt_token_once_and_use_no_cache(budget: int) -> None:
    pair = make_pair(prefill={"max_num_batched_tokens": budget})
    for name in ("r0", "r1"):
        pair.send(pair.request(name, PREFIX, max_tokens=2, prompt_logprobs=0, ignore_eos=True))
        pair.run()
    firsts = [
        event.first_token for event in pair.events if isinstance(event, BlocksReady) and event.first_token is not None
    ]
    assert [[entry.token_id for entry in first.prompt_logprobs] for first in firsts] == [PREFIX[1:]] * 2
    assert computed_on_prefill(pair) == 2 * len(PREFIX)
    later = [event for event in pair.events if isinstance(event, Tokens)]
    assert later
    assert not any(event.prompt_logprobs for event in later)


def test_a_local_prompt_that_is_all_cached_computes_its_last_token() -> None:
    pair = make_pair()
    for name in ("r0", "r1"):
        request = pair.request(name, PREFIX, max_tokens=3, ignore_eos=True)
        pair.to_decode(Reserve(request=request, attempt=1, local_prefill=True))
        pair.run()
        assert pair.streams[name] == expected_stream(PREFIX, request.params)
    assert pair.decode.load().num_computed_tokens == (20 + 2) + (BLOCK_SIZE + 2)
    pair.assert_nothing_is_held()


def test_cached_blocks_give_way_to_a_prompt_that_needs_the_room() -> None:
    pair = make_pair(num_prefill_blocks=6)
    for index in range(3):
        pair.send(pair.request(f"r{index}", [index] * 20, max_tokens=2, ignore_eos=True))
    pair.run()
    assert all(len(pair.streams[f"r{index}"]) == 2 for index in range(3))
    assert not any(isinstance(event, Nack) for event in pair.events)
    pair.assert_nothing_is_held()


def test_a_prompt_waits_while_leases_hold_the_room_and_goes_on_after_them() -> None:
    pair = make_pair(num_prefill_blocks=6)
    pair.is_forwarding = False
    pair.to_prefill(Prefill(request=pair.request("r0", [1] * 20, max_tokens=2, ignore_eos=True), attempt=1))
    pair.to_prefill(Prefill(request=pair.request("r1", [2] * 20, max_tokens=2, ignore_eos=True), attempt=1))
    while pair.step_prefill():
        pass
    assert set(pair.streams) == {"r0"}
    pair.pass_time(6.0)
    assert pair.step_prefill()
    while pair.step_prefill():
        pass
    assert set(pair.streams) == {"r0", "r1"}


def try_again(pair: Pair, name: str, prompt: list[int], attempt: int) -> None:
    """What the router does when a decode worker could not read what was sealed."""
    pair.to_prefill(Cancel(request_id=RequestId(name), attempt=attempt - 1, check_pages=True))
    pair.send(pair.request(name, prompt, max_tokens=3, ignore_eos=True), attempt=attempt)


@pytest.mark.parametrize("damaged", [0, 2, 5])
def test_a_page_that_is_damaged_where_it_is_cached_is_computed_anew(damaged: int) -> None:
    pair = make_pair()
    prompt = [*PREFIX, 1, 2]
    pair.send(pair.request("r0", prompt, max_tokens=3, ignore_eos=True))
    pair.step_prefill()
    pair.step_prefill()
    (*_, last) = [event for event in pair.events if isinstance(event, BlocksReady)]
    assert last.first_token is not None
    blocks = [block.block_id for event in pair.events if isinstance(event, BlocksReady) for block in event.blocks]
    pair.prefill_store.pages[blocks[damaged]][0] += 1
    pair.run_reads()
    assert [nack.reason for nack in pair.nacks()] == [NackReason.TRANSFER_FAILED]
    try_again(pair, "r0", prompt, 2)
    pair.run()
    params = pair.request("x", [0], max_tokens=3, ignore_eos=True).params
    assert pair.streams["r0"] == expected_stream(prompt, params)
    assert len(pair.nacks()) == 1
    accepted = [event.num_cached_tokens for event in pair.events if isinstance(event, Accepted)]
    assert accepted == [0, min(damaged, 5) * BLOCK_SIZE]  # what is before the damage still serves
    pair.assert_nothing_is_held()
    pair.assert_kv_events_tell_what_is_cached()


def test_pages_that_were_only_damaged_on_their_way_stay_cached() -> None:
    pair = make_pair()
    pair.send(pair.request("r0", PREFIX, max_tokens=3, ignore_eos=True))
    pair.step_prefill()
    pair.step_prefill()
    pair.reader.run(error="digest")
    pair.collect()
    try_again(pair, "r0", PREFIX, 2)
    pair.run()
    assert [event.num_cached_tokens for event in pair.events if isinstance(event, Accepted)] == [0, 16]
    pair.assert_nothing_is_held()


def test_who_computes_behind_a_damaged_page_is_given_up_too() -> None:
    pair = make_pair(prefill={"max_num_batched_tokens": 8})
    pair.send(pair.request("r0", PREFIX, max_tokens=3, ignore_eos=True))
    for _ in range(3):
        pair.step_prefill()
    longer = [*PREFIX, *range(30, 50)]
    pair.send(pair.request("r1", longer, max_tokens=3, ignore_eos=True))
    pair.step_prefill()
    (first, *_) = [event for event in pair.events if isinstance(event, BlocksReady)]
    pair.prefill_store.pages[first.blocks[0].block_id][0] += 1
    try_again(pair, "r0", PREFIX, 2)
    assert [(nack.request_id, nack.reason) for nack in pair.nacks()] == [("r1", NackReason.LEASE_LOST)]
    pair.cancel("r1")
    pair.send(pair.request("r1", longer, max_tokens=3, ignore_eos=True), attempt=2)
    pair.run()
    params = pair.request("x", [0], max_tokens=3, ignore_eos=True).params
    assert pair.streams["r0"] == expected_stream(PREFIX, params)
    assert pair.streams["r1"] == expected_stream(longer, params)
    pair.assert_nothing_is_held()
