"""The kernel draws the tokens that torch draws, whatever a row's parameters are and whatever stands beside it."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from compiled import ISAS, compiled, needs_library
from hypothesis import given, settings
from hypothesis import strategies as st

from duopool.kernels import ops
from duopool.kernels.cpu_library import Isa
from duopool.kernels.sample_tokens import cpu, reference
from duopool.kernels.sample_tokens.draw import Draw
from duopool.kernels.sample_tokens.reference import MOST_LISTED
from duopool.kernels.sample_tokens.rules import Rules
from duopool.kernels.sample_tokens.rules_reference import apply_rules


def rules_of(
    forbidden: Sequence[int],
    bias: Sequence[tuple[int, float]],
    penalties: tuple[float, float, float],
    seen: Sequence[int],
    output: Sequence[int],
    allowed: np.ndarray | None = None,
) -> Rules:
    repetition, presence, frequency = penalties
    return Rules(
        forbidden=array("q", forbidden),
        bias_tokens=array("q", [token for token, _ in bias]),
        bias=array("f", [value for _, value in bias]),
        repetition_penalty=repetition,
        seen=array("q", seen),
        presence_penalty=presence,
        frequency_penalty=frequency,
        output=array("q", output),
        allowed=allowed,
    )


TOKENS = st.integers(-3, 400)
RULES = st.builds(
    rules_of,
    st.lists(TOKENS, max_size=5),
    st.lists(st.tuples(TOKENS, st.sampled_from([-100.0, -2.5, 0.1, 60.0])), max_size=5),
    st.tuples(
        st.sampled_from([1.0, 1.0, 1.3, 0.6, 1e-38]), st.sampled_from([0.0, 2.0]), st.sampled_from([0.0, 0.7, -1.1])
    ),
    st.lists(TOKENS, max_size=40),
    st.lists(TOKENS, max_size=40),
)
DRAWS = st.builds(
    Draw,
    temperature=st.sampled_from([0.0, 1e-6, 1e-4, 0.3, 1.0, 2.5, 100.0]),
    top_p=st.sampled_from([0.05, 0.5, 0.93, 0.9999, 1.0]),
    min_p=st.sampled_from([0.0, 0.0, 0.003, 0.1, 1.0]),
    top_k=st.sampled_from([-1, 0, 0, 1, 5, 49, 40_000]),
    seed=st.integers(-(2**63), 2**63 - 1),
    position=st.integers(0, 2**31),
    rules=st.none() | RULES,
)


@needs_library
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name.lower())
@settings(max_examples=60, deadline=None)
@given(
    draws=st.lists(DRAWS, min_size=1, max_size=6),
    size=st.sampled_from([1, 3, 16, 17, 300, 3 * MOST_LISTED]),
    spread=st.sampled_from([0.1, 1.0, 5.0, 30.0]),
    ruled_out=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 1 << 30),
)
def test_draws_what_torch_draws(
    isa: Isa, draws: list[Draw], size: int, spread: float, ruled_out: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(draws), size, generator=generator) * spread
    logits[torch.rand(len(draws), size, generator=generator) < ruled_out] = -math.inf
    logits[:, seed % size] = spread
    expected, expected_best = reference.sample_tokens(logits, draws)
    tokens, best = cpu.sample_tokens(compiled(isa), logits, draws)
    assert tokens == expected
    assert best == expected_best
    alone = [cpu.sample_tokens(compiled(isa), logits[row : row + 1], [draw]) for row, draw in enumerate(draws)]
    assert alone == [([token], [most]) for token, most in zip(tokens, best, strict=True)]


@needs_library
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name.lower())
@settings(max_examples=60, deadline=None)
@given(
    rules=RULES,
    size=st.sampled_from([1, 17, 300]),
    part=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_rules_make_of_a_row_what_torch_makes_of_it(isa: Isa, rules: Rules, size: int, part: float, seed: int) -> None:
    """A token at a time: what all others are forbidden beside is drawn exactly if the rules leave it."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, size, generator=generator) * 5
    masked = rules._replace(allowed=(torch.rand(size, generator=generator) < part).numpy())
    before = logits.clone()
    for each in (rules, masked):
        changed = logits[0].clone()
        apply_rules(changed, each)
        (token,), (best,) = cpu.sample_tokens(compiled(isa), logits, [Draw(0.0, 1.0, 0.0, 0, 1, 2, each)])
        assert (token, best) == (int(changed.argmax()), float(logits.max()))
        # The largest is taken away, one after the other: the order of all the logits is torch's.
        taken: list[int] = []
        while len(taken) < min(size, 12) and changed.amax() > -math.inf:
            taken.append(int(changed.argmax()))
            changed[taken[-1]] = -math.inf
        left = each
        for expected in taken:
            (token,), _ = cpu.sample_tokens(compiled(isa), logits, [Draw(0.0, 1.0, 0.0, 0, 1, 2, left)])
            assert token == expected
            left = left._replace(allowed=without(left.allowed, token, size))
    assert torch.equal(logits, before)


def without(allowed: np.ndarray | None, token: int, size: int) -> np.ndarray:
    rest = np.ones(size, dtype=np.bool_) if allowed is None else allowed.copy()
    rest[token] = False
    return rest


@needs_library
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name.lower())
@pytest.mark.parametrize("top_p", [1.0, 0.999999])
def test_flat_rows_are_drawn_from_far_beyond_the_list(isa: Isa, top_p: float) -> None:
    """A vocabulary of which most is kept: the marks leave few contenders, the winner among them."""
    rows, size = 24, 49_152
    logits = torch.randn(rows, size, generator=torch.Generator().manual_seed(3)) * 0.1
    draws = [Draw(1.0, top_p, 0.0, 0, seed, 7 * seed) for seed in range(rows)]
    tokens, _ = cpu.sample_tokens(compiled(isa), logits, draws)
    assert tokens == reference.sample_tokens(logits, draws)[0]
    assert len(set(tokens)) > rows // 2


@needs_library
@pytest.mark.parametrize("implementation", ["compiled", "torch"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_with_a_nan_says_so_and_its_neighbours_do_not(implementation: str, temperature: float) -> None:
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(1))
    draws = [Draw(temperature, 0.9, 0.0, 0, seed, 0) for seed in range(3)]
    expected = reference.sample_tokens(logits, draws)[0]
    logits[1, 40] = math.nan
    call = ops.sample_tokens if implementation == "compiled" else reference.sample_tokens
    tokens, best = call(logits, draws)
    assert [math.isnan(most) for most in best] == [False, True, False]
    assert (tokens[0], tokens[2]) == (expected[0], expected[2])


@needs_library
@pytest.mark.parametrize("implementation", ["compiled", "torch"])
def test_infinite_logits_are_drawn_among_themselves(implementation: str) -> None:
    """Rules may forbid everything, or make some tokens infinitely likely."""
    logits = torch.full((2, 50), -math.inf)
    logits[1] = 1.0
    logits[1, [3, 30]] = math.inf
    draws = [Draw(1.0, 0.9, 0.0, 5, 2, 0)] * 2
    tokens, best = (ops.sample_tokens if implementation == "compiled" else reference.sample_tokens)(logits, draws)
    assert best == [-math.inf, math.inf]
    assert 0 <= tokens[0] < 50
    assert tokens[1] in (3, 30)


@needs_library
def test_rows_may_lie_apart() -> None:
    apart = torch.randn(5, 300, generator=torch.Generator().manual_seed(1))[:, 100:203]
    draws = [Draw(0.7, 0.9, 0.0, 0, seed, 0) for seed in range(5)]
    for logits in (apart, apart.t().contiguous().t()):
        assert cpu.sample_tokens(compiled(ISAS[-1]), logits, draws) == reference.sample_tokens(logits, draws)


def test_logits_of_another_type_and_rows_without_a_draw_are_refused() -> None:
    """The kernel would read memory that is not theirs."""
    logits, draws = torch.zeros(2, 50), [Draw(0.0, 1.0, 0.0, 0, seed, 0) for seed in range(3)]
    with pytest.raises(ValueError, match=r"2 rows of torch\.bfloat16"):
        ops.sample_tokens(logits.bfloat16(), draws[:2])
    for wrong in (draws[:1], draws):
        with pytest.raises(ValueError, match=f"2 rows .* {len(wrong)} draws"):
            ops.sample_tokens(logits, wrong)
