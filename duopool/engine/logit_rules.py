"""Changes to the logits that a request's parameters and history ask for: minimum length, bias, penalties, grammar.

Owns their meaning, which is vLLM's: the repetition penalty looks at prompt and output, presence and frequency at the
output alone. History is read sparsely, so a step costs what the tokens in it cost, not the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from duopool.core.step import SampleSpec
from duopool.engine.grammar import GrammarMasks


def needs_rules(spec: SampleSpec) -> bool:
    """Whether `apply_rules` would change this row."""
    params = spec.params
    return bool(
        params.logit_bias
        or params.repetition_penalty != 1.0
        or params.presence_penalty
        or params.frequency_penalty
        or params.grammar
        or _below_minimum(spec)
    )


def apply_rules(logits_RV: Tensor, specs: Sequence[SampleSpec], masks: GrammarMasks | None = None) -> Tensor:
    """Change the rows in place and return them: forbidden tokens, then bias, penalties, and what the grammar allows.

    `masks` is needed if a row has a grammar.
    """
    vocab_size = logits_RV.shape[1]
    for row, spec in enumerate(specs):
        logits = logits_RV[row]
        if _below_minimum(spec):
            forbidden = sorted(token for token in _ending_tokens(spec) if token < vocab_size)
            logits[forbidden] = float("-inf")
        if spec.params.logit_bias:
            bias = [(token, value) for token, value in spec.params.logit_bias if 0 <= token < vocab_size]
            where = torch.tensor([token for token, _ in bias], dtype=torch.int64, device=logits.device)
            logits.index_add_(0, where, logits.new_tensor([value for _, value in bias]))
        _penalise(logits, spec)
        if spec.params.grammar:
            assert masks is not None
            allowed = masks.allowed(spec.params.grammar, spec.output_token_ids)
            _keep(logits, torch.from_numpy(allowed).to(logits.device))
    return logits_RV


def _penalise(logits_V: Tensor, spec: SampleSpec) -> None:
    params = spec.params
    if params.repetition_penalty != 1.0:
        seen = np.unique(np.array([*spec.prompt_token_ids, *spec.output_token_ids], dtype=np.int64))
        where = torch.from_numpy(seen).to(logits_V.device)
        old = logits_V[where]
        logits_V[where] = torch.where(old > 0, old / params.repetition_penalty, old * params.repetition_penalty)
    if (params.presence_penalty or params.frequency_penalty) and spec.output_token_ids:
        seen, counts = np.unique(np.array(spec.output_token_ids, dtype=np.int64), return_counts=True)
        penalty = params.presence_penalty + params.frequency_penalty * counts
        where = torch.from_numpy(seen).to(logits_V.device)
        logits_V[where] -= torch.from_numpy(penalty).to(logits_V)


def _keep(logits_V: Tensor, allowed_V: Tensor) -> None:
    """Leave only what is allowed. If nothing of that is left by earlier rules, the grammar counts alone."""
    logits_V.masked_fill_(~allowed_V, float("-inf"))
    if logits_V.amax() == float("-inf"):
        logits_V.masked_fill_(allowed_V, 0.0)


def _below_minimum(spec: SampleSpec) -> bool:
    return len(spec.output_token_ids) < spec.params.min_tokens and bool(_ending_tokens(spec))


def _ending_tokens(spec: SampleSpec) -> frozenset[int]:
    return spec.eos_token_ids | frozenset(spec.params.stop_token_ids)
