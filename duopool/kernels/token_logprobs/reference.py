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
        # Of equals the first comes first.
        best, order = logits.sort(dim=1, descending=True, stable=True) if num_top else (logits, chosen.long())
        found.logprobs.extend((chosen - total).squeeze(1).tolist())
        found.ranks.extend((logits > chosen).sum(dim=1).add_(1).tolist())
        found.top_tokens.extend(order[:, :num_top].flatten().tolist())
        found.top_logprobs.extend((best[:, :num_top] - total).flatten().tolist())
    return found
