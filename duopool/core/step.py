"""One step of a worker as a value: a step gives each request a number of tokens.

Prefill chunks, decode and recompute after preemption are the same thing here: a run of tokens whose KV is to be
written, and maybe a new token to be sampled behind it. Schedulers make a `StepPlan`, a `Runner` turns it into a
`StepResult`, the scheduler commits it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from duopool.core.messages import GenerationRequest
from duopool.core.sampling_params import SamplingParams
from duopool.core.types import BlockCopy, BlockId, RequestId, TokenLogprob


class SampleSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the next token of one request is a function of, besides the logits."""

    params: SamplingParams
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    """Tokens emitted so far, over all attempts; its length is the position that keys the noise."""
    eos_token_ids: frozenset[int] = frozenset()


def sample_specs(
    request: GenerationRequest, output_token_ids: Sequence[int], eos_token_ids: frozenset[int]
) -> tuple[SampleSpec, ...]:
    """What is sampled behind `output_token_ids`: one token, or one for each choice of a carrier."""
    return tuple(
        SampleSpec(
            params=output.params,
            prompt_token_ids=output.prompt_token_ids,
            output_token_ids=output_token_ids,
            eos_token_ids=eos_token_ids,
        )
        for output in request.outputs
    )


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """A run of one request's tokens whose KV this step writes."""

    request_id: RequestId
    token_ids: Sequence[int]
    start: int
    """Position of `token_ids[0]` in the sequence; KV of all earlier positions is already in the blocks."""
    block_ids: Sequence[BlockId]
    """The request's block table; it covers at least `start + len(token_ids)` tokens."""
    samples: tuple[SampleSpec, ...] = ()
    """What the logits behind the last token are to give: nothing, a new token, or one for each choice of a carrier."""
    prompt_logprobs: int | None = None
    """Number of alternatives wanted for each prompt token that this chunk's logits predict."""
    next_token_id: int | None = None
    """The prompt token right after this chunk, predicted by its last logits (for prompt log-probabilities)."""


class StepPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What one step computes. Chunks are independent of each other."""

    chunks: tuple[Chunk, ...] = ()
    copies: tuple[BlockCopy, ...] = ()
    """Pages to copy before the step runs."""

    @property
    def is_empty(self) -> bool:
        return not self.chunks

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.chunks)


NO_TOKEN = -1
NOT_NUMBERS = "the model's logits are not numbers"
"""Why there is no token: what a request is told that cannot go on."""


class SampledToken(msgspec.Struct, frozen=True, kw_only=True):
    """The new token of one request; `logprob` is set when its parameters ask for it."""

    token_id: int
    """`NO_TOKEN` if the logits are NaN or infinite: the request must end."""
    logprob: TokenLogprob | None = None


class StepResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a step gave: tokens for each chunk with `samples`, prompt log-probabilities where asked."""

    tokens: Mapping[RequestId, tuple[SampledToken, ...]] = msgspec.field(default_factory=dict)
    prompt_logprobs: Mapping[RequestId, tuple[TokenLogprob, ...]] = msgspec.field(default_factory=dict)


class Runner(Protocol):
    """Executes plans: the model in production, a function of the prefix in tests."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Write the KV of every chunk and sample where asked."""
        ...
