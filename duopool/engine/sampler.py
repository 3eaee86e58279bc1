"""Chooses the next token of each row of logits.

Owns the order of the steps, which is vLLM's: raw log-probabilities aside, then minimum length, logit bias, penalties
and grammar on the logits, then the draw. Everything is a pure function of a row's logits and its SampleSpec: no state,
no generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from torch import Tensor

from duopool.core.step import NO_TOKEN, SampledToken, SampleSpec
from duopool.core.types import TokenLogprob
from duopool.engine.grammar import GrammarMasks
from duopool.engine.logit_rules import rules_of
from duopool.engine.token_logprobs import token_logprobs
from duopool.kernels import ops
from duopool.kernels.sample_tokens.draw import Draw, Drawn


def draws_of(specs: Sequence[SampleSpec], masks: GrammarMasks | None = None) -> list[Draw]:
    """How each row's token is drawn; `masks` are needed for rows with a grammar."""
    return [
        Draw(
            spec.params.temperature,
            spec.params.top_p,
            spec.params.min_p,
            spec.params.top_k,
            spec.params.seed,
            len(spec.output_token_ids),
            rules_of(spec, masks),
        )
        for spec in specs
    ]


def sample(logits_RV: Tensor, specs: Sequence[SampleSpec], masks: GrammarMasks | None = None) -> list[SampledToken]:
    """One token per row of float32 logits, with its log-probability where the parameters ask for it."""
    if not specs:
        return []
    return as_sampled(ops.sample_tokens(logits_RV, draws_of(specs, masks)), logits_RV, specs)


def as_sampled(drawn: Drawn, logits_RV: Tensor, specs: Sequence[SampleSpec]) -> list[SampledToken]:
    """What was drawn from these logits; a row whose logits are not numbers gets NO_TOKEN."""
    token_ids = [
        token_id if isfinite(best) else NO_TOKEN for token_id, best in zip(drawn.token_ids, drawn.best, strict=True)
    ]
    logprobs = _logprobs(logits_RV, specs, token_ids)
    return [SampledToken(token_id=token_id, logprob=logprobs.get(row)) for row, token_id in enumerate(token_ids)]


def _logprobs(logits_RV: Tensor, specs: Sequence[SampleSpec], token_ids: Sequence[int]) -> dict[int, TokenLogprob]:
    """By row, for those that ask for it and got a token."""
    counts: dict[int, int] = {}
    for row, spec in enumerate(specs):
        if spec.params.logprobs is not None and token_ids[row] != NO_TOKEN:
            counts[row] = spec.params.logprobs
    if not counts:
        return {}
    found = token_logprobs(logits_RV, list(counts), [token_ids[row] for row in counts], max(counts.values()))
    return {
        row: TokenLogprob(each.token_id, each.logprob, each.rank, each.top[:count])
        for (row, count), each in zip(counts.items(), found, strict=True)
    }
