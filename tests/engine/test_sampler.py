"""Laws of the sampler: what may be drawn, how often, and that a row's draw is its own affair."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duopool.core.sampling_params import SamplingParams
from duopool.core.step import NO_TOKEN, SampledToken, SampleSpec
from duopool.engine.logit_rules import rules_of
from duopool.engine.sampler import sample
from duopool.kernels.sample_tokens.noise import gumbel_noise, noise_keys
from duopool.kernels.sample_tokens.reference import MOST_LISTED
from duopool.kernels.sample_tokens.rules_reference import apply_rules

VOCAB = 50


def spec_of(
    *, prompt: Sequence[int] = (1, 2), output: Sequence[int] = (), eos: Sequence[int] = (), **params: object
) -> SampleSpec:
    return SampleSpec(
        params=SamplingParams(**params),  # type: ignore[arg-type]
        prompt_token_ids=prompt,
        output_token_ids=output,
        eos_token_ids=frozenset(eos),
    )


def logits_of(rows: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def draws(logits_V: torch.Tensor, count: int, **params: object) -> list[int]:
    """`count` draws from one row: the noise of positions 0, 1, 2, ... of one seed."""
    specs = [spec_of(output=[0] * position, **params) for position in range(count)]
    return [token.token_id for token in sample(logits_V.expand(count, -1), specs)]


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-6, 0.3, 1.0, 2.5]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    top_k=st.sampled_from([-1, 0, 1, 5, 49, 400]),
    min_p=st.sampled_from([0.0, 0.1, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, -0.4]),
    logit_bias=st.sampled_from([(), ((3, 4.0), (7, -100.0))]),
    min_tokens=st.sampled_from([0, 3]),
    max_tokens=st.just(8),
    seed=st.integers(-(2**63), 2**63 - 1),
    logprobs=st.sampled_from([None, 0, 3]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(PARAMS, min_size=1, max_size=6), st.integers(0, 5))
def test_a_row_is_sampled_the_same_alone_and_in_any_batch(params: list[SamplingParams], length: int) -> None:
    logits = logits_of(len(params))
    specs = [
        SampleSpec(params=each, prompt_token_ids=[1, 2], output_token_ids=[5] * length, eos_token_ids=frozenset({0}))
        for each in params
    ]
    before = logits.clone()
    together = sample(logits, specs)
    assert torch.equal(logits, before)
    assert together == [sample(logits[row : row + 1], [spec])[0] for row, spec in enumerate(specs)]
    assert together == sample(logits.flip(0), specs[::-1])[::-1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_no_number_gives_no_token_and_its_neighbours_their_own(bad: float, temperature: float) -> None:
    specs = [spec_of(temperature=temperature, top_p=0.9, top_k=5, logprobs=2, seed=row) for row in range(3)]
    logits = logits_of(3)
    alone = sample(logits, specs)
    logits[1, 7] = bad
    tokens = sample(logits, specs)
    assert tokens[1] == SampledToken(token_id=NO_TOKEN)
    assert (tokens[0], tokens[2]) == (alone[0], alone[2])
    logits[1] = bad
    assert sample(logits, specs)[1].token_id == NO_TOKEN


def test_noise_depends_on_seed_position_and_index_only() -> None:
    indices = torch.arange(1000)
    keys = noise_keys([7, 7, 8, -7], [0, 1, 0, 0], torch.device("cpu"))
    noise = gumbel_noise(keys, indices)
    assert len({tuple(row.tolist()) for row in noise}) == 4
    some = torch.tensor([[3, 999], [0, 5], [8, 1], [2, 2]])
    assert torch.equal(gumbel_noise(keys, some), noise.gather(1, some))
    assert torch.isfinite(noise).all()


def test_noise_is_pinned() -> None:
    """A stream is continued by other processes, so the noise is part of the protocol between versions."""
    noise = gumbel_noise(noise_keys([1234], [5], torch.device("cpu")), torch.tensor([0, 1, 49151]))
    torch.testing.assert_close(noise, torch.tensor([[1.876863, 0.36207, 0.912723]]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("temperature", "seed"), [(1.0, 1), (0.5, 2), (2.0, 3)])
def test_draws_follow_the_softmax(temperature: float, seed: int) -> None:
    """Chi-square over positions of one seed; the seeds are fixed, the bound is the 99.9 % point."""
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0, -2.0, 0.2, 1.5])
    count = 6000
    observed = torch.bincount(torch.tensor(draws(logits, count, temperature=temperature, seed=seed)), minlength=8)
    expected = (logits / temperature).softmax(0) * count
    assert float(((observed - expected) ** 2 / expected).sum()) < 24.3


def test_draws_over_seeds_follow_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5])
    count = 6000
    specs = [spec_of(seed=seed) for seed in range(count)]
    observed = torch.bincount(torch.tensor([t.token_id for t in sample(logits.expand(count, -1), specs)]), minlength=4)
    expected = logits.softmax(0) * count
    assert float(((observed - expected) ** 2 / expected).sum()) < 16.3


@pytest.mark.parametrize("spread", [0.0, 0.2, 1.0, 3.0, 8.0])
@pytest.mark.parametrize("top_p", [1.0, 0.97])
def test_the_best_of_many_is_found_without_giving_all_of_them_noise(spread: float, top_p: float) -> None:
    """Among flat and peaked rows, over more tokens than are ever listed."""
    vocab, rows = 3 * MOST_LISTED, 64 if top_p == 1 else 6
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(5)) * spread
    logits[:, ::3] = -math.inf
    specs = [spec_of(seed=row, output=[0] * row, temperature=0.7, top_p=top_p) for row in range(rows)]
    keys = noise_keys(range(rows), range(rows), torch.device("cpu"))
    scores = (logits - logits.amax(dim=1, keepdim=True)) / 0.7 + gumbel_noise(keys, torch.arange(vocab))
    if top_p < 1:
        for row in range(rows):
            out = sorted(set(range(vocab)) - plain_support(logits[row], 0, top_p, 0.0, 0.7))
            scores[row, out] = -math.inf
    assert [token.token_id for token in sample(logits, specs)] == scores.argmax(dim=1).tolist()
    for row in (0, rows - 1):
        assert sample(logits[row : row + 1], specs[row : row + 1])[0].token_id == int(scores[row].argmax())


def plain_support(logits_V: torch.Tensor, top_k: int, top_p: float, min_p: float, temperature: float) -> set[int]:
    """min-p, top-k, top-p in this order, one token after the other."""
    probabilities = (logits_V.double() / temperature).softmax(0)
    order = probabilities.argsort(descending=True).tolist()
    kept = [token for token in order if probabilities[token] >= min_p * probabilities[order[0]]]
    kept = kept[:top_k] if top_k > 0 else kept
    total, mass, nucleus = sum(float(probabilities[token]) for token in kept), 0.0, set()
    for token in kept:
        if mass >= top_p * total:
            break
        nucleus.add(token)
        mass += float(probabilities[token])
    return nucleus


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([0, 1, 3, 20]),
    st.sampled_from([0.3, 0.7, 0.95, 1.0]),
    st.sampled_from([0.0, 0.05, 0.5]),
    st.sampled_from([0.7, 1.0, 3.0]),
    st.integers(0, 1000),
)
def test_only_the_support_is_drawn(top_k: int, top_p: float, min_p: float, temperature: float, seed: int) -> None:
    logits = logits_of(1, seed)[0]
    allowed = plain_support(logits, top_k, top_p, min_p, temperature)
    drawn = draws(logits, 200, top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature, seed=seed)
    assert set(drawn) <= allowed
    if len(allowed) <= 3:
        likely = {t for t in allowed if float((logits / temperature).softmax(0)[t]) > 0.1}
        assert likely <= set(drawn)


def test_a_nucleus_beyond_the_short_list_is_exact() -> None:
    """Among equal rows in a batch with a narrow one, a wide nucleus is neither cut short nor widened."""
    vocab = 3 * MOST_LISTED
    logits = torch.linspace(0, -1, vocab)
    allowed = plain_support(logits, 0, 0.9, 0.0, 1.0)
    assert len(allowed) > MOST_LISTED
    wide = draws(logits, 400, top_p=0.9, seed=3)
    assert set(wide) <= allowed
    assert max(wide) > MOST_LISTED
    narrow = [spec_of(output=[0] * i, top_p=0.9, seed=3) for i in range(400)]
    mixed = sample(logits.expand(401, -1), [*narrow, spec_of(top_k=2, seed=1)])
    assert [token.token_id for token in mixed[:400]] == wide
    assert mixed[400].token_id in (0, 1)


def test_equal_logits_stay_or_go_together() -> None:
    logits = torch.zeros(2 * MOST_LISTED)
    assert len(set(draws(logits, 200, top_k=1, seed=1))) > 100


def test_rules_match_a_plain_reference() -> None:
    params = SamplingParams(
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        logit_bias=((4, 2.0), (6, -3.0)),
        min_tokens=5,
        max_tokens=9,
        stop_token_ids=(9,),
    )
    prompt, output = [1, 2, 2, 4], [3, 3, 4]
    spec = SampleSpec(
        params=params, prompt_token_ids=prompt, output_token_ids=output, eos_token_ids=frozenset({0, 10_000})
    )
    logits = logits_of(1)
    expected = logits[0].tolist()
    for token in (0, 9):
        expected[token] = -math.inf
    expected[4] += 2.0
    expected[6] -= 3.0
    for token in {*prompt, *output}:
        expected[token] = expected[token] / 1.5 if expected[token] > 0 else expected[token] * 1.5
    for token in set(output):
        expected[token] -= 0.5 + 0.25 * output.count(token)
    torch.testing.assert_close(ruled(logits[0], spec), torch.tensor(expected))
    late = msgspec.structs.replace(spec, output_token_ids=[3] * 5)
    assert torch.isfinite(ruled(logits[0], late)).all()


def ruled(logits_V: torch.Tensor, spec: SampleSpec) -> torch.Tensor:
    rules = rules_of(spec, None)
    assert rules is not None
    changed = logits_V.clone()
    apply_rules(changed, rules)
    return changed


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_ending_token_is_not_sampled_before_min_tokens(temperature: float) -> None:
    logits = torch.zeros(1, 4)
    logits[0, 2] = 50.0
    early = spec_of(temperature=temperature, min_tokens=2, output=[1], eos=[2])
    late = spec_of(temperature=temperature, min_tokens=2, output=[1, 1], eos=[2])
    assert sample(logits, [early])[0].token_id != 2
    assert sample(logits, [late])[0].token_id == 2


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = logits_of(2)
    specs = [
        spec_of(temperature=0.2, top_k=2, logit_bias=((0, 100.0),), logprobs=3),
        spec_of(temperature=0, logprobs=0),
    ]
    raw = logits.log_softmax(-1)
    biased, greedy = (token.logprob for token in sample(logits, specs))
    assert biased is not None
    assert greedy is not None
    assert biased.token_id == 0
    assert biased.logprob == pytest.approx(float(raw[0, 0]), abs=1e-5)
    assert biased.rank == 1 + int((raw[0] > raw[0, 0]).sum())
    assert [token for token, _ in biased.top] == raw[0].topk(3).indices.tolist()
    assert (greedy.rank, greedy.top) == (1, ())


def test_an_extreme_row_still_gives_a_token() -> None:
    logits = torch.full((1, VOCAB), -math.inf)
    logits[0, 7] = 1e30
    for params in ({}, {"top_p": 0.1}, {"top_k": 3}, {"min_p": 1.0}, {"temperature": 0.0001}):
        assert sample(logits, [spec_of(**params)])[0].token_id == 7


@pytest.mark.parametrize("limit", [{}, {"min_p": 0.5}, {"top_k": 3}, {"top_p": 0.5}])
def test_a_row_that_rules_make_infinite_still_gives_a_token(limit: dict[str, float]) -> None:
    """A penalty divides by next to nothing, or a minimum length forbids all there is."""
    penalised = spec_of(prompt=[3, 5], temperature=1.0, repetition_penalty=1e-38, **limit)
    banned = spec_of(eos=range(VOCAB), temperature=1.0, min_tokens=3, max_tokens=8, **limit)
    logits = logits_of(2).abs() * 100 + 1
    for specs in ([penalised], [banned], [penalised, banned]):
        tokens = sample(logits[: len(specs)], specs)
        assert all(0 <= token.token_id < VOCAB for token in tokens)
    assert sample(logits[:1], [penalised])[0].token_id in (3, 5)
