"""Candidates of a row: min-p, top-k, top-p in this order, for every instruction set and for torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from compiled import ISAS, compiled
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from duopool.kernels.top_candidates import cpu, reference

TopCandidates = Callable[[Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor, Tensor]]
IMPLEMENTATIONS: dict[str, TopCandidates] = {"torch": reference.top_candidates}
IMPLEMENTATIONS |= {isa.name.lower(): partial(cpu.top_candidates, compiled(isa)) for isa in ISAS}


def eligible(scores: list[float], floor: float, top_k: int) -> set[int]:
    """What min-p and top-k leave."""
    order = sorted((score for score in scores if score >= floor and score > -math.inf), reverse=True)
    bound = order[min(top_k, len(order)) - 1]
    return {i for i, score in enumerate(scores) if score >= bound}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@settings(max_examples=120, deadline=None)
@given(
    size=st.sampled_from([1, 2, 15, 16, 17, 64, 300, 2000]),
    spread=st.sampled_from([0.0, 0.5, 4.0, 20.0, 200.0]),
    steps=st.sampled_from([3, 50, 1 << 20]),
    ruled_out=st.sampled_from([0.0, 0.3, 0.99]),
    floor=st.sampled_from([-math.inf, -7.3, -0.31]),
    top_k=st.sampled_from([1, 2, 40, 1 << 40]),
    top_p=st.sampled_from([0.013, 0.47, 0.93, 0.9999, 1.0]),
    seed=st.integers(0, 1 << 30),
)
def test_keeps_what_the_rules_keep(
    name: str,
    size: int,
    spread: float,
    steps: int,
    ruled_out: float,
    floor: float,
    top_k: int,
    top_p: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    grid = torch.rand(3, size, generator=generator).mul(steps).floor() / steps  # few steps: many equal scores
    scores = grid.mul_(-spread)
    scores[torch.rand(3, size, generator=generator) < ruled_out] = -math.inf
    scores[:, seed % size] = 0.0
    best, indices, counts, bounds = IMPLEMENTATIONS[name](
        scores,
        torch.full((3,), floor),
        torch.full((3,), min(top_k, size)),
        torch.full((3,), top_p, dtype=torch.float64),
        size,
    )
    for row in range(3):
        values, count = scores[row].tolist(), int(counts[row])
        found = {i for i in range(size) if values[i] >= float(bounds[row]) and values[i] > -math.inf}
        if count <= size:  # else only the bound says what is kept
            listed = indices[row, :count].tolist()
            assert count == len(found)
            assert set(listed) == found
            assert best[row, :count].tolist() == [values[i] for i in listed]
            assert best[row, count:].isneginf().all()
        left = eligible(values, float(torch.tensor(floor)), min(top_k, size))
        lowest = min(values[i] for i in found)
        assert found == {i for i in left if values[i] >= lowest}
        assert float(bounds[row]) <= lowest
        if top_p == 1.0:
            assert found == left
            continue
        wanted = top_p * sum(math.exp(values[i]) for i in left)
        assert sum(math.exp(values[i]) for i in found) >= wanted * (1 - 1e-6)
        assert sum(math.exp(values[i]) for i in found if values[i] > lowest) < wanted * (1 + 1e-6)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_row_with_more_than_the_list_holds_says_so(name: str) -> None:
    scores = torch.zeros(2, 100)
    scores[1, 3:] = -5.0
    _, _, counts, bounds = IMPLEMENTATIONS[name](
        scores, torch.full((2,), -1.0), torch.full((2,), 100), torch.ones(2, dtype=torch.float64), 10
    )
    assert counts[0] > 10
    assert float(bounds[0]) <= 0
    assert counts[1] == 3


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_row_is_the_same_in_any_batch(name: str) -> None:
    scores = torch.randn(6, 3000, generator=torch.Generator().manual_seed(1)) * 6
    scores -= scores.amax(dim=1, keepdim=True)
    floors, top_p = torch.full((6,), -math.inf), torch.tensor([0.2, 0.9, 0.99, 0.5, 1.0, 0.7], dtype=torch.float64)
    top_k = torch.tensor([3000, 3000, 3000, 5, 1, 900])
    together = IMPLEMENTATIONS[name](scores, floors, top_k, top_p, 3000)
    for row in range(6):
        one = slice(row, row + 1)
        alone = IMPLEMENTATIONS[name](scores[one], floors[one], top_k[one], top_p[one], 3000)
        assert int(alone[2][0]) == int(together[2][row])
        assert float(alone[3][0]) == float(together[3][row])
