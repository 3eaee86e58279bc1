"""Every family under paged attention gives what it gives under eager attention, however its tokens are cut up."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from tiny_models import BYPASSING, FAMILIES, VOCAB_SIZE, make

from duopool.core.config import CacheConfig, QuantizationName
from duopool.core.errors import UnsupportedModel
from duopool.core.sampling_params import SamplingParams
from duopool.core.step import Chunk, SampleSpec, StepPlan
from duopool.core.types import BlockId, RequestId
from duopool.engine import checked_model
from duopool.engine.checked_model import CheckedModel
from duopool.engine.fused_model import FusedModel
from duopool.engine.model_loader import adopt
from duopool.engine.probe import check_parity, eager_logits
from duopool.engine.runner import ModelRunner
from duopool.kernels import ops
from duopool.kernels.cpu_library import library
from duopool.kernels.sample_tokens.draw import Drawn

CPU = library()
needs_library = pytest.mark.skipif(CPU is None, reason="the compiled kernels are not built")
needs_fusion = pytest.mark.skipif(
    CPU is None or CPU.torch_has_bfloat16_tiles, reason="this machine goes layer by layer"
)
LENGTHS = (31, 1, 9, 18)
BLOCK_SIZE = 4
SPEC = SampleSpec(params=SamplingParams(temperature=0, logprobs=0), prompt_token_ids=(), output_token_ids=())


def eager_logprobs(model: Any, prompts: list[list[int]]) -> list[torch.Tensor]:
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([p]), use_cache=False).logits[0].log_softmax(-1) for p in prompts]


def prompts_of(lengths: tuple[int, ...]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


FUSED = ("llama", "llama_biased", "mistral_window", "qwen2", "qwen2_window")


def go_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checked_model, "fuse", lambda model: None)


@pytest.mark.parametrize("family", [*sorted(FAMILIES), *(f"{family}, layer by layer" for family in FUSED)])
def test_prompt_logprobs_equal_eager_for_every_chunking(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, *rest = family.split(",")
    if rest:
        go_layer_by_layer(monkeypatch)
    model = make(FAMILIES[family]())
    prompts = prompts_of(LENGTHS)
    expected = eager_logprobs(model, prompts)
    per_request = -(-max(LENGTHS) // BLOCK_SIZE)
    runner = ModelRunner.from_model(
        adopt(model), CacheConfig(block_size=BLOCK_SIZE, num_blocks=per_request * len(prompts))
    )
    tables = [[BlockId(row + len(prompts) * i) for i in range(per_request)] for row in range(len(prompts))]
    for chunk_size in (1, 5, 64):
        runner.store.pages.fill_(float("nan"))  # an unwritten slot must never be read
        found: list[list[float]] = [[] for _ in prompts]
        last: dict[str, tuple[int, float]] = {}
        for start in range(0, max(LENGTHS), chunk_size):
            chunks = []
            for row, prompt in enumerate(prompts):
                part = prompt[start : start + chunk_size]
                if not part:
                    continue
                is_last = start + len(part) == len(prompt)
                chunks.append(
                    Chunk(
                        request_id=RequestId(str(row)),
                        token_ids=part,
                        start=start,
                        block_ids=tables[row],
                        samples=(SPEC,) if is_last else (),
                        prompt_logprobs=0,
                        next_token_id=None if is_last else prompt[start + len(part)],
                    )
                )
            result = runner.execute(StepPlan(chunks=tuple(chunks)))
            # The same step with logits for the sampled rows alone.
            short = runner.execute(
                StepPlan(chunks=tuple(msgspec.structs.replace(chunk, prompt_logprobs=None) for chunk in chunks))
            )
            assert {r: t.token_id for r, (t,) in short.tokens.items()} == {
                r: t.token_id for r, (t,) in result.tokens.items()
            }
            for request, entries in result.prompt_logprobs.items():
                found[int(request)].extend(entry.logprob for entry in entries)
            for request, (token,) in result.tokens.items():
                assert token.logprob is not None
                last[request] = (token.token_id, token.logprob.logprob)
        for row, prompt in enumerate(prompts):
            wanted = expected[row][:-1].gather(1, torch.tensor(prompt[1:], dtype=torch.int64).unsqueeze(1)).squeeze(1)
            torch.testing.assert_close(torch.tensor(found[row]), wanted, atol=2e-3, rtol=1e-3)
            token_id, logprob = last[str(row)]
            assert token_id == int(expected[row][-1].argmax())
            assert logprob == pytest.approx(float(expected[row][-1].max()), abs=2e-3)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "qwen3"])
def test_bfloat16_passes_its_own_probe(family: str) -> None:
    runner = ModelRunner.from_model(adopt(make(FAMILIES[family](), dtype=torch.bfloat16)), CacheConfig(num_blocks=4))
    assert runner.store.layout.dtype == torch.bfloat16


@pytest.mark.parametrize("family", sorted(BYPASSING))
def test_a_family_that_bypasses_our_attention_is_refused(family: str) -> None:
    with pytest.raises(UnsupportedModel):
        ModelRunner.from_model(adopt(make(BYPASSING[family]())), CacheConfig(num_blocks=4))


def test_wrong_attention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe notices a kernel that forgets the window."""
    from duopool.engine import attention

    go_layer_by_layer(monkeypatch)
    true = attention.ops.paged_attention
    monkeypatch.setattr(attention.ops, "paged_attention", lambda *a, **k: true(*a, **{**k, "window": None}))
    with pytest.raises(UnsupportedModel, match="differ from eager"):
        ModelRunner.from_model(adopt(make(FAMILIES["mistral_window"]())), CacheConfig(num_blocks=4))


@needs_fusion
@pytest.mark.parametrize("family", FUSED)
def test_models_of_the_llama_shape_are_one_call(family: str) -> None:
    runner = ModelRunner.from_model(adopt(make(FAMILIES[family]())), CacheConfig(num_blocks=4))
    assert isinstance(runner.module, FusedModel)


@needs_fusion
def test_a_fused_model_that_is_wrong_goes_layer_by_layer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    true = ops.decoder_stack
    monkeypatch.setattr(ops, "decoder_stack", lambda *a: (true(*a)[0].roll(1, dims=-1), Drawn([], [])))
    runner = ModelRunner.from_model(adopt(make(FAMILIES["llama"]())), CacheConfig(num_blocks=4))
    assert not isinstance(runner.module, FusedModel)
    assert "layer by layer" in caplog.text


def test_layout_comes_from_what_attention_sees() -> None:
    """DeepSeek's keys are wider than its values, and no field of the configuration says either width."""
    runner = ModelRunner.from_model(adopt(make(FAMILIES["deepseek_v3"]())), CacheConfig(num_blocks=4))
    shapes = {(each.num_kv_heads, each.key_dim, each.value_dim) for each in runner.store.layout.layers}
    assert shapes == {(4, 16, 12)}


@needs_library
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_weights_of_few_bits_stay_near_the_original(quantization: QuantizationName) -> None:
    model = adopt(make(FAMILIES["qwen2"](), dtype=torch.bfloat16))
    expected = eager_logits(model)
    checked = CheckedModel.of(model, BLOCK_SIZE, quantization=quantization)
    assert isinstance(checked.model.module, FusedModel)
    exact = CheckedModel.of(adopt(make(FAMILIES["qwen2"](), dtype=torch.bfloat16)), BLOCK_SIZE)
    with pytest.raises(UnsupportedModel, match="differ from eager"):
        check_parity(checked.model, exact.layout, expected, tolerance=1e-3)


def test_quantization_is_refused_where_it_does_not_exist() -> None:
    with pytest.raises(UnsupportedModel, match="int8 needs a model of the Llama shape"):
        CheckedModel.of(adopt(make(FAMILIES["gpt2"]())), BLOCK_SIZE, quantization="int8")
