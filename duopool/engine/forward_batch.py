"""Turns a step plan into the flat tensors that the model and the kernels take.

Owns the layout of a step: chunks lie one behind the other in plan order, and every tensor is made once. Plain lists:
the kernels have just emptied the processor's caches, and each of numpy's ways to compute would be fetched anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor

from duopool.core.step import Chunk, StepPlan
from duopool.engine.forward_context import PagedContext
from duopool.engine.kv_store import KVStore


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """One step as tensors. T tokens, R rows of logits."""

    token_ids_T: Tensor
    """int64"""
    positions_T: Tensor
    """int64"""
    context: PagedContext
    logits_rows: Tensor
    """int64 [R]: the tokens whose logits are wanted, ascending."""
    sampled: tuple[tuple[int, Chunk], ...]
    """(row of the logits, chunk) for each chunk that samples."""
    scored: tuple[tuple[slice, Chunk], ...]
    """(rows of the logits, chunk) for each chunk that wants prompt log-probabilities."""


def build_forward_batch(plan: StepPlan, store: KVStore) -> ForwardBatch:
    """Lay the plan's chunks out; raises ValueError for a chunk whose block table is too short or that is empty."""
    size, chunks = store.layout.block_size, plan.chunks
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts, kv_lengths = [0], []
    for chunk in chunks:
        end, block_ids = chunk.start + len(chunk.token_ids), chunk.block_ids
        if not chunk.token_ids or end > len(block_ids) * size:
            raise ValueError(
                f"request {chunk.request_id}: {len(chunk.token_ids)} tokens at {chunk.start} need {-(-end // size)} "
                f"blocks, the table has {len(block_ids)}"
            )
        token_ids += chunk.token_ids
        for position in range(chunk.start, end):
            positions.append(position)
            slots.append(block_ids[position // size] * size + position % size)
        starts.append(len(token_ids))
        kv_lengths.append(end)
    rows, sampled, scored = _logits_rows(chunks, starts)

    device = store.pages.device
    return ForwardBatch(
        token_ids_T=_tensor(token_ids, np.int64, device),
        positions_T=_tensor(positions, np.int64, device),
        context=PagedContext(
            store=store,
            slots_T=_tensor(slots, np.int64, device),
            block_tables_BM=_tensor(_block_tables(chunks, kv_lengths, size), np.int32, device),
            query_starts=_tensor(starts, np.int32, device),
            kv_lengths=_tensor(kv_lengths, np.int32, device),
        ),
        logits_rows=_tensor(rows, np.int64, device),
        sampled=sampled,
        scored=scored,
    )


def _tensor(numbers: Sequence[int] | Sequence[Sequence[int]], dtype: DTypeLike, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.array(numbers, dtype=dtype))
    return tensor if device.type == "cpu" else tensor.to(device)


def _block_tables(chunks: Sequence[Chunk], kv_lengths: Sequence[int], block_size: int) -> list[list[int]]:
    """[B, M], zero behind each request's last used block."""
    counts = [-(-length // block_size) for length in kv_lengths]
    most = max(counts)
    return [[*chunk.block_ids[:count], *[0] * (most - count)] for chunk, count in zip(chunks, counts, strict=True)]


def _logits_rows(
    chunks: Sequence[Chunk], starts: Sequence[int]
) -> tuple[list[int], tuple[tuple[int, Chunk], ...], tuple[tuple[slice, Chunk], ...]]:
    """A sampling chunk needs its last row; one that scores its prompt needs each row that has a successor."""
    rows: list[int] = []
    sampled: list[tuple[int, Chunk]] = []
    scored: list[tuple[slice, Chunk]] = []
    for chunk, first, end in zip(chunks, starts[:-1], starts[1:], strict=True):
        if chunk.prompt_logprobs is not None:
            count = end - first - (chunk.next_token_id is None)
            scored.append((slice(len(rows), len(rows) + count), chunk))
            rows.extend(range(first, first + count))
        if chunk.samples:
            if not rows or rows[-1] != end - 1:
                rows.append(end - 1)
            sampled.append((len(rows) - 1, chunk))
    return rows, tuple(sampled), tuple(scored)
