"""One step's requests, one behind the other, as numbers in host memory.

Arrays and not tensors: a step is made anew every few milliseconds, and the kernels take nothing but addresses.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RaggedBatch:
    """T query tokens of B requests whose block tables have room for M blocks; see `ops.paged_attention`."""

    token_ids: array[int]
    """int64 ("q") [T]"""
    positions: array[int]
    """int64 [T]"""
    slots: array[int]
    """int64 [T]: where each token's key and value go, `block_id * S + offset`; negative: nowhere."""
    block_tables: array[int]
    """int32 ("i") [B * M], request by request."""
    query_starts: array[int]
    """int32 [B + 1]"""
    kv_lengths: array[int]
    """int32 [B], the step's own tokens included."""

    def check(self) -> None:
        """Raise ValueError where lengths or types do not fit together."""
        num_requests = len(self.kv_lengths)
        if not (len(self.token_ids) == len(self.positions) == len(self.slots)):
            raise ValueError(
                f"{len(self.token_ids)} token ids, {len(self.positions)} positions, {len(self.slots)} slots"
            )
        if len(self.query_starts) != num_requests + 1 or len(self.block_tables) % max(1, num_requests):
            raise ValueError(
                f"{num_requests} kv_lengths, {len(self.block_tables)} entries of block tables, "
                f"{len(self.query_starts)} query_starts"
            )
        if not (self.token_ids.typecode == self.positions.typecode == self.slots.typecode == "q"):
            raise ValueError("token ids, positions and slots must be int64")
        if not (self.block_tables.typecode == self.query_starts.typecode == self.kv_lengths.typecode == "i"):
            raise ValueError("block tables, query_starts and kv_lengths must be int32")
