"""The kernel's noise is the sampler's: whoever may be above the mark is named, and few others."""

from __future__ import annotations

import math

import pytest
import torch
from compiled import ISAS, compiled, needs_library
from torch import Tensor

from duopool.kernels.contenders import cpu
from duopool.kernels.cpu_library import Isa
from duopool.kernels.sample_tokens.noise import gumbel_noise, noise_keys

MARKS = torch.tensor([-1.5, 0.0, 2.0, 4.5, 9.0])


def scores_and_keys(size: int) -> tuple[Tensor, Tensor]:
    scores = -torch.randn(len(MARKS), size, generator=torch.Generator().manual_seed(size)).abs() * 3
    scores[:, ::7] = -math.inf
    return scores, noise_keys([3, -9, 1 << 62, 0, 12], [0, 7, 100_000, 1, 2], torch.device("cpu"))


@needs_library
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name.lower())
@pytest.mark.parametrize("size", [1, 15, 63, 64, 1000, 49152])
def test_names_whoever_may_be_above_the_mark(isa: Isa, size: int) -> None:
    scores, keys = scores_and_keys(size)
    found, counts = cpu.contenders(compiled(isa), scores, keys, MARKS, capacity=size)
    reached = scores.double() + gumbel_noise(keys, torch.arange(size)).double()
    for row, mark in enumerate(MARKS.tolist()):
        names = found[row, : int(counts[row])].tolist()
        assert names == sorted(set(names))
        above = (reached[row] > mark + 1e-4 * (1 + abs(mark))).nonzero().flatten().tolist()
        assert set(above) <= set(names)
        # The bound is on -log(u) instead of -log(-log(1 - u)), so some quiet ones are named too.
        near = (reached[row] > mark - 4).nonzero().flatten().tolist()
        assert set(names) <= set(near) | set((scores[row] > mark - 1).nonzero().flatten().tolist())
        assert not set(names) & set(range(0, size, 7))


@needs_library
def test_counts_what_does_not_fit() -> None:
    scores, keys = scores_and_keys(1000)
    found, counts = cpu.contenders(compiled(ISAS[-1]), scores, keys, torch.full((5,), -9.0), capacity=3)
    assert found.shape == (5, 3)
    assert int(counts.min()) > 800


@needs_library
def test_rows_may_lie_apart() -> None:
    scores, keys = scores_and_keys(100)
    apart = torch.zeros(len(MARKS), 250)[:, 50:150].copy_(scores)
    for marks in (MARKS, torch.zeros_like(MARKS)):
        one = cpu.contenders(compiled(ISAS[-1]), scores, keys, marks, capacity=100)
        other = cpu.contenders(compiled(ISAS[-1]), apart, keys, marks, capacity=100)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
