"""Log-probabilities of the model's own distribution, before any sampling parameter (vLLM's `raw_logprobs`)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from duopool.core.types import TokenLogprob
from duopool.kernels import ops


def token_logprobs(
    logits_RV: Tensor, rows: Sequence[int], token_ids: Sequence[int], num_top: int
) -> list[TokenLogprob]:
    """For each of these rows its token's log-probability and rank (1: most likely) and the `num_top` most likely."""
    num_top = min(num_top, logits_RV.shape[1])
    found = ops.token_logprobs(logits_RV, rows, token_ids, num_top)
    pairs = list(zip(found.top_tokens, found.top_logprobs, strict=True))
    return [
        TokenLogprob(token_id, logprob, rank, tuple(pairs[at * num_top : (at + 1) * num_top]))
        for at, (token_id, logprob, rank) in enumerate(zip(token_ids, found.logprobs, found.ranks, strict=True))
    ]
