"""What is found out about chosen tokens of rows of logits."""

from __future__ import annotations

from typing import NamedTuple


class FoundLogprobs(NamedTuple):
    """One entry for each token that was asked for; `num_top` of the last two."""

    logprobs: list[float]
    ranks: list[int]
    """1: the likeliest of its row."""
    top_tokens: list[int]
    """The likeliest tokens of the row, likeliest first."""
    top_logprobs: list[float]
