"""`Rules` in torch."""

from __future__ import annotations

from array import array

import numpy as np
import torch
from torch import Tensor

from duopool.kernels.sample_tokens.rules import Rules


def apply_rules(logits_V: Tensor, rules: Rules) -> None:
    """Change the row in place."""
    device = logits_V.device
    logits_V[_known(rules.forbidden, logits_V)] = float("-inf")
    if rules.bias:
        tokens = torch.from_numpy(np.array(rules.bias_tokens))
        known = (tokens >= 0) & (tokens < len(logits_V))
        bias = torch.from_numpy(np.array(rules.bias))
        logits_V.index_add_(0, tokens[known].to(device), bias[known].to(device))
    if rules.repetition_penalty != 1.0:
        where = torch.unique(_known(rules.seen, logits_V))
        old = logits_V[where]
        logits_V[where] = torch.where(old > 0, old / rules.repetition_penalty, old * rules.repetition_penalty)
    if rules.output:
        where, counts = torch.unique(_known(rules.output, logits_V), return_counts=True)
        logits_V[where] -= (rules.presence_penalty + rules.frequency_penalty * counts.double()).to(logits_V.dtype)
    if rules.allowed is not None:
        allowed = torch.from_numpy(rules.allowed).to(device)
        logits_V.masked_fill_(~allowed, float("-inf"))
        if logits_V.amax() == float("-inf"):
            logits_V.masked_fill_(allowed, 0.0)


def _known(tokens: array[int], logits_V: Tensor) -> Tensor:
    """int64: those that the row has."""
    each = torch.from_numpy(np.array(tokens, dtype=np.int64))
    return each[(each >= 0) & (each < len(logits_V))].to(logits_V.device)
