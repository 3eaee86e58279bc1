"""Which tokens of a row may be drawn: min-p, then top-k, then top-p.

Owns the rule that the kept set depends on the row's own values only. A bound is a value and everything at or above it
stays, so equal logits stay or go together. When every row keeps few tokens the result is the few, not the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from duopool.core.sampling_params import SamplingParams

SHORT_LIST = 1024
LONG_LIST = 8192
"""How many of a row's best tokens are looked at, first and then, before the whole row is sorted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """What the draw is among."""

    scores: Tensor
    """float32 [R, K]; -inf for a token that is out."""
    indices: Tensor
    """int64 [K] or [R, K]: the vocabulary index of each score."""


def keep_candidates(scaled_RV: Tensor, params: Sequence[SamplingParams]) -> Candidates:
    """Drop what each row's parameters exclude. `scaled_RV` is divided by the temperature and at most 0."""
    vocab_size = scaled_RV.shape[1]
    everything = torch.arange(vocab_size, device=scaled_RV.device)
    if all(_keeps_all(each, vocab_size) for each in params):
        return Candidates(scores=scaled_RV, indices=everything)
    free = [row for row, each in enumerate(params) if _keeps_all(each, vocab_size)]
    if free:
        # A row without limits wants the whole vocabulary anyway: bound the others and stay dense.
        bounds = torch.full((len(params), 1), -math.inf, device=scaled_RV.device)
        limited = [row for row in range(len(params)) if row not in set(free)]
        bounds[limited] = _bounds(scaled_RV[limited], [params[row] for row in limited])[0]
        return Candidates(scores=scaled_RV.masked_fill(scaled_RV < bounds, -math.inf), indices=everything)
    bounds, ordered, order = _bounds(scaled_RV, params)
    counts = (ordered >= bounds).sum(dim=1)
    width = int(counts.max())
    if width == ordered.shape[1] < vocab_size:
        # The short list may end amid equal logits.
        return Candidates(scores=scaled_RV.masked_fill(scaled_RV < bounds, -math.inf), indices=everything)
    short = ordered[:, :width]
    return Candidates(scores=short.masked_fill(short < bounds, -math.inf), indices=order[:, :width])


def _bounds(scaled_RV: Tensor, params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor, Tensor]:
    """(lowest kept value [R, 1], the row's best values in falling order [R, K], their indices [R, K])."""
    vocab_size = scaled_RV.shape[1]
    k = torch.tensor([_top_k(each, vocab_size) for each in params], device=scaled_RV.device).unsqueeze(1)
    widest = max(_top_k(each, vocab_size) for each in params)
    # Top-k everywhere says how many values can matter, and one more shows whether the last has an equal; else the lists
    # grow until they hold every row's nucleus.
    widths = [width for width in (SHORT_LIST, LONG_LIST) if width < vocab_size]
    if widest < vocab_size:
        widths = [min(widest + 1, vocab_size)]
    for width in widths:
        ordered, order = scaled_RV.topk(width, dim=1)
        bounds, is_enough = _bounds_within(scaled_RV, ordered, k, params)
        if is_enough:
            return bounds, ordered, order
    ordered, order = scaled_RV.sort(dim=1, descending=True)
    return _bounds_within(scaled_RV, ordered, k, params)[0], ordered, order


def _bounds_within(
    scaled_RV: Tensor, ordered_RK: Tensor, k: Tensor, params: Sequence[SamplingParams]
) -> tuple[Tensor, bool]:
    """The bounds as far as the best K values show them, and whether more values could change them."""
    width, vocab_size = ordered_RK.shape[1], scaled_RV.shape[1]
    min_p = scaled_RV.new_tensor([[each.min_p] for each in params])
    top_p = torch.tensor([[each.top_p] for each in params], dtype=torch.float64, device=scaled_RV.device)
    # The best value is 0, so a probability of min_p times the best stands at log(min_p); log(0) keeps everything.
    min_p_bounds = torch.where(min_p > 0, min_p.log() - 1e-6, -math.inf)
    kth = ordered_RK.gather(1, k.clamp(max=width) - 1)
    bounds = torch.maximum(torch.where(k <= width, kth, ordered_RK.new_tensor(-math.inf)), min_p_bounds)
    if all(each.top_p >= 1.0 for each in params):
        return bounds, bool((bounds >= ordered_RK[:, -1:]).all())

    # The nucleus is taken of what min-p and top-k leave; its mass is summed over the whole row, so that the bound does
    # not depend on how many values this batch looks at.
    weights = ordered_RK.exp().double().masked_fill_(ordered_RK < bounds, 0.0)
    total = scaled_RV.exp().masked_fill_(scaled_RV < bounds, 0.0).sum(dim=1, keepdim=True, dtype=torch.float64)
    is_listed = bounds >= ordered_RK[:, -1:]
    before = weights.cumsum(dim=1) - weights
    kept = (before < top_p * total).sum(dim=1, keepdim=True)
    last = ordered_RK.gather(1, kept.clamp(min=1, max=width) - 1)
    is_cut = (top_p < 1.0) & ((kept < width) | (width == vocab_size))
    bounds = torch.where(is_cut, torch.maximum(bounds, last), bounds)
    return bounds, bool((is_cut | is_listed).all())


def _top_k(params: SamplingParams, vocab_size: int) -> int:
    return params.top_k if 0 < params.top_k < vocab_size else vocab_size


def _keeps_all(params: SamplingParams, vocab_size: int) -> bool:
    return params.top_p >= 1.0 and params.min_p <= 0.0 and _top_k(params, vocab_size) == vocab_size
