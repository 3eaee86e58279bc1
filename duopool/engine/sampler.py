"""Chooses the next token of each row of logits.

Owns the order of the steps, which is vLLM's: raw log-probabilities aside, then minimum length, logit bias, penalties
and grammar on the logits; greedy rows take the best; the others divide by the temperature, drop candidates (min-p,
top-k, top-p) and take the best of logit plus Gumbel noise, which is a draw from the softmax. Everything is a pure
function of a row's logits and its SampleSpec: no state, no generator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from duopool.core.sampling_params import SamplingParams
from duopool.core.step import NO_TOKEN, SampledToken, SampleSpec
from duopool.engine.candidates import Candidates, keep_candidates, keeps_all
from duopool.engine.grammar import GrammarMasks
from duopool.engine.logit_rules import apply_rules, needs_rules
from duopool.engine.sampling_noise import gumbel_noise, louder_than, noise_keys
from duopool.engine.token_logprobs import token_logprobs
from duopool.kernels import ops

GREEDY_BELOW = 1e-5
"""Lower temperatures are greedy: dividing by them would overflow."""
LIKELY = SamplingParams(min_p=math.exp(-9.0))
"""Tokens that get their noise at once when nothing else limits the choice."""
MOST_LOUD = 512
ROUNDING = 1e-3
"""More than float32 can be off by in a score with noise."""
NOISE_AT_ONCE = 1 << 18
"""Elements hashed in one go, so that the scratch stays in the processor's cache."""


def sample(logits_RV: Tensor, specs: Sequence[SampleSpec], masks: GrammarMasks | None = None) -> list[SampledToken]:
    """One token per row, with its log-probability where the parameters ask for it; `masks` for rows with a grammar."""
    if not specs:
        return []
    logits = logits_RV.float()
    is_sane = logits.amax(dim=-1).isfinite()  # the largest of a row with a NaN is NaN
    if not is_sane.all():
        logits = logits.masked_fill(~is_sane.unsqueeze(1), 0.0)
    chosen = _choose(logits, specs, masks).masked_fill(~is_sane, NO_TOKEN).tolist()
    logprobs: dict[int, SampledToken] = {}
    rows = [row for row, spec in enumerate(specs) if spec.params.logprobs is not None and chosen[row] != NO_TOKEN]
    if rows:
        most = max(specs[row].params.logprobs or 0 for row in rows)
        for row, found in zip(rows, token_logprobs(logits[rows], [chosen[row] for row in rows], most), strict=True):
            top = found.top[: specs[row].params.logprobs or 0]
            found = type(found)(found.token_id, found.logprob, found.rank, top)
            logprobs[row] = SampledToken(token_id=chosen[row], logprob=found)
    return [logprobs.get(row) or SampledToken(token_id=token_id) for row, token_id in enumerate(chosen)]


def _choose(logits: Tensor, specs: Sequence[SampleSpec], masks: GrammarMasks | None) -> Tensor:
    """int64 [R]"""
    ruled = [row for row, spec in enumerate(specs) if needs_rules(spec)]
    if ruled:
        logits = logits.clone()
        logits[ruled] = apply_rules(logits[ruled], [specs[row] for row in ruled], masks)
    random = [row for row, spec in enumerate(specs) if spec.params.temperature >= GREEDY_BELOW]
    if not random:
        return logits.argmax(dim=-1)
    drawn = _draw(logits if len(random) == len(specs) else logits[random], [specs[row] for row in random])
    if len(random) == len(specs):
        return drawn
    chosen = logits.argmax(dim=-1)
    chosen[random] = drawn
    return chosen


def _draw(logits: Tensor, specs: Sequence[SampleSpec]) -> Tensor:
    params: list[SamplingParams] = [spec.params for spec in specs]
    temperatures = torch.tensor([each.temperature for each in params], device=logits.device).unsqueeze(1)
    # Moving the best logit to 0 first keeps a small temperature from overflowing.
    best = logits.amax(dim=-1, keepdim=True)
    scaled = (logits - best).div_(temperatures)
    if not best.isfinite().all():
        # A bias without bounds, or rules that leave nothing: what is as good as the best is a candidate all the same.
        scaled.nan_to_num_(nan=0.0, neginf=-math.inf)
    keys = noise_keys([each.seed for each in params], [len(spec.output_token_ids) for spec in specs], logits.device)
    free = [row for row, each in enumerate(params) if keeps_all(each, scaled.shape[1])]
    if not free:
        return _best_with_noise(keep_candidates(scaled, params), keys)
    drawn = torch.empty(len(params), dtype=torch.int64, device=scaled.device)
    drawn[free] = _draw_of_all(scaled[free], keys[free])
    if limited := sorted(set(range(len(params))) - set(free)):
        kept = keep_candidates(scaled[limited], [params[row] for row in limited])
        drawn[limited] = _best_with_noise(kept, keys[limited])
    return drawn


def _draw_of_all(scaled_RV: Tensor, keys_R2: Tensor) -> Tensor:
    """The winner among all tokens. Where there is a kernel, most of them get no noise because they cannot win.

    The best of the likely tokens is found first; an unlikely one beats it only with noise so loud that few have it.
    """
    rows, vocab_size = scaled_RV.shape
    likely = keep_candidates(scaled_RV, [LIKELY] * rows)
    if likely.indices.dim() == 2:
        best, token_ids = _best_score_with_noise(likely, keys_R2)
        limits = louder_than(best.double() - math.log(LIKELY.min_p) - ROUNDING)
        found = ops.loud_indices(keys_R2, limits, size=vocab_size, capacity=MOST_LOUD)
        if found is not None and int(found[1].max()) <= MOST_LOUD:
            # What is not filled is token 0, which is as good a candidate as any.
            loud = Candidates(scores=scaled_RV.gather(1, found[0]), indices=found[0])
            best_of_loud, loud_ids = _best_score_with_noise(loud, keys_R2)
            return token_ids.where(best >= best_of_loud, loud_ids)
    everything = torch.arange(vocab_size, device=scaled_RV.device)
    return _best_with_noise(Candidates(scores=scaled_RV, indices=everything), keys_R2)


def _best_score_with_noise(kept: Candidates, keys_R2: Tensor) -> tuple[Tensor, Tensor]:
    """(score with noise, token id) of the best of few candidates [R, K]."""
    best, winner = (kept.scores + gumbel_noise(keys_R2, kept.indices)).max(dim=-1, keepdim=True)
    return best.squeeze(1), kept.indices.gather(1, winner).squeeze(1)


def _best_with_noise(kept: Candidates, keys_R2: Tensor) -> Tensor:
    rows_at_once = max(1, NOISE_AT_ONCE // kept.scores.shape[1])
    best = []
    for first in range(0, len(kept.scores), rows_at_once):
        rows = slice(first, first + rows_at_once)
        indices = kept.indices if kept.indices.dim() == 1 else kept.indices[rows]
        winner = (kept.scores[rows] + gumbel_noise(keys_R2[rows], indices)).argmax(dim=-1, keepdim=True)
        best.append(winner if indices.dim() == 1 else indices.gather(1, winner))
    return torch.cat(best).squeeze(1)
