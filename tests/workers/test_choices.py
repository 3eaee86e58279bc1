"""Several choices of one prompt: computed once, handed over once, and each the same as it would be by itself."""

from __future__ import annotations

import msgspec
import pytest
from worker_fakes import BLOCK_SIZE, EOS, Pair, expected_stream, make_pair

from duopool.core.messages import Cancel, Choice, GenerationRequest, Joined, NackReason, Prefill, Reserve, Tokens
from duopool.core.types import FinishReason, RequestId

NUM_CHOICES = 5


def carrier(pair: Pair, prompt: list[int], *, name: str = "c", num_choices: int = NUM_CHOICES, **params: object):
    choices = tuple(Choice(RequestId(f"{name}{number}"), 100 + number) for number in range(num_choices))
    return msgspec.structs.replace(pair.request(name, prompt, **params), choices=choices)


def send(pair: Pair, request: GenerationRequest, *, is_local: bool) -> None:
    if not is_local:
        pair.to_prefill(Prefill(request=request, attempt=1))
    pair.to_decode(Reserve(request=request, attempt=1, local_prefill=is_local))


def num_computed(pair: Pair) -> int:
    """Positions whose KV was computed for prompts, anywhere."""
    plans = [*pair.prefill_runner.plans, *pair.decode_runner.plans]
    return sum(len(chunk.token_ids) for plan in plans for chunk in plan.chunks if len(chunk.token_ids) > 1)


@pytest.mark.parametrize("is_local", [False, True])
@pytest.mark.parametrize("length", [2, 3, 4, 13, 16, 21])
def test_each_choice_is_what_it_would_be_by_itself_and_the_prompt_is_computed_once(length: int, is_local: bool) -> None:
    pair = make_pair()
    prompt = [*range(length)]
    request = carrier(pair, prompt, max_tokens=14)
    send(pair, request, is_local=is_local)
    pair.run()
    for output in request.outputs:
        assert pair.streams[output.request_id] == expected_stream(prompt, output.params)
        assert pair.finished[output.request_id].finish_reason is not None
    assert num_computed(pair) == length
    assert pair.reader.num_blocks_read == (0 if is_local else -(-length // BLOCK_SIZE))
    assert sum(len(plan.copies) for plan in pair.decode_runner.plans) <= NUM_CHOICES * (length % BLOCK_SIZE > 0)
    assert sum(event.num_pulled_blocks for event in pair.events if isinstance(event, Joined)) == (
        pair.reader.num_blocks_read
    )
    pair.assert_nothing_is_held()
    pair.assert_kv_events_tell_what_is_cached()


@pytest.mark.parametrize("length", [8, 10])
def test_choices_share_all_full_blocks_and_own_their_newest(length: int) -> None:
    pair = make_pair()
    request = carrier(pair, [*range(length)], max_tokens=20, ignore_eos=True)
    send(pair, request, is_local=False)
    pair.step_prefill()
    pair.run_reads()
    pair.step_decode()
    used = pair.decode_manager.num_blocks - pair.decode_manager.num_available
    assert used == length // BLOCK_SIZE + NUM_CHOICES
    pair.run()
    pair.assert_nothing_is_held()


@pytest.mark.parametrize("is_local", [False, True])
@pytest.mark.parametrize("seats", [1, 2, 4])
def test_choices_that_find_no_seat_wait_for_one(seats: int, is_local: bool) -> None:
    pair = make_pair(decode={"max_num_seqs": seats})
    request = carrier(pair, [*range(10)], max_tokens=9, ignore_eos=True)
    other = pair.request("other", [5, 6, 7], max_tokens=4)
    send(pair, request, is_local=is_local)
    pair.send(other)
    pair.run()
    for output in (*request.outputs, other):
        assert pair.streams[output.request_id] == expected_stream(output.prompt_token_ids, output.params)
    pair.assert_nothing_is_held()


@pytest.mark.parametrize("is_local", [False, True])
@pytest.mark.parametrize("num_blocks", [8, 10, 13])
def test_choices_outgrow_the_pool_and_come_back(num_blocks: int, is_local: bool) -> None:
    pair = make_pair(num_decode_blocks=num_blocks)
    request = carrier(pair, [*range(10)], max_tokens=20, ignore_eos=True)
    send(pair, request, is_local=is_local)
    pair.run()
    assert pair.decode.load().num_preemptions > 0
    for output in request.outputs:
        assert pair.streams[output.request_id] == expected_stream(output.prompt_token_ids, output.params)
    pair.assert_nothing_is_held()


def test_head_room_is_taken_for_all_choices_or_none() -> None:
    """A carrier waits while its prompt would fit and its choices would not."""
    pair = make_pair(num_decode_blocks=11, decode={"watermark": 0.0})
    pair.send(pair.request("first", [*range(20, 40)], max_tokens=3, ignore_eos=True))
    pair.step_prefill()
    pair.step_prefill()
    pair.run_reads()
    pair.step_decode()
    request = carrier(pair, [*range(6)], max_tokens=3, ignore_eos=True)  # 2 blocks for the prompt, 4 for other choices
    send(pair, request, is_local=False)
    assert pair.decode.load().num_waiting == NUM_CHOICES
    assert not pair.decode_manager.has(RequestId("c/1"))
    pair.run()
    assert len(pair.finished) == 1 + NUM_CHOICES
    pair.assert_nothing_is_held()


@pytest.mark.parametrize("is_local", [False, True])
def test_a_choice_may_end_with_its_first_token_or_be_cancelled_before(is_local: bool) -> None:
    pair = make_pair()
    prompt = next([n, n + 1] for n in range(40) if _ends_at_once([n, n + 1]) not in ([], list(range(NUM_CHOICES))))
    ending = _ends_at_once(prompt)
    request = carrier(pair, prompt, max_tokens=8)
    gone = next(number for number in range(NUM_CHOICES) if number not in ending)
    send(pair, request, is_local=is_local)
    pair.to_decode(Cancel(request_id=RequestId(f"c{gone}"), attempt=1))
    pair.run()
    for number, output in enumerate(request.outputs):
        if number != gone:
            assert pair.streams[output.request_id] == expected_stream(prompt, output.params)
    said = [event for event in pair.events if isinstance(event, Tokens) and event.request_id == f"c{gone}"]
    assert said == []
    assert pair.finished[f"c{ending[0]}"].finish_reason is FinishReason.STOP
    pair.assert_nothing_is_held()


def _ends_at_once(prompt: list[int]) -> list[int]:
    from worker_fakes import next_token

    return [number for number in range(NUM_CHOICES) if next_token(prompt, 100 + number) == EOS]


@pytest.mark.parametrize("is_local", [False, True])
def test_one_token_each_needs_no_handoff(is_local: bool) -> None:
    pair = make_pair()
    request = carrier(pair, [*range(9)], max_tokens=1)
    send(pair, request, is_local=is_local)
    pair.run()
    assert len(pair.finished) == NUM_CHOICES
    assert pair.reader.num_blocks_read == 0
    pair.cancel("c")
    pair.pass_time(6.0)
    pair.assert_nothing_is_held()


def test_a_cancelled_carrier_leaves_nothing() -> None:
    pair = make_pair()
    request = carrier(pair, [*range(9)], max_tokens=9)
    send(pair, request, is_local=False)
    pair.step_prefill()
    pair.cancel("c")
    pair.run()
    assert not any(isinstance(event, Joined) for event in pair.events)
    pair.assert_nothing_is_held()


def test_a_cancel_within_the_step_that_copies_frees_all_behind_it() -> None:
    pair = make_pair()
    request = carrier(pair, [*range(6)], max_tokens=9, ignore_eos=True)
    send(pair, request, is_local=False)
    pair.step_prefill()
    pair.run_reads()

    def cancel() -> None:
        for output in request.outputs:
            pair.decode.handle(Cancel(request_id=output.request_id, attempt=1), 1, now=pair.clock.now)  # type: ignore[arg-type]
        assert pair.audit() == []

    pair.decode_runner.during_step = cancel
    pair.step_decode()
    pair.assert_nothing_is_held()


@pytest.mark.parametrize("num_firsts", [0, 4, 6])
def test_blocks_without_a_token_for_every_choice_are_refused(num_firsts: int) -> None:
    pair = make_pair()
    pair.is_forwarding = False
    request = carrier(pair, [*range(6)], max_tokens=9, ignore_eos=True)
    send(pair, request, is_local=False)
    pair.step_prefill()
    ready = next(event for event in pair.events if getattr(event, "first_tokens", ()))
    firsts = (*ready.first_tokens, ready.first_tokens[0])[:num_firsts]
    pair.to_decode(msgspec.structs.replace(ready, first_tokens=firsts))
    assert [nack.reason for nack in pair.nacks()] == [NackReason.INTERNAL]
    pair.cancel("c")
    pair.assert_nothing_is_held()
