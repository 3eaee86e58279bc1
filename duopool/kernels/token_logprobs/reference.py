"""`token_logprobs` in torch: what the kernel is compared with, and what runs where there is none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from duopool.kernels.token_logprobs.found import FoundLogprobs

ROWS_AT_ONCE = 32
"""Bounds the copies of a long prompt's logits."""


def token_logprobs(logits_RV: Tensor, rows: Sequence[int], token_ids: Sequence[int], num_top: int) -> FoundLogprobs:
    """See `duopool.kernels.ops.token_logprobs`."""
    found = FoundLogprobs([], [], [], [])
    for first in range(0, len(rows), ROWS_AT_ONCE):
        here = slice(first, first + ROWS_AT_ONCE)
        logits = logits_RV[torch.tensor(rows[here], device=logits_RV.device)]
        chosen = logits.gather(1, torch.tensor(token_ids[here], device=logits.device).unsqueeze(1))
        total = logits.logsumexp(dim=1, keepdim=True)
        found.logprobs.extend((chosen - total).squeeze(1).tolist())
        found.ranks.extend((logits > chosen).sum(dim=1).add_(1).tolist())
        if num_top:
            top = _likeliest(logits, num_top)
            found.top_tokens.extend(top.flatten().tolist())
            found.top_logprobs.extend((logits.gather(1, top) - total).flatten().tolist())
    return found


def _likeliest(logits_RV: Tensor, num_top: int) -> Tensor:
    """int64 [R, num_top]: the largest of each row, of equals the first. Which of them `topk` takes is open."""
    last = logits_RV.topk(num_top, dim=1).values[:, -1:]
    rows, tokens = (~(logits_RV < last)).nonzero(as_tuple=True)  # with a NaN in the row `last` may be one
    by_value = logits_RV[rows, tokens].sort(descending=True, stable=True).indices
    order = by_value[rows[by_value].sort(stable=True).indices]
    counts = torch.bincount(rows, minlength=len(logits_RV))
    starts = (counts.cumsum(0) - counts).unsqueeze(1)
    return tokens[order[starts + torch.arange(num_top, device=logits_RV.device)]]
