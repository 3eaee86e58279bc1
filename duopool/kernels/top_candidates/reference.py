"""`top_candidates` in torch: what the kernels are compared with, and what runs where there is none."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LIST_LENGTHS = (1024, 8192)
"""How many of a row's best scores are looked at, first and then, before the whole row is sorted."""


def top_candidates(
    scores_RV: Tensor, floors_R: Tensor, top_k_R: Tensor, top_p_R: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which tokens of each row may be drawn: (scores [R, K], indices [R, K], counts [R], bounds [R]).

    Scores are logits over temperature with the row's largest taken off, so none is above 0; -inf is out. Kept are those
    of at least `floors_R` (float32), of these the `top_k_R` (int64) best, of these the fewest that have `top_p_R`
    (float64) of their probability. `bounds` is the lowest that is kept, and everything equal to it is kept too. K is at
    most `capacity`; behind a row's candidates stand -inf and 0. A row that is not listed whole has a count above
    `capacity`, and its bound alone is of use. A row's answer does not depend on its neighbours.
    """
    bounds_R1, ordered_RK, order_RK = _bounds(
        scores_RV, floors_R.unsqueeze(1), top_k_R.unsqueeze(1), top_p_R.unsqueeze(1)
    )
    width = min(capacity, ordered_RK.shape[1])
    best, indices = ordered_RK[:, :width], order_RK[:, :width]
    is_out = (best < bounds_R1) | best.isneginf()
    counts = ((scores_RV >= bounds_R1) & ~scores_RV.isneginf()).sum(dim=1)
    # A list may end amid equal scores.
    counts = counts.where(counts <= width, capacity + 1)
    return best.masked_fill(is_out, -math.inf), indices.masked_fill(is_out, 0), counts, bounds_R1.squeeze(1)


def _bounds(scores_RV: Tensor, floors: Tensor, top_k: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(lowest kept score [R, 1], the row's best scores in falling order [R, K], their indices [R, K])."""
    vocab_size, widest = scores_RV.shape[1], int(top_k.max())
    # Top-k everywhere says how many scores can matter, and one more shows whether the last has an equal; else the lists
    # grow until they hold every row's nucleus.
    widths = [width for width in LIST_LENGTHS if width < vocab_size]
    if widest < vocab_size:
        widths = [min(widest + 1, vocab_size)]
    for width in widths:
        ordered, order = scores_RV.topk(width, dim=1)
        bounds, is_enough = _bounds_within(scores_RV, ordered, floors, top_k, top_p)
        if is_enough:
            return bounds, ordered, order
    ordered, order = scores_RV.sort(dim=1, descending=True)
    return _bounds_within(scores_RV, ordered, floors, top_k, top_p)[0], ordered, order


def _bounds_within(
    scores_RV: Tensor, ordered_RK: Tensor, floors: Tensor, top_k: Tensor, top_p: Tensor
) -> tuple[Tensor, bool]:
    """The bounds as far as the best K scores show them, and whether more scores could change them."""
    width, vocab_size = ordered_RK.shape[1], scores_RV.shape[1]
    kth = ordered_RK.gather(1, top_k.clamp(max=width) - 1)
    bounds = torch.maximum(torch.where(top_k <= width, kth, ordered_RK.new_tensor(-math.inf)), floors)
    is_listed = bounds >= ordered_RK[:, -1:]
    if bool((top_p >= 1).all()):
        return bounds, bool(is_listed.all())

    # The nucleus is taken of what is left so far; its mass is summed over the whole row, so that the bound does not
    # depend on how many scores this batch looks at.
    weights = ordered_RK.exp().double().masked_fill_(ordered_RK < bounds, 0.0)
    total = scores_RV.exp().masked_fill_(scores_RV < bounds, 0.0).sum(dim=1, keepdim=True, dtype=torch.float64)
    before = weights.cumsum(dim=1) - weights
    kept = (before < top_p * total).sum(dim=1, keepdim=True)
    last = ordered_RK.gather(1, kept.clamp(min=1, max=width) - 1)
    is_cut = (top_p < 1.0) & ((kept < width) | (width == vocab_size))
    bounds = torch.where(is_cut, torch.maximum(bounds, last), bounds)
    return bounds, bool((is_cut | is_listed).all())
