"""Turns a step plan into the flat tensors that the model and the kernels take.

Owns the layout of a step: chunks lie one behind the other in plan order. All host arithmetic is numpy on whole arrays,
and every tensor is made once per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from duopool.core.step import Chunk, StepPlan
from duopool.engine.forward_context import PagedContext
from duopool.engine.kv_store import KVStore


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """One step as tensors. T tokens, R rows of logits."""

    input_ids: Tensor
    """int64 [1, T]"""
    position_ids: Tensor
    """int64 [1, T]"""
    context: PagedContext
    logits_rows: Tensor
    """int64 [R]: the tokens whose logits are wanted, ascending."""
    sampled: tuple[tuple[int, Chunk], ...]
    """(row of the logits, chunk) for each chunk that samples."""
    scored: tuple[tuple[slice, Chunk], ...]
    """(rows of the logits, chunk) for each chunk that wants prompt log-probabilities."""


def build_forward_batch(plan: StepPlan, store: KVStore) -> ForwardBatch:
    """Lay the plan's chunks out; raises ValueError for a chunk whose block table is too short or that is empty."""
    chunks = plan.chunks
    lengths = np.array([len(chunk.token_ids) for chunk in chunks], dtype=np.int64)
    first_positions = np.array([chunk.start for chunk in chunks], dtype=np.int64)
    kv_lengths = first_positions + lengths
    starts = np.zeros(len(chunks) + 1, dtype=np.int64)
    np.cumsum(lengths, out=starts[1:])
    tables = _block_tables(chunks, kv_lengths, store.layout.block_size)

    owner = np.repeat(np.arange(len(chunks)), lengths)
    positions = np.arange(starts[-1], dtype=np.int64) - np.repeat(starts[:-1] - first_positions, lengths)
    size = store.layout.block_size
    slots = tables[owner, positions // size] * size + positions % size
    token_ids = np.fromiter((token for chunk in chunks for token in chunk.token_ids), np.int64, count=int(starts[-1]))
    rows, sampled, scored = _logits_rows(chunks, starts.tolist())

    device = store.pages.device
    return ForwardBatch(
        input_ids=torch.from_numpy(token_ids).to(device).unsqueeze(0),
        position_ids=torch.from_numpy(positions).to(device).unsqueeze(0),
        context=PagedContext(
            store=store,
            slots_T=torch.from_numpy(slots).to(device),
            block_tables_BM=torch.from_numpy(tables.astype(np.int32)).to(device),
            query_starts=torch.from_numpy(starts.astype(np.int32)).to(device),
            kv_lengths=torch.from_numpy(kv_lengths.astype(np.int32)).to(device),
        ),
        logits_rows=torch.tensor(rows, dtype=torch.int64, device=device),
        sampled=sampled,
        scored=scored,
    )


def _block_tables(chunks: Sequence[Chunk], kv_lengths: NDArray[np.int64], block_size: int) -> NDArray[np.int64]:
    """[B, M], zero behind each request's last used block."""
    needed = (-(-kv_lengths // block_size)).tolist()
    tables = np.zeros((len(chunks), max(needed)), dtype=np.int64)
    for row, (chunk, count) in enumerate(zip(chunks, needed, strict=True)):
        if not chunk.token_ids or count > len(chunk.block_ids):
            raise ValueError(
                f"request {chunk.request_id}: {len(chunk.token_ids)} tokens at {chunk.start} need {count} blocks, "
                f"the table has {len(chunk.block_ids)}"
            )
        tables[row, :count] = chunk.block_ids[:count]
    return tables


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
