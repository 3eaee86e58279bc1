"""The embedded model end to end: our paged, batched, chunked steps against transformers' own generate."""

from __future__ import annotations

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from duopool.core.config import CacheConfig, ModelConfig
from duopool.core.sampling_params import SamplingParams
from duopool.core.step import Chunk, SampleSpec, StepPlan
from duopool.core.types import BlockId, RequestId
from duopool.engine.model_source import embedded_gguf, resolve_model
from duopool.engine.runner import ModelRunner

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived",
    "def fibonacci(n):",
    "Water boils at",
    "In 1969, the first humans walked on the moon. " * 6,
)
NEW_TOKENS = 16


@pytest.mark.e2e
def test_greedy_equals_transformers_token_for_token() -> None:
    folder = resolve_model("smollm2").folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1
        )
        expected.append(output[0, len(prompt) :].tolist())

    runner = ModelRunner.load(ModelConfig(dtype="float32"), CacheConfig(num_blocks=64))
    per_request = 64 // len(prompts)
    tables = [[BlockId(row + len(prompts) * i) for i in range(per_request)] for row in range(len(prompts))]
    done = [0] * len(prompts)
    outputs: list[list[int]] = [[] for _ in prompts]
    while any(len(output) < NEW_TOKENS for output in outputs):
        chunks = []
        for row, prompt in enumerate(prompts):
            if len(outputs[row]) == NEW_TOKENS:
                continue
            part = (prompt + outputs[row])[done[row] :][: 5 + row]
            end = done[row] + len(part)
            spec = SampleSpec(
                params=SamplingParams(temperature=0), prompt_token_ids=prompt, output_token_ids=outputs[row]
            )
            chunks.append(
                Chunk(
                    request_id=RequestId(str(row)),
                    token_ids=part,
                    start=done[row],
                    block_ids=tables[row],
                    samples=(spec,) if end >= len(prompt) else (),
                )
            )
            done[row] = end
        for request, (token,) in runner.execute(StepPlan(chunks=tuple(chunks))).tokens.items():
            outputs[int(request)].append(token.token_id)
    assert outputs == expected


@pytest.mark.e2e
def test_conversion_is_the_gguf_weights_rounded_once() -> None:
    converted = load_file(resolve_model("smollm2").folder / "model.safetensors")
    names = {"ffn_down": "mlp.down_proj", "attn_v": "self_attn.v_proj", "attn_norm": "input_layernorm"}
    compared = 0
    for tensor in gguf.GGUFReader(embedded_gguf()).tensors:
        _, layer, kind, *_ = [*tensor.name.split("."), "", ""]
        if kind in names:
            expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).to(torch.bfloat16)
            assert torch.equal(converted[f"model.layers.{layer}.{names[kind]}.weight"], expected), tensor.name
            compared += 1
    assert compared == 90
