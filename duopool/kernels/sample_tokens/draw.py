"""How tokens are drawn, and what came of it."""

from __future__ import annotations

from typing import NamedTuple

from duopool.kernels.sample_tokens.rules import Rules

GREEDY_BELOW = 1e-5
"""Lower temperatures are greedy: dividing by them would overflow."""


class Draw(NamedTuple):
    """What a token is a function of, besides the logits; see `ops.sample_tokens`. Numbers stand as draw.h has them."""

    temperature: float
    top_p: float
    min_p: float
    top_k: int
    """0 or below: all."""
    seed: int
    """64 bits, signed."""
    position: int
    """Of the token in its output: with the seed it keys the noise."""
    rules: Rules | None = None
    """What changes the logits before."""


class Drawn(NamedTuple):
    """By rows of logits."""

    token_ids: list[int]
    best: list[float]
    """The largest logit; NaN if the row has one, and then its token is any."""
