"""`sample_tokens` in torch: what the kernel is compared with, and what runs where there is none."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from duopool.kernels.sample_tokens.draw import GREEDY_BELOW, Draw, Drawn
from duopool.kernels.sample_tokens.noise import gumbel_noise, noise_keys
from duopool.kernels.sample_tokens.rules_reference import apply_rules
from duopool.kernels.top_candidates.reference import top_candidates

MOST_LISTED = 4096
"""Rows that keep more are drawn over the whole vocabulary."""
NOISE_AT_ONCE = 1 << 18
"""Elements hashed in one go, so that the scratch stays in the processor's cache."""


def sample_tokens(logits_RV: Tensor, draws: Sequence[Draw]) -> Drawn:
    """See `duopool.kernels.ops.sample_tokens`."""
    best, likeliest = logits_RV.max(dim=-1)
    values = best.tolist()
    rules = {row: draw.rules for row, draw in enumerate(draws) if draw.rules and math.isfinite(values[row])}
    if rules:
        logits_RV = logits_RV.clone()
        for row, each in rules.items():
            apply_rules(logits_RV[row], each)
        best, likeliest = logits_RV.max(dim=-1)
    tokens = likeliest.tolist()
    random = [row for row, draw in enumerate(draws) if draw.temperature >= GREEDY_BELOW and not math.isnan(values[row])]
    if random:
        drawn = _draw(logits_RV[random], best[random], [draws[row] for row in random])
        for row, token in zip(random, drawn.tolist(), strict=True):
            tokens[row] = token
    return Drawn(tokens, values)


def _draw(logits_RV: Tensor, best_R: Tensor, draws: Sequence[Draw]) -> Tensor:
    """int64 [R]"""
    device, vocab_size = logits_RV.device, logits_RV.shape[1]
    temperatures = torch.tensor([draw.temperature for draw in draws], device=device).unsqueeze(1)
    # Moving the best logit to 0 first keeps a small temperature from overflowing.
    scaled = (logits_RV - best_R.unsqueeze(1)).div_(temperatures)
    # Where rules made the best infinite, what is as good as it stands at 0 too.
    scaled.nan_to_num_(nan=0.0, neginf=-math.inf)
    # The best score is 0, so a probability of min_p times the best stands at log(min_p).
    floors = [math.log(draw.min_p) - 1e-6 if draw.min_p > 0 else -math.inf for draw in draws]
    top_k = [draw.top_k if 0 < draw.top_k < vocab_size else vocab_size for draw in draws]
    scores, indices, counts, bounds = top_candidates(
        scaled,
        torch.tensor(floors, dtype=torch.float32, device=device),
        torch.tensor(top_k, device=device),
        torch.tensor([draw.top_p for draw in draws], dtype=torch.float64, device=device),
        min(MOST_LISTED, vocab_size),
    )
    keys = noise_keys([draw.seed for draw in draws], [draw.position for draw in draws], device)
    if int(counts.max()) <= scores.shape[1]:
        return indices.gather(1, _loudest(scores, indices, keys)).squeeze(1)
    everything = torch.arange(vocab_size, device=device).expand(len(draws), -1)
    return _loudest(scaled.masked_fill(scaled < bounds.unsqueeze(1), -math.inf), everything, keys).squeeze(1)


def _loudest(scores_RK: Tensor, indices_RK: Tensor, keys_R2: Tensor) -> Tensor:
    """int64 [R, 1]: where the largest score with its token's noise stands."""
    at_once = max(1, NOISE_AT_ONCE // scores_RK.shape[1])
    parts = zip(*(torch.split(each, at_once) for each in (scores_RK, indices_RK, keys_R2)), strict=True)
    heard = [scores + gumbel_noise(keys, indices) for scores, indices, keys in parts]
    return torch.cat([each.argmax(dim=-1, keepdim=True) for each in heard])
