"""The kernel's noise is the sampler's: it names exactly the tokens whose bits are below the limit."""

from __future__ import annotations

import pytest
import torch
from compiled import ISAS, compiled, needs_library

from duopool.engine.sampling_noise import gumbel_noise, louder_than, noise_keys
from duopool.kernels.cpu_library import Isa
from duopool.kernels.loud_indices import cpu

BOUNDS = torch.tensor([-1.5, 0.0, 2.0, 4.5, 9.0], dtype=torch.float64)


def noise_of(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    keys = noise_keys([3, -9, 1 << 62, 0, 12], [0, 7, 100_000, 1, 2], torch.device("cpu"))
    return keys, gumbel_noise(keys, torch.arange(size)).double()


@pytest.mark.parametrize("size", [1, 63, 64, 1000, 49152])
def test_no_loud_token_is_above_the_limit_and_few_others_are_below(size: int) -> None:
    _, noise = noise_of(size)
    uniform = -torch.expm1(-(-noise).exp())
    is_below = uniform * 2**31 - 0.5 < louder_than(BOUNDS).unsqueeze(1)
    is_louder = noise > BOUNDS.unsqueeze(1)
    assert bool((is_below | ~is_louder).all())
    assert int((is_below & ~is_louder).sum()) <= 2


@needs_library
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name.lower())
@pytest.mark.parametrize("size", [1, 63, 64, 1000, 49152])
def test_names_the_loud(isa: Isa, size: int) -> None:
    keys, noise = noise_of(size)
    found, counts = cpu.loud_indices(compiled(isa), keys, louder_than(BOUNDS), size=size, capacity=size)
    for row, bound in enumerate(BOUNDS.tolist()):
        count = int(counts[row])
        names = found[row, :count].tolist()
        assert names == sorted(set(names))
        loud = set((noise[row] > bound).nonzero().flatten().tolist())
        assert loud <= set(names)
        quiet = set((noise[row] < bound - 1e-4 * (1 + abs(bound))).nonzero().flatten().tolist())
        assert not quiet & set(names)


@needs_library
def test_counts_what_does_not_fit() -> None:
    keys, _ = noise_of(1000)
    _, counts = cpu.loud_indices(compiled(ISAS[-1]), keys, louder_than(BOUNDS), size=1000, capacity=3)
    assert int(counts[0]) > 900
