"""Turns sampled tokens into the messages that hand them out, with the reason to stop after the last one."""

from __future__ import annotations

from collections.abc import Sequence

from duopool.core.messages import GenerationRequest, Tokens
from duopool.core.step import SampledToken
from duopool.core.types import TokenLogprob
from duopool.engine.served_model import ServedModel


def next_tokens(
    model: ServedModel,
    request: GenerationRequest,
    sampled: Sequence[SampledToken],
    *,
    attempt: int,
    index: int,
    max_tokens: int,
    prompt_logprobs: Sequence[TokenLogprob],
) -> tuple[Tokens, ...]:
    """The messages for output token `index`: one, or one for each choice of a carrier.

    `max_tokens` is the longest sequence the worker can hold.
    """
    return tuple(
        _next_token(
            model,
            output,
            token,
            attempt=attempt,
            index=index,
            max_tokens=max_tokens,
            prompt_logprobs=prompt_logprobs,
        )
        for output, token in zip(request.outputs, sampled, strict=True)
    )


def _next_token(
    model: ServedModel,
    request: GenerationRequest,
    sampled: SampledToken,
    *,
    attempt: int,
    index: int,
    max_tokens: int,
    prompt_logprobs: Sequence[TokenLogprob],
) -> Tokens:
    num_output_tokens = index + 1
    ending = model.ending(
        request.params,
        sampled.token_id,
        num_output_tokens=num_output_tokens,
        num_tokens=len(request.prompt_token_ids) + num_output_tokens,
        max_tokens=max_tokens,
    )
    return Tokens(
        request_id=request.request_id,
        attempt=attempt,
        index=index,
        token_ids=(sampled.token_id,),
        finish_reason=None if ending is None else ending.reason,
        stop_token_id=None if ending is None else ending.stop_token_id,
        logprobs=() if sampled.logprob is None else (sampled.logprob,),
        prompt_logprobs=tuple(prompt_logprobs),
    )
