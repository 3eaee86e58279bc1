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
from duopool.kernels import ops

MOST_LISTED = 4096
"""Rows that keep more are drawn over the whole vocabulary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """What the draw is among."""

    scores: Tensor
    """float32 [R, K]; -inf for a token that is out."""
    indices: Tensor
    """int64 [K] or [R, K]: the vocabulary index of each score."""

    @property
    def is_listed(self) -> bool:
        """Whether each row lists its own few tokens; otherwise all rows stand over the same ones."""
        return self.indices.dim() == 2


def keep_candidates(scaled_RV: Tensor, params: Sequence[SamplingParams]) -> Candidates:
    """Drop what each row's parameters exclude. `scaled_RV` is divided by the temperature and at most 0."""
    vocab_size, device = scaled_RV.shape[1], scaled_RV.device
    # The best value is 0, so a probability of min_p times the best stands at log(min_p).
    floors = [math.log(each.min_p) - 1e-6 if each.min_p > 0 else -math.inf for each in params]
    scores, indices, counts, bounds = ops.top_candidates(
        scaled_RV,
        torch.tensor(floors, dtype=torch.float32, device=device),
        torch.tensor([_top_k(each, vocab_size) for each in params], device=device),
        torch.tensor([each.top_p for each in params], dtype=torch.float64, device=device),
        capacity=min(MOST_LISTED, vocab_size),
    )
    width = int(counts.max())
    if width <= scores.shape[1]:
        return Candidates(scores=scores[:, :width], indices=indices[:, :width])
    everything = torch.arange(vocab_size, device=device)
    return Candidates(scores=scaled_RV.masked_fill(scaled_RV < bounds.unsqueeze(1), -math.inf), indices=everything)


def keeps_all(params: SamplingParams, vocab_size: int) -> bool:
    """Whether nothing of a row of `vocab_size` logits is dropped."""
    return params.top_p >= 1.0 and params.min_p <= 0.0 and _top_k(params, vocab_size) == vocab_size


def _top_k(params: SamplingParams, vocab_size: int) -> int:
    return params.top_k if 0 < params.top_k < vocab_size else vocab_size
