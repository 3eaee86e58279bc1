"""Laws of a step: reuse, copies and batches change nothing about a request's tokens; bad plans are refused whole."""

from __future__ import annotations

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, VOCAB_SIZE, make

from duopool.core.config import CacheConfig
from duopool.core.errors import OutOfBlocks
from duopool.core.sampling_params import SamplingParams
from duopool.core.step import Chunk, SampleSpec, StepPlan
from duopool.core.types import BlockCopy, BlockId, RequestId
from duopool.engine.forward_batch import build_forward_batch
from duopool.engine.lean_modules import LeanAttention, LeanGatedMLP, LeanRMSNorm
from duopool.engine.model_loader import adopt
from duopool.engine.overlay import apply_overlays
from duopool.engine.runner import ModelRunner

BLOCK_SIZE = 4
GREEDY = SamplingParams(temperature=0, logprobs=2)


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    model = adopt(make(FAMILIES["llama"]()))
    return ModelRunner.from_model(model, CacheConfig(block_size=BLOCK_SIZE, num_blocks=24))


def chunk_of(
    tokens: list[int], blocks: list[int], *, start: int = 0, request: str = "r", params: SamplingParams | None = GREEDY
) -> Chunk:
    samples = () if params is None else (SampleSpec(params=params, prompt_token_ids=tokens, output_token_ids=[]),)
    return Chunk(
        request_id=RequestId(request),
        token_ids=tokens,
        start=start,
        block_ids=[BlockId(block) for block in blocks],
        samples=samples,
    )


def logprob_of(runner: ModelRunner, chunk: Chunk) -> float:
    (token,) = runner.execute(StepPlan(chunks=(chunk,))).tokens[chunk.request_id]
    assert token.logprob is not None
    return token.logprob.logprob


def test_blocks_written_by_one_request_serve_another(runner: ModelRunner) -> None:
    tokens = list(range(10, 23))
    whole = logprob_of(runner, chunk_of(tokens, [5, 1, 7, 3]))
    reused = logprob_of(runner, chunk_of(tokens[8:], [5, 1, 9, 10], start=8, request="other"))
    assert reused == pytest.approx(whole, abs=1e-5)


def test_copied_pages_are_there_before_the_step_runs(runner: ModelRunner) -> None:
    tokens = list(range(10, 16))
    whole = logprob_of(runner, chunk_of(tokens, [0, 1]))
    fork = chunk_of(tokens[5:], [0, 2], start=5, request="fork")
    copied = StepPlan(chunks=(fork,), copies=(BlockCopy(source=BlockId(1), target=BlockId(2)),))
    (token,) = runner.execute(copied).tokens[fork.request_id]
    assert token.logprob is not None
    assert token.logprob.logprob == pytest.approx(whole, abs=1e-5)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(1, 14), min_size=1, max_size=5),
    st.randoms(use_true_random=False),
)
def test_a_request_gives_the_same_alone_and_in_a_batch(runner: ModelRunner, lengths: list[int], random: object) -> None:
    assert hasattr(random, "sample")
    blocks = random.sample(range(24), 24)
    chunks = []
    for row, length in enumerate(lengths):
        tokens = [random.randrange(3, VOCAB_SIZE) for _ in range(length)]  # type: ignore[attr-defined]
        own = [blocks.pop() for _ in range(-(-length // BLOCK_SIZE))]
        chunks.append(chunk_of(tokens, own, request=str(row)))
    runner.store.pages.fill_(float("nan"))
    together = runner.execute(StepPlan(chunks=tuple(chunks))).tokens
    for chunk in chunks:
        (alone,) = runner.execute(StepPlan(chunks=(chunk,))).tokens[chunk.request_id]
        (batched,) = together[chunk.request_id]
        assert alone.token_id == batched.token_id
        assert alone.logprob is not None
        assert batched.logprob is not None
        assert alone.logprob.logprob == pytest.approx(batched.logprob.logprob, abs=1e-4)


def test_a_step_writes_its_own_slots_only(runner: ModelRunner) -> None:
    runner.store.pages.fill_(7.0)
    runner.execute(StepPlan(chunks=(chunk_of([5, 6], [3, 8], start=3, params=None),)))
    touched = (runner.store.pages != 7.0).any(dim=1).nonzero().squeeze(1).tolist()
    assert touched == [3, 8]
    key, value = runner.store.layer(0)
    assert (key[3, :, :3] == 7.0).all()
    assert (value[8, :, 1:] == 7.0).all()


def test_prompt_logprobs_have_one_entry_per_predicted_token(runner: ModelRunner) -> None:
    tokens = list(range(10, 16))
    chunk = msgspec.structs.replace(chunk_of(tokens, [0, 1], params=None), prompt_logprobs=2)
    entries = runner.execute(StepPlan(chunks=(chunk,))).prompt_logprobs[chunk.request_id]
    assert [entry.token_id for entry in entries] == tokens[1:]
    assert all(len(entry.top) == 2 for entry in entries)
    followed = msgspec.structs.replace(chunk, next_token_id=42)
    entries = runner.execute(StepPlan(chunks=(followed,))).prompt_logprobs[chunk.request_id]
    assert [entry.token_id for entry in entries] == [*tokens[1:], 42]
    first = msgspec.structs.replace(chunk_of([10], [0], params=None), prompt_logprobs=0)
    assert runner.execute(StepPlan(chunks=(first,))).prompt_logprobs[first.request_id] == ()


def test_a_plan_without_chunks_gives_nothing(runner: ModelRunner) -> None:
    result = runner.execute(StepPlan())
    assert not result.tokens
    assert not result.prompt_logprobs


def test_a_chunk_beyond_its_table_is_refused(runner: ModelRunner) -> None:
    with pytest.raises(ValueError, match="need 2 blocks, the table has 1"):
        build_forward_batch(StepPlan(chunks=(chunk_of([1, 2], [0], start=3),)), BLOCK_SIZE)
    with pytest.raises(ValueError, match="0 tokens"):
        build_forward_batch(StepPlan(chunks=(chunk_of([], [0]),)), BLOCK_SIZE)


def test_warm_up_leaves_the_store_empty() -> None:
    fresh = ModelRunner.from_model(adopt(make(FAMILIES["llama"]())), CacheConfig(block_size=1, num_blocks=3))
    fresh.warm_up()
    assert not fresh.store.pages.any()


def test_the_memory_budget_gives_the_number_of_blocks() -> None:
    budget = 1 << 20
    runner = ModelRunner.from_model(adopt(make(FAMILIES["llama"]())), CacheConfig(kv_cache_memory_bytes=budget))
    assert runner.num_blocks == budget // runner.store.page_bytes
    wide = FAMILIES["llama"]()
    wide.num_key_value_heads = wide.num_attention_heads = 4
    wide.head_dim = 256
    with pytest.raises(OutOfBlocks):
        ModelRunner.from_model(adopt(make(wide)), CacheConfig(block_size=256, kv_cache_memory_bytes=budget))


def test_overlays_replace_what_they_equal_and_leave_the_rest() -> None:
    llama, gemma = make(FAMILIES["llama"]()), make(FAMILIES["gemma"]())
    assert apply_overlays(llama) > 0
    kinds = [type(module) for module in llama.modules()]
    assert kinds.count(LeanAttention) == 2
    assert kinds.count(LeanGatedMLP) == 2
    assert kinds.count(LeanRMSNorm) == 5
    apply_overlays(gemma)
    # Gemma's norm multiplies by 1 + weight: it has the shape of ours and is another function.
    assert not any(isinstance(module, LeanRMSNorm) for module in gemma.modules())


def test_overlays_leave_random_numbers_alone() -> None:
    model = make(FAMILIES["llama"]())
    before = torch.get_rng_state()
    apply_overlays(model)
    assert torch.equal(torch.get_rng_state(), before)
