"""Ragged batches over scrambled, poisoned pages, for every implementation of paged attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import torch
from hypothesis import strategies as st
from torch import Tensor

from duopool.kernels.cpu_library import Isa, library
from duopool.kernels.paged_attention import cpu, torch_fallback
from duopool.kernels.paged_attention.reference import paged_attention as reference

Attention = Callable[..., Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCase:
    """Shapes and options; the numbers follow from the seed."""

    seed: int
    dtype: torch.dtype
    requests: tuple[tuple[int, int], ...]
    """(query tokens, tokens before them) of each request."""
    kv_heads: int
    group: int
    key_dim: int
    value_dim: int
    block_size: int
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False

    def check(self, attention: Attention) -> None:
        """Demand that `attention` agrees with the reference, reads no foreign slot and fills all of its output."""
        tensors, options = self.build()
        wide = tuple(t.float() if t.is_floating_point() else t for t in tensors)
        wanted = reference(*wide, **options)
        tokens, heads, _ = tensors[0].shape
        # The output is a view with gaps: what lies in the gaps must stay.
        room = torch.full((tokens, heads, self.value_dim + 3), float("nan"), dtype=self.dtype)
        got = attention(*tensors, **options, out=room[..., : self.value_dim])
        assert got.data_ptr() == room.data_ptr()
        assert room[..., self.value_dim :].isnan().all()
        tolerance = 3e-5 if self.dtype == torch.float32 else 2e-2
        torch.testing.assert_close(got.float(), wanted, rtol=tolerance, atol=tolerance)

    def build(self) -> tuple[tuple[Tensor, ...], dict[str, object]]:
        """Arguments of the op; every slot without a token is NaN, every unused table entry is no block."""
        generator = torch.Generator().manual_seed(self.seed)
        lengths = [queries + before for queries, before in self.requests]
        blocks = [-(-length // self.block_size) for length in lengths]
        num_blocks = sum(blocks) + 3
        dim = max(self.key_dim, self.value_dim)
        # The layer of a page that holds several, as the KV store lays them out.
        pages = torch.full((num_blocks, 2, 2, self.kv_heads, self.block_size, dim), float("nan"), dtype=self.dtype)
        keys, values = pages[:, 1, 0, :, :, : self.key_dim], pages[:, 1, 1, :, :, : self.value_dim]
        tables = torch.full((len(lengths), max(blocks) + 1), -7, dtype=torch.int32)
        free = iter(torch.randperm(num_blocks, generator=generator).tolist())
        for request, length in enumerate(lengths):
            for index in range(blocks[request]):
                block = tables[request, index] = next(free)
                filled = min(self.block_size, length - index * self.block_size)
                for cache in (keys, values):
                    shape = (self.kv_heads, filled, cache.shape[3])
                    cache[block, :, :filled] = torch.randn(shape, generator=generator).to(self.dtype)
        counts = [queries for queries, _ in self.requests]
        heads = self.kv_heads * self.group
        query = torch.randn(heads, sum(counts), self.key_dim, generator=generator).to(self.dtype).transpose(0, 1)
        starts = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
        sinks = torch.randn(heads, generator=generator).to(self.dtype) if self.sinks else None
        options = {
            "scale": self.key_dim**-0.5,
            "window": self.window,
            "soft_cap": self.soft_cap,
            "sinks_H": None if sinks is None else sinks.float(),
        }
        return (query, keys, values, tables, starts, torch.tensor(lengths, dtype=torch.int32)), options


DIMS = (8, 16, 64, 72, 80, 128)


@st.composite
def attention_cases(draw: st.DrawFn, most_queries: int = 80, most_before: int = 300) -> AttentionCase:
    """Any mix of prompt chunks and decode tokens, over every option."""
    key_dim = draw(st.sampled_from(DIMS))
    count = st.one_of(st.just(1), st.integers(0, 9), st.integers(1, most_queries))
    before = st.one_of(st.just(0), st.integers(0, 20), st.integers(0, most_before))
    requests = draw(st.lists(st.tuples(count, before).filter(lambda pair: sum(pair) > 0), min_size=1, max_size=4))
    return AttentionCase(
        seed=draw(st.integers(0, 1 << 30)),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        requests=tuple(requests),
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.sampled_from([1, 2, 3, 4, 7])),
        key_dim=key_dim,
        value_dim=draw(st.sampled_from([key_dim, *DIMS])),
        block_size=draw(st.sampled_from([1, 2, 3, 8, 16, 32])),
        window=draw(st.sampled_from([None, None, 1, 5, 70])),
        soft_cap=draw(st.sampled_from([None, None, 2.5])),
        sinks=draw(st.booleans()),
    )


def cpu_attentions() -> dict[str, Attention]:
    """Every implementation that runs on this machine's CPU, by name."""
    found: dict[str, Attention] = {"torch": torch_fallback.paged_attention}
    compiled = library()
    if compiled is not None:
        for isa in Isa:
            if isa <= compiled.isa:
                found[isa.name.lower()] = partial(cpu.paged_attention, replace(compiled, isa=isa))
    return found
