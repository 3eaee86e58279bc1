"""Log-probabilities of the model's own distribution, before any sampling parameter (vLLM's `raw_logprobs`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from duopool.core.types import TokenLogprob

ROWS_AT_ONCE = 32
"""Bounds the float32 copies of a long prompt's logits."""


def token_logprobs(logits_RV: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """For each row its token's log-probability and rank (1: most likely) and the `num_top` most likely tokens."""
    found: list[TokenLogprob] = []
    for first in range(0, len(token_ids), ROWS_AT_ONCE):
        rows = logits_RV[first : first + ROWS_AT_ONCE].float()
        wanted = list(token_ids[first : first + ROWS_AT_ONCE])
        chosen = rows.gather(1, torch.tensor(wanted, device=rows.device).unsqueeze(1))
        total = rows.logsumexp(dim=1, keepdim=True)
        ranks = (rows > chosen).sum(dim=1).add_(1).tolist()
        values = (chosen - total).squeeze(1).tolist()
        top: list[list[tuple[int, float]]] = [[] for _ in wanted]
        if num_top:
            best = rows.topk(min(num_top, rows.shape[1]), dim=1)
            pairs = zip(best.indices.tolist(), (best.values - total).tolist(), strict=True)
            top = [list(zip(ids, logprobs, strict=True)) for ids, logprobs in pairs]
        found.extend(
            TokenLogprob(token_id, value, rank, tuple(alternatives))
            for token_id, value, rank, alternatives in zip(wanted, values, ranks, top, strict=True)
        )
    return found
