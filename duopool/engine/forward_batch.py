"""Turns a step plan into the flat arrays that the model and the kernels take.

Owns the layout of a step: chunks lie one behind the other in plan order. Plain lists and arrays: the processor's caches
are cold after a step's kernels, and each of numpy's or torch's ways to compute would be fetched anew.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from duopool.core.step import Chunk, SampleSpec, StepPlan
from duopool.kernels.ragged_batch import RaggedBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """One step as arrays, and whose its logits are. R rows of logits."""

    inputs: RaggedBatch
    logits_rows: array[int]
    """int64 [R]: the tokens whose logits are wanted, ascending."""
    drawn_rows: list[int]
    """The row of the logits that each sample is drawn from; choices of one carrier share theirs."""
    specs: list[SampleSpec]
    """How each sample is drawn, in the order of the chunks."""
    scored: list[tuple[range, Chunk]]
    """(rows of the logits, chunk) for each chunk that wants prompt log-probabilities."""

    @property
    def has_a_sample_per_row(self) -> bool:
        return self.drawn_rows == list(range(len(self.logits_rows)))


def build_forward_batch(plan: StepPlan, block_size: int) -> ForwardBatch:
    """Lay the plan's chunks out; raises ValueError for a chunk whose block table is too short or that is empty."""
    size, chunks = block_size, plan.chunks
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
    rows, drawn_rows, scored = _logits_rows(chunks, starts)
    return ForwardBatch(
        inputs=RaggedBatch(
            token_ids=array("q", token_ids),
            positions=array("q", positions),
            slots=array("q", slots),
            block_tables=array("i", _block_tables(chunks, kv_lengths, size)),
            query_starts=array("i", starts),
            kv_lengths=array("i", kv_lengths),
        ),
        logits_rows=array("q", rows),
        drawn_rows=drawn_rows,
        specs=[spec for chunk in chunks for spec in chunk.samples],
        scored=scored,
    )


def _block_tables(chunks: Sequence[Chunk], kv_lengths: Sequence[int], block_size: int) -> list[int]:
    """[B * M], zero behind each request's last used block."""
    most = -(-max(kv_lengths) // block_size)
    tables: list[int] = []
    for chunk, length in zip(chunks, kv_lengths, strict=True):
        used = chunk.block_ids[: -(-length // block_size)]
        tables += used
        tables += [0] * (most - len(used))
    return tables


def _logits_rows(
    chunks: Sequence[Chunk], starts: Sequence[int]
) -> tuple[list[int], list[int], list[tuple[range, Chunk]]]:
    """A sampling chunk needs its last row; one that scores its prompt needs each row that has a successor."""
    rows: list[int] = []
    drawn: list[int] = []
    scored: list[tuple[range, Chunk]] = []
    for chunk, first, end in zip(chunks, starts, starts[1:], strict=False):
        if chunk.prompt_logprobs is not None:
            count = end - first - (chunk.next_token_id is None)
            scored.append((range(len(rows), len(rows) + count), chunk))
            rows.extend(range(first, first + count))
        if chunk.samples:
            if not rows or rows[-1] != end - 1:
                rows.append(end - 1)
            drawn += [len(rows) - 1] * len(chunk.samples)
    return rows, drawn, scored
