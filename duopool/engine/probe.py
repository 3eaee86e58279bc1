"""The check at load that a model really runs through our attention, and says what it stores per token.

Owns the verdict. A short ragged batch, in two steps and over scattered blocks, must call our function once per layer
and give the logits of the same module under transformers' eager attention, taken before any of its modules is replaced;
otherwise the model is refused with the reason.
"""

from __future__ import annotations

from array import array
from typing import Any

import torch
from torch import Tensor

from duopool.core.config import QuantizationName
from duopool.core.errors import UnsupportedModel
from duopool.core.step import Chunk, StepPlan
from duopool.core.types import BlockId, RequestId
from duopool.engine.attention import ATTENTION_NAME
from duopool.engine.forward import forward
from duopool.engine.forward_batch import build_forward_batch
from duopool.engine.forward_context import RecordingContext, SeenAttention, forward_context
from duopool.engine.kv_layout import KVLayout
from duopool.engine.kv_store import KVStore
from duopool.engine.model_loader import LoadedModel

PROBE_LENGTHS = (23, 1, 14)
"""Tokens of each probe request; the first spans blocks, and small windows, in both steps."""
PROBE_BLOCK_SIZE = 4
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.1, torch.float16: 2e-2}
"""Largest difference allowed, as a share of the eager logits' spread. In bfloat16 eager logits are up to 7 % away from
their own float32 (SmolLM2, weights of 4 bits), where ours are within 2 %."""
ROUNDED_TOLERANCE: dict[QuantizationName, float] = {"int8": 0.2, "int4": 0.5}
"""As TOLERANCE, for weights of few bits: a wrong layer differs by more, how good a right one is must be measured."""


def find_layout(model: LoadedModel, block_size: int) -> KVLayout:
    """Run one token and size a page from what the attention function sees; raise UnsupportedModel."""
    recording = RecordingContext()
    device = model.device
    with torch.inference_mode(), forward_context(recording):
        model.module(
            input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device),
            position_ids=torch.zeros(1, 1, dtype=torch.int64, device=device),
            use_cache=False,
        )
    _check_calls(model, recording)
    seen = [call for _, call in sorted(recording.seen, key=lambda item: item[0])]
    _check_windows(model, seen)
    return KVLayout(layers=tuple(call.shape for call in seen), block_size=block_size, dtype=seen[0].dtype)


def eager_logits(model: LoadedModel) -> list[Tensor]:
    """What transformers' own attention gives for the probe's prompts: float32 [n, V] each. Call before overlays."""
    return [_eager_logits(model, prompt) for prompt in _prompts(model)]


def check_parity(
    model: LoadedModel, layout: KVLayout, expected: list[Tensor], *, tolerance: float | None = None
) -> None:
    """Compare a ragged, chunked run over scattered blocks with `eager_logits`; raise UnsupportedModel.

    `tolerance` is the share of the logits' spread that is allowed, by default what suits the model's dtype.
    """
    found = _paged_logits(model, layout, _prompts(model))
    worst = 0.0
    for eager, paged in zip(expected, found, strict=True):
        spread = (eager.amax() - eager.amin()).clamp(min=1e-6)
        worst = max(worst, float((eager - paged).abs().amax() / spread))
    limit = TOLERANCE.get(model.dtype, 2e-3) if tolerance is None else tolerance
    if not worst <= limit:
        raise UnsupportedModel(
            f"{_name(model)}: logits differ from eager attention by {worst:.2%} of their spread (allowed {limit:.2%})"
        )


def _check_calls(model: LoadedModel, recording: RecordingContext) -> None:
    layers = sorted(layer for layer, _ in recording.seen)
    if layers != list(range(model.num_layers)):
        raise UnsupportedModel(
            f"{_name(model)}: {model.num_layers} layers called our attention {len(layers)} times "
            f"(layers {layers}); its attention bypasses the interface or keeps other state"
        )
    if not all(call.is_causal for _, call in recording.seen):
        raise UnsupportedModel(f"{_name(model)}: its attention is not causal")
    dtypes = {call.dtype for _, call in recording.seen}
    if len(dtypes) > 1:
        raise UnsupportedModel(f"{_name(model)}: its layers store KV as {sorted(map(str, dtypes))}")


def _check_windows(model: LoadedModel, seen: list[SeenAttention]) -> None:
    """A window longer than the probe would not show in the logits, so the configuration is asked too."""
    kinds = getattr(model.config, "layer_types", None) or []
    for layer, (kind, call) in enumerate(zip(kinds, seen, strict=False)):
        if "chunked" in kind:
            raise UnsupportedModel(f"{_name(model)}: layer {layer} has {kind}, which exists only as a mask")
        if kind == "sliding_attention" and call.window is None:
            raise UnsupportedModel(f"{_name(model)}: layer {layer} has a sliding window that it does not pass on")


def _eager_logits(model: LoadedModel, prompt: list[int]) -> Tensor:
    """float32 [n, V]"""
    module: Any = model.module
    module.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            output = module(
                input_ids=torch.tensor([prompt], device=model.device),
                position_ids=torch.arange(len(prompt), device=model.device).unsqueeze(0),
                use_cache=False,
            )
        logits: Tensor = output.logits[0].float()
        return logits
    finally:
        module.set_attn_implementation(ATTENTION_NAME)


def _paged_logits(model: LoadedModel, layout: KVLayout, prompts: list[list[int]]) -> list[Tensor]:
    """The same logits from two steps over pages whose order is reversed. float32 [n, V] each."""
    small = KVLayout(layers=layout.layers, block_size=PROBE_BLOCK_SIZE, dtype=layout.dtype)
    per_request = -(-max(map(len, prompts)) // PROBE_BLOCK_SIZE)
    store = KVStore(small, per_request * len(prompts), model.device)
    tables = [[BlockId(row + len(prompts) * i) for i in reversed(range(per_request))] for row in range(len(prompts))]
    found: list[list[Tensor]] = [[] for _ in prompts]
    for is_second in (False, True):
        chunks, rows = [], []
        for row, prompt in enumerate(prompts):
            split = len(prompt) * 2 // 3
            part = prompt[split:] if is_second else prompt[:split]
            if part:
                start = split if is_second else 0
                request = RequestId(str(row))
                chunks.append(Chunk(request_id=request, token_ids=part, start=start, block_ids=tables[row]))
                rows.append(row)
        inputs = build_forward_batch(StepPlan(chunks=tuple(chunks)), small.block_size).inputs
        every = array("q", range(len(inputs.token_ids)))
        logits, _ = forward(model.module, inputs, store, every)
        parts = torch.split(logits, [len(chunk.token_ids) for chunk in chunks])
        for row, part_logits in zip(rows, parts, strict=True):
            found[row].append(part_logits.clone())
    return [torch.cat(parts) for parts in found]


def _prompts(model: LoadedModel) -> list[list[int]]:
    """Fixed token ids spread over the vocabulary."""
    longest = model.max_model_len
    return [
        [(7919 * (i + 1) + 104729 * row) % model.vocab_size for i in range(min(length, longest))]
        for row, length in enumerate(PROBE_LENGTHS)
    ]


def _name(model: LoadedModel) -> str:
    return f"model type {getattr(model.config, 'model_type', '?')!r}"
