"""Whatever the chunks, the pools and the company: every request gives the tokens of the plain function."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from worker_fakes import EOS, VOCAB_SIZE, Pair, expected_stream, make_pair

from duopool.core.messages import Reserve
from duopool.core.types import FinishReason

prompts = st.lists(st.integers(0, 3), min_size=1, max_size=40)


@st.composite
def workloads(draw: st.DrawFn) -> list[tuple[list[int], dict[str, object], bool]]:
    shared = draw(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=24))
    workload = []
    for _ in range(draw(st.integers(1, 6))):
        prompt = shared[: draw(st.integers(0, len(shared)))] + draw(prompts)
        max_tokens = draw(st.integers(1, 20))
        params = {
            "max_tokens": max_tokens,
            "min_tokens": draw(st.integers(0, max_tokens)),
            "seed": draw(st.integers(0, 2)),
            "ignore_eos": draw(st.booleans()),
            "stop_token_ids": tuple(draw(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=5))),
        }
        workload.append((prompt, params, draw(st.booleans())))
    return workload


def assert_streams(pair: Pair, workload: list[tuple[list[int], dict[str, object], bool]]) -> None:
    for index, (prompt, params, _) in enumerate(workload):
        name = f"r{index}"
        request = pair.request(name, prompt, **params)
        assert pair.streams[name] == expected_stream(prompt, request.params)
        ending = pair.finished[name]
        last = pair.streams[name][-1]
        if ending.finish_reason is FinishReason.STOP:
            assert last == EOS or ending.stop_token_id == last
        else:
            assert len(pair.streams[name]) == request.params.max_tokens


@settings(max_examples=60, deadline=None)
@given(
    workload=workloads(),
    budget=st.integers(1, 24),
    prefill_seqs=st.integers(1, 4),
    decode_seqs=st.integers(1, 6),
    num_prefill_blocks=st.integers(16, 40),
    num_decode_blocks=st.integers(22, 60),
    watermark=st.sampled_from([0.0, 0.1]),
    order=st.randoms(use_true_random=False),
)
def test_streams_equal_the_plain_function(
    workload: list[tuple[list[int], dict[str, object], bool]],
    budget: int,
    prefill_seqs: int,
    decode_seqs: int,
    num_prefill_blocks: int,
    num_decode_blocks: int,
    watermark: float,
    order: object,
) -> None:
    pair = make_pair(
        num_prefill_blocks=num_prefill_blocks,
        num_decode_blocks=num_decode_blocks,
        prefill={"max_num_batched_tokens": budget, "max_num_seqs": prefill_seqs},
        decode={"max_num_batched_tokens": budget, "max_num_seqs": decode_seqs, "watermark": watermark},
    )
    for index, (prompt, params, is_local) in enumerate(workload):
        request = pair.request(f"r{index}", prompt, **params)
        if is_local:
            pair.to_decode(Reserve(request=request, attempt=1, local_prefill=True))
        else:
            pair.send(request)
        if order.random() < 0.5:  # type: ignore[attr-defined]
            pair.step_prefill()
        if order.random() < 0.5:  # type: ignore[attr-defined]
            pair.step_decode()
        if pair.reader.pending and order.random() < 0.5:  # type: ignore[attr-defined]
            pair.reader.run(order.randrange(len(pair.reader.pending)))  # type: ignore[attr-defined]
            pair.collect()
    pair.run()
    assert_streams(pair, workload)
    pair.assert_nothing_is_held()


def test_preemption_recomputes_and_goes_on_with_the_same_stream() -> None:
    pair = make_pair(num_decode_blocks=12, decode={"watermark": 0.0})
    prompts = [[index, 1, 2, 3, 4] for index in range(4)]
    for index, prompt in enumerate(prompts):
        pair.send(pair.request(f"r{index}", prompt, max_tokens=30, ignore_eos=True))
    pair.run()
    assert pair.decode.load().num_preemptions > 0
    for index, prompt in enumerate(prompts):
        params = pair.request("x", prompt, max_tokens=30, ignore_eos=True).params
        assert pair.streams[f"r{index}"] == expected_stream(prompt, params)
    pair.assert_nothing_is_held()


def test_a_sequence_that_fills_the_pool_ends_by_length() -> None:
    pair = make_pair(num_decode_blocks=4)
    pair.to_decode(
        Reserve(request=pair.request("r0", [1] * 5, max_tokens=1000, ignore_eos=True), attempt=1, local_prefill=True)
    )
    pair.run()
    assert pair.finished["r0"].finish_reason is FinishReason.LENGTH
    assert len(pair.streams["r0"]) == 4 * 4 + 1 - 5
    pair.assert_nothing_is_held()


def test_context_limit_ends_by_length() -> None:
    pair = make_pair(max_model_len=20)
    pair.send(pair.request("r0", [1] * 8, max_tokens=1000, ignore_eos=True))
    pair.send(pair.request("r1", [2] * 19, max_tokens=1000, ignore_eos=True))
    pair.run()
    assert [len(pair.streams[name]) for name in ("r0", "r1")] == [12, 1]
    assert {pair.finished[name].finish_reason for name in ("r0", "r1")} == {FinishReason.LENGTH}
    pair.assert_nothing_is_held()
