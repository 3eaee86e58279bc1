"""Executes step plans on a model: the Runner of a real worker.

Owns the model, its KV store and nothing about requests: every step is a function of the plan and of the pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import psutil
import torch
from torch import Tensor, nn

from duopool.core.config import CacheConfig, ModelConfig
from duopool.core.sampling_params import SamplingParams
from duopool.core.step import Chunk, SampledToken, SampleSpec, StepPlan, StepResult
from duopool.core.types import BlockId, RequestId, TokenLogprob
from duopool.engine.checked_model import CheckedModel
from duopool.engine.device import describe, device_memory
from duopool.engine.forward import forward
from duopool.engine.forward_batch import ForwardBatch, build_forward_batch
from duopool.engine.grammar import GrammarMasks
from duopool.engine.kv_sizing import Room, device_room, host_room, size_pool
from duopool.engine.kv_store import KVStore
from duopool.engine.model_loader import LoadedModel
from duopool.engine.model_source import Progress
from duopool.engine.sampler import as_sampled, draws_of, sample
from duopool.engine.token_logprobs import token_logprobs
from duopool.kernels import ops
from duopool.kernels.sample_tokens.draw import Draw, Drawn


class ModelRunner:
    """A model over a paged KV store. Not thread-safe: one step at a time."""

    def __init__(
        self, model: LoadedModel, store: KVStore, masks: GrammarMasks | None = None, *, notes: tuple[str, ...] = ()
    ) -> None:
        self._model = model
        self._masks = masks
        self.store = store
        self.notes = notes
        """What an operator should know of how the store was sized."""

    @classmethod
    def load(
        cls,
        model_config: ModelConfig,
        cache_config: CacheConfig,
        *,
        progress: Progress | None = None,
        device: torch.device | str = "cpu",
    ) -> ModelRunner:
        """Find, load and check the model and make its store; raise ModelNotFound, UnsupportedModel, OutOfBlocks."""
        checked = CheckedModel.load(model_config, cache_config, progress=progress, device=device)
        return cls.over(checked, cache_config)

    @classmethod
    def from_model(
        cls, model: LoadedModel, cache_config: CacheConfig, masks: GrammarMasks | None = None
    ) -> ModelRunner:
        """Check a loaded model, make it lean and give it a store. The module must not be used elsewhere afterwards.

        `masks` is needed for requests with a grammar.
        """
        return cls.over(CheckedModel.of(model, cache_config.block_size, masks), cache_config)

    @classmethod
    def over(cls, checked: CheckedModel, cache_config: CacheConfig) -> ModelRunner:
        """Give a checked model a store of its own; raise OutOfBlocks."""
        model, layout = checked.model, checked.layout
        size = size_pool(
            cache_config,
            page_bytes=layout.page_bytes,
            max_model_len=model.max_model_len,
            room=_room(cache_config, model.device),
        )
        model = replace(model, max_model_len=size.max_model_len)
        notes = (*filter(None, (describe(model.device),)), *size.notes)
        return cls(model, KVStore(layout, size.num_blocks, model.device), checked.masks, notes=notes)

    @property
    def module(self) -> nn.Module:
        """What a step calls: the model of transformers with overlays, or its fused stand-in."""
        return self._model.module

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return self._model.eos_token_ids

    @property
    def dtype(self) -> str:
        return str(self._model.dtype).removeprefix("torch.")

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus output in tokens."""
        return self._model.max_model_len

    @property
    def num_blocks(self) -> int:
        return self.store.num_blocks

    def execute(self, plan: StepPlan) -> StepResult:
        """Copy pages, write the KV of every chunk, sample where asked."""
        self._copy(plan)
        if plan.is_empty:
            return StepResult()
        batch = build_forward_batch(plan, self.store.layout.block_size)
        draws = draws_of(batch.specs, self._masks) if batch.has_a_sample_per_row else []
        logits_RV, drawn = self._forward(batch, draws)
        if draws:
            sampled = as_sampled(drawn, logits_RV, batch.specs)
        else:
            sampled = sample(logits_RV[batch.drawn_rows], batch.specs, self._masks)
        return StepResult(
            tokens=_tokens(plan.chunks, sampled),
            prompt_logprobs={chunk.request_id: _score(logits_RV, where, chunk) for where, chunk in batch.scored},
        )

    def warm_up(self) -> None:
        """Run one prompt and one decode step over block 0, which must not be in use; leaves it zero."""
        length = min(self.store.layout.block_size, self.max_model_len)
        spec = SampleSpec(params=SamplingParams(), prompt_token_ids=[0], output_token_ids=[])
        spans = [(0, length - 1), (length - 1, length)] if length > 1 else [(0, 1)]
        for start, end in spans:
            tokens = [0] * (end - start)
            self.execute(
                StepPlan(
                    chunks=(
                        Chunk(
                            request_id=RequestId("warm-up"),
                            token_ids=tokens,
                            start=start,
                            block_ids=[BlockId(0)],
                            samples=(spec,),
                        ),
                    )
                )
            )
        self.store.pages[0].zero_()

    def _copy(self, plan: StepPlan) -> None:
        if plan.copies:
            device = self.store.pages.device
            sources = torch.tensor([copy.source for copy in plan.copies], dtype=torch.int64, device=device)
            targets = torch.tensor([copy.target for copy in plan.copies], dtype=torch.int64, device=device)
            ops.copy_blocks(self.store.pages, sources, targets)

    def _forward(self, batch: ForwardBatch, draws: Sequence[Draw]) -> tuple[Tensor, Drawn]:
        """Logits float32 [R, V] of the wanted rows, and what is drawn from them."""
        return forward(self._model.module, batch.inputs, self.store, batch.logits_rows, draws)


def _tokens(chunks: Sequence[Chunk], sampled: Sequence[SampledToken]) -> dict[RequestId, tuple[SampledToken, ...]]:
    """Each chunk's own of the samples, which stand in the order of the chunks."""
    tokens: dict[RequestId, tuple[SampledToken, ...]] = {}
    first = 0
    for chunk in chunks:
        if chunk.samples:
            end = first + len(chunk.samples)
            tokens[chunk.request_id] = tuple(sampled[first:end])
            first = end
    return tokens


def _score(logits_RV: Tensor, rows: range, chunk: Chunk) -> tuple[TokenLogprob, ...]:
    """Each row predicts the token behind it: the chunk's own from the second on, then the next chunk's first."""
    targets = list(chunk.token_ids[1:])
    if chunk.next_token_id is not None:
        targets.append(chunk.next_token_id)
    return tuple(token_logprobs(logits_RV, rows, targets, chunk.prompt_logprobs or 0))


def _room(cache: CacheConfig, device: torch.device) -> Room:
    host_bytes = int(psutil.virtual_memory().total)
    if device.type == "cpu":
        return host_room(cache, memory_bytes=host_bytes)
    return device_room(cache, device_memory(device), host_bytes=host_bytes)
