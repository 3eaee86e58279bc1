"""What a worker must know of its model to judge requests: when a stream ends and which requests can never run.

Plain values; neither the weights nor the tokenizer are known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from duopool.core.errors import InvalidRequest
from duopool.core.messages import GenerationRequest, NackReason
from duopool.core.sampling_params import MAX_CHOICES, SamplingParams
from duopool.core.types import FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """Why a token was the last one."""

    reason: FinishReason
    stop_token_id: int | None = None
    """Set when one of the request's own stop tokens ended it; end-of-sequence is not one of them."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request can never run here."""

    reason: NackReason
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """The limits of the model and of the pool that its KV lies in."""

    vocab_size: int
    max_model_len: int
    """Longest sequence in tokens: prompt and output together."""
    eos_token_ids: frozenset[int] = frozenset()

    def knows(self, token_ids: Sequence[int]) -> bool:
        """Whether all ids are in the vocabulary; one that is not would take the engine down."""
        return not token_ids or (min(token_ids) >= 0 and max(token_ids) < self.vocab_size)

    def refusal(self, request: GenerationRequest, *, num_tokens_in_pool: int, num_tokens_ahead: int) -> Refusal | None:
        """Judge a request whose prefix needs room for itself and `num_tokens_ahead` more tokens; None if it can run.

        The router has checked all of this: what is wrong here comes from a router that is itself at fault, and must
        not take the worker with it.
        """
        token_ids, params = request.token_ids, request.params
        if not token_ids:
            return Refusal(NackReason.INTERNAL, "the prompt is empty")
        if not self.knows((*token_ids, *params.stop_token_ids, *(token_id for token_id, _ in params.logit_bias))):
            return Refusal(NackReason.INTERNAL, f"a token id is outside the vocabulary of {self.vocab_size}")
        if len(request.choices) > MAX_CHOICES:
            return Refusal(NackReason.INTERNAL, f"{len(request.choices)} choices, at most {MAX_CHOICES} are allowed")
        try:
            for output in request.outputs:
                output.params.check()
        except InvalidRequest as error:
            return Refusal(NackReason.INTERNAL, str(error))
        if len(token_ids) >= self.max_model_len:
            detail = f"{len(token_ids)} tokens leave no room in a context of {self.max_model_len}"
            return Refusal(NackReason.TOO_LARGE, detail)
        if len(token_ids) + num_tokens_ahead > num_tokens_in_pool:
            detail = f"{len(token_ids)} tokens do not fit the pool of {num_tokens_in_pool}"
            return Refusal(NackReason.TOO_LARGE, detail)
        return None

    def ending(
        self, params: SamplingParams, token_id: int, *, num_output_tokens: int, num_tokens: int, max_tokens: int
    ) -> Ending | None:
        """Judge the newest token. The counts include it; `max_tokens` is the longest sequence the worker can hold."""
        if num_output_tokens > params.min_tokens:
            if token_id in params.stop_token_ids:
                return Ending(reason=FinishReason.STOP, stop_token_id=token_id)
            if token_id in self.eos_token_ids and not params.ignore_eos:
                return Ending(reason=FinishReason.STOP)
        if num_output_tokens >= params.max_tokens or num_tokens >= min(self.max_model_len, max_tokens):
            return Ending(reason=FinishReason.LENGTH)
        return None
