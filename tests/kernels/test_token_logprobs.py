"""The kernel finds the log-probabilities that torch finds, ranks and lists exactly, whatever stands in other rows."""

from __future__ import annotations

import math

import pytest
import torch
from compiled import ISAS, compiled, needs_library
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from duopool.kernels import ops
from duopool.kernels.cpu_library import Isa
from duopool.kernels.token_logprobs import cpu, reference

SIZES = [1, 3, 16, 17, 300, 5000]


def make_logits(rows: int, size: int, *, step: float, ruled_out: float, seed: int) -> Tensor:
    """Multiples of `step`, so that large steps make many equals; a part of them at -inf, but not the first."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, size, generator=generator) * 4 / step).round() * step
    logits[torch.rand(rows, size, generator=generator) < ruled_out] = -math.inf
    logits[:, 0] = 0.5
    return logits


@needs_library
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name.lower())
@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    size=st.sampled_from(SIZES),
    step=st.sampled_from([1e-5, 0.5, 4.0]),
    ruled_out=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 1 << 30),
)
def test_finds_what_torch_finds(
    isa: Isa, data: st.DataObject, size: int, step: float, ruled_out: float, seed: int
) -> None:
    logits = make_logits(4, size, step=step, ruled_out=ruled_out, seed=seed)
    asked = data.draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, size - 1)), min_size=1, max_size=6))
    rows, tokens = [row for row, _ in asked], [token for _, token in asked]
    num_top = data.draw(st.integers(0, min(size, 25)))
    expected = reference.token_logprobs(logits, rows, tokens, num_top)
    found = cpu.token_logprobs(compiled(isa), logits, rows, tokens, num_top)
    assert (found.ranks, found.top_tokens) == (expected.ranks, expected.top_tokens)
    for mine, wanted in ((found.logprobs, expected.logprobs), (found.top_logprobs, expected.top_logprobs)):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(wanted), atol=2e-5, rtol=2e-6)
    for at, (row, token) in enumerate(asked):
        alone = cpu.token_logprobs(compiled(isa), logits[row : row + 1], [0], [token], num_top)
        mine = slice(at * num_top, (at + 1) * num_top)
        assert (alone.logprobs[0], alone.top_logprobs) == (found.logprobs[at], found.top_logprobs[mine])


@pytest.mark.parametrize("implementation", [ops, reference])
def test_probabilities_of_all_tokens_sum_to_one(implementation: object) -> None:
    logits = make_logits(1, 300, step=1e-3, ruled_out=0.0, seed=1)
    found = implementation.token_logprobs(logits, [0], [7], 300)  # type: ignore[attr-defined]
    assert math.fsum(map(math.exp, found.top_logprobs)) == pytest.approx(1, abs=1e-5)
    assert sorted(found.top_tokens) == list(range(300))
    assert found.top_logprobs == sorted(found.top_logprobs, reverse=True)
    assert found.top_logprobs[found.ranks[0] - 1] == found.logprobs[0]


@pytest.mark.parametrize(
    ("rows", "tokens", "num_top"),
    [([0], [10], 0), ([0], [-1], 0), ([2], [0], 0), ([-1], [0], 0), ([0], [0], 11), ([0], [0], -1), ([0], [0, 1], 0)],
)
def test_refuses_what_is_not_in_the_logits(rows: list[int], tokens: list[int], num_top: int) -> None:
    with pytest.raises(ValueError, match="2, 10"):
        ops.token_logprobs(torch.zeros(2, 10), rows, tokens, num_top)


@pytest.mark.parametrize("implementation", [ops, reference])
def test_a_row_with_nans_raises_nothing_and_its_neighbours_keep_theirs(implementation: object) -> None:
    logits = make_logits(3, 300, step=0.5, ruled_out=0.0, seed=2)
    rows, tokens = [0, 1, 2], [7, 7, 7]
    before = implementation.token_logprobs(logits, rows, tokens, 4)  # type: ignore[attr-defined]
    logits[1, 40:42] = math.nan
    after = implementation.token_logprobs(logits, rows, tokens, 4)  # type: ignore[attr-defined]
    assert [len(part) for part in after] == [3, 3, 12, 12]
    for row in (0, 2):
        assert (after.logprobs[row], after.ranks[row]) == (before.logprobs[row], before.ranks[row])
        assert after.top_tokens[4 * row : 4 * row + 4] == before.top_tokens[4 * row : 4 * row + 4]


def test_nothing_is_found_about_no_rows() -> None:
    assert not any(ops.token_logprobs(torch.zeros(2, 10), [], [], 3))


def test_refuses_other_types() -> None:
    with pytest.raises(ValueError, match="bfloat16"):
        ops.token_logprobs(torch.zeros(2, 10, dtype=torch.bfloat16), [0], [0], 0)
