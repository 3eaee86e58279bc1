"""Chooses the next token of each row of logits.

Owns the order of the steps, which is vLLM's: raw log-probabilities aside, then minimum length, logit bias, penalties
and grammar on the logits; greedy rows take the best; the others divide by the temperature, drop candidates (min-p,
top-k, top-p) and take the best of logit plus Gumbel noise, which is a draw from the softmax. Everything is a pure
function of a row's logits and its SampleSpec: no state, no generator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from duopool.core.sampling_params import SamplingParams
from duopool.core.step import NO_TOKEN, SampledToken, SampleSpec
from duopool.engine.candidates import Candidates, keep_candidates, keeps_all
from duopool.engine.grammar import GrammarMasks
from duopool.engine.logit_rules import apply_rules, needs_rules
from duopool.engine.sampling_noise import gumbel_noise, noise_keys
from duopool.engine.token_logprobs import token_logprobs
from duopool.kernels import ops

GREEDY_BELOW = 1e-5
"""Lower temperatures are greedy: dividing by them would overflow."""
NUM_PROBES = 512
"""Tokens that get their noise at once when the choice is among many."""
MOST_CONTENDERS = 2048
ROUNDING = 1e-3
"""More than float32 can be off by in a score with noise."""
NOISE_AT_ONCE = 1 << 18
"""Elements hashed in one go, so that the scratch stays in the processor's cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Logits with the best of each row."""

    logits: Tensor
    """float32 [R, V]"""
    best: Tensor
    """float32 [R]"""
    likeliest: Tensor
    """int64 [R]: the first token that has it."""

    @classmethod
    def of(cls, logits: Tensor) -> Self:
        best, likeliest = ops.best_tokens(logits)
        return cls(logits=logits, best=best, likeliest=likeliest)

    def pick(self, rows: list[int]) -> _Rows:
        if len(rows) == len(self.best):
            return self
        return _Rows(logits=self.logits[rows], best=self.best[rows], likeliest=self.likeliest[rows])


def sample(logits_RV: Tensor, specs: Sequence[SampleSpec], masks: GrammarMasks | None = None) -> list[SampledToken]:
    """One token per row, with its log-probability where the parameters ask for it; `masks` for rows with a grammar."""
    if not specs:
        return []
    rows_of_logits = _Rows.of(logits_RV.float())
    insane = [row for row, best in enumerate(rows_of_logits.best.tolist()) if not math.isfinite(best)]
    if insane:  # the largest of a row with a NaN is NaN
        logits = rows_of_logits.logits.clone()
        logits[insane] = 0.0
        rows_of_logits = _Rows.of(logits)
    logits = rows_of_logits.logits
    chosen: list[int] = _choose(rows_of_logits, specs, masks).tolist()
    for row in insane:
        chosen[row] = NO_TOKEN
    logprobs: dict[int, SampledToken] = {}
    rows = [row for row, spec in enumerate(specs) if spec.params.logprobs is not None and chosen[row] != NO_TOKEN]
    if rows:
        most = max(specs[row].params.logprobs or 0 for row in rows)
        for row, found in zip(rows, token_logprobs(logits[rows], [chosen[row] for row in rows], most), strict=True):
            top = found.top[: specs[row].params.logprobs or 0]
            found = type(found)(found.token_id, found.logprob, found.rank, top)
            logprobs[row] = SampledToken(token_id=chosen[row], logprob=found)
    return [logprobs.get(row) or SampledToken(token_id=token_id) for row, token_id in enumerate(chosen)]


def _choose(rows: _Rows, specs: Sequence[SampleSpec], masks: GrammarMasks | None) -> Tensor:
    """int64 [R]"""
    ruled = [row for row, spec in enumerate(specs) if needs_rules(spec)]
    if ruled:
        logits = rows.logits.clone()
        logits[ruled] = apply_rules(logits[ruled], [specs[row] for row in ruled], masks)
        rows = _Rows.of(logits)
    random = [row for row, spec in enumerate(specs) if spec.params.temperature >= GREEDY_BELOW]
    if not random:
        return rows.likeliest
    drawn = _draw(rows.pick(random), [specs[row] for row in random])
    if len(random) == len(specs):
        return drawn
    chosen = rows.likeliest.clone()
    chosen[random] = drawn
    return chosen


def _draw(rows: _Rows, specs: Sequence[SampleSpec]) -> Tensor:
    params: list[SamplingParams] = [spec.params for spec in specs]
    temperatures = torch.tensor([each.temperature for each in params], device=rows.logits.device).unsqueeze(1)
    # Moving the best logit to 0 first keeps a small temperature from overflowing.
    scaled = (rows.logits - rows.best.unsqueeze(1)).div_(temperatures)
    if not rows.best.isfinite().all():
        # A bias without bounds, or rules that leave nothing: what is as good as the best is a candidate all the same.
        scaled.nan_to_num_(nan=0.0, neginf=-math.inf)
    keys = noise_keys([each.seed for each in params], [len(spec.output_token_ids) for spec in specs], scaled.device)
    is_free = [keeps_all(each, scaled.shape[1]) for each in params]
    if all(is_free):
        return _draw_of_many(scaled, rows.likeliest, keys)
    drawn = torch.empty(len(params), dtype=torch.int64, device=scaled.device)
    free = [row for row, is_one in enumerate(is_free) if is_one]
    limited = [row for row, is_one in enumerate(is_free) if not is_one]
    if free:
        drawn[free] = _draw_of_many(scaled[free], rows.likeliest[free], keys[free])
    kept = keep_candidates(scaled[limited] if free else scaled, [params[row] for row in limited])
    if kept.is_listed:
        drawn[limited] = _best_with_noise(kept, keys[limited])
    else:
        drawn[limited] = _draw_of_many(kept.scores, rows.likeliest[limited], keys[limited])
    return drawn


def _draw_of_many(scaled_RV: Tensor, likeliest_R: Tensor, keys_R2: Tensor) -> Tensor:
    """The winner among all tokens above -inf. Where there is a kernel, most get no noise because they cannot win.

    The likeliest token and some from all over the vocabulary set a mark; few others have noise loud enough to pass it.
    """
    vocab_size = scaled_RV.shape[1]
    everything = torch.arange(vocab_size, device=scaled_RV.device)
    every = slice(None, None, -(-vocab_size // NUM_PROBES))
    probes = Candidates(scores=scaled_RV[:, every], indices=everything[every])
    likeliest = likeliest_R.unsqueeze(1)
    marks = torch.maximum(
        _scores_with_noise(probes, keys_R2).amax(dim=-1),
        _scores_with_noise(Candidates(scores=scaled_RV.gather(1, likeliest), indices=likeliest), keys_R2).squeeze(1),
    )
    found = ops.contenders(scaled_RV, keys_R2, marks - ROUNDING, capacity=MOST_CONTENDERS)
    if found is None or (most := int(found[1].max())) > MOST_CONTENDERS:
        return _best_with_noise(Candidates(scores=scaled_RV, indices=everything), keys_R2)
    # What a row does not fill is token 0, which is a contender like any.
    indices = found[0][:, :most]
    return _best_with_noise(Candidates(scores=scaled_RV.gather(1, indices), indices=indices), keys_R2)


def _scores_with_noise(some: Candidates, keys_R2: Tensor) -> Tensor:
    return some.scores + gumbel_noise(keys_R2, some.indices)


def _best_with_noise(kept: Candidates, keys_R2: Tensor) -> Tensor:
    rows_at_once = max(1, NOISE_AT_ONCE // kept.scores.shape[1])
    best = []
    for first in range(0, len(kept.scores), rows_at_once):
        rows = slice(first, first + rows_at_once)
        some = Candidates(scores=kept.scores[rows], indices=kept.indices[rows] if kept.is_listed else kept.indices)
        winner = _scores_with_noise(some, keys_R2[rows]).argmax(dim=-1, keepdim=True)
        best.append(some.indices.gather(1, winner) if kept.is_listed else winner)
    return torch.cat(best).squeeze(1)
