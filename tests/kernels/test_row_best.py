"""The token of a greedy row: torch's maximum, the first of equals, NaN where there is one."""

from __future__ import annotations

import math

import pytest
import torch
from compiled import ISAS, compiled, needs_library
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from duopool.kernels.cpu_library import Isa
from duopool.kernels.sample_tokens import cpu
from duopool.kernels.sample_tokens.draw import Draw, Drawn

GREEDY = Draw(0.0, 1.0, 0.0, 0, 0, 0)
values = st.sampled_from([-math.inf, -3.0, -0.0, 0.0, 0.5, 0.75, 7.0, math.inf])


def best_tokens(isa: Isa, logits: Tensor) -> Drawn:
    return cpu.sample_tokens(compiled(isa), logits, [GREEDY] * len(logits))


@needs_library
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name.lower())
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_is_the_first_of_the_largest(isa: Isa, data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([1, 3, 16, 17, 70]))
    rows = data.draw(st.lists(st.lists(values, min_size=size, max_size=size), min_size=1, max_size=4))
    indices, best = best_tokens(isa, torch.tensor(rows))
    for row, found, index in zip(rows, best, indices, strict=True):
        assert found == max(row)
        assert index == row.index(max(row))


@needs_library
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name.lower())
@pytest.mark.parametrize("place", [0, 15, 16, 99])
def test_a_row_with_a_nan_says_so_and_its_neighbours_do_not(isa: Isa, place: int) -> None:
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(place))
    logits[1, place] = math.nan
    indices, best = best_tokens(isa, logits)
    assert [math.isnan(each) for each in best] == [False, True, False]
    assert [indices[0], indices[2]] == logits[[0, 2]].argmax(dim=1).tolist()


@needs_library
def test_rows_may_lie_apart() -> None:
    apart = torch.randn(5, 300, generator=torch.Generator().manual_seed(1))[:, 100:203]
    indices, best = best_tokens(ISAS[-1], apart)
    assert best == apart.amax(dim=1).tolist()
    assert indices == apart.argmax(dim=1).tolist()
