"""Changes to the logits that a request's parameters and history ask for: minimum length, bias, penalties, grammar.

Owns their meaning, which is vLLM's: the repetition penalty looks at prompt and output, presence and frequency at the
output alone. History is read sparsely, so a step costs what the tokens in it cost, not the vocabulary.
"""

from __future__ import annotations

from array import array

from duopool.core.step import SampleSpec
from duopool.engine.grammar import GrammarMasks
from duopool.kernels.sample_tokens.rules import Rules


def rules_of(spec: SampleSpec, masks: GrammarMasks | None) -> Rules | None:
    """What is to change in the row before the draw; `masks` is needed if it has a grammar."""
    params, output = spec.params, spec.output_token_ids
    repeats = params.repetition_penalty != 1.0
    counts = bool(params.presence_penalty or params.frequency_penalty)
    is_short = len(output) < params.min_tokens
    if not (repeats or counts or is_short or params.logit_bias or params.grammar):
        return None
    allowed = None
    if params.grammar:
        assert masks is not None
        allowed = masks.allowed(params.grammar, output)
    return Rules(
        forbidden=array("q", [*spec.eos_token_ids, *params.stop_token_ids] if is_short else []),
        bias_tokens=array("q", [token for token, _ in params.logit_bias]),
        bias=array("f", [value for _, value in params.logit_bias]),
        repetition_penalty=params.repetition_penalty,
        seen=array("q", [*spec.prompt_token_ids, *output] if repeats else []),
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        output=array("q", output if counts else []),
        allowed=allowed,
    )
