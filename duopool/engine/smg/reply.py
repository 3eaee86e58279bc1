"""Writes tokens as `GenerateResponse` messages of the VllmEngine protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from msgspec import structs
from smg_grpc_proto import vllm_engine_pb2 as wire

from duopool.core.messages import Tokens
from duopool.core.types import TokenLogprob


@dataclass(slots=True, kw_only=True)
class Reply:
    """What a request has said so far. A stream tells every message's new tokens, else the last message has them all."""

    prompt_token_ids: tuple[int, ...]
    is_stream: bool = False
    num_cached_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    _logprobs: list[TokenLogprob] = field(default_factory=list)
    _prompt_logprobs: tuple[TokenLogprob, ...] = ()

    def take(self, tokens: Tokens) -> list[Any]:
        """The messages to send for these tokens; the last one when they end the request."""
        is_first = not self.token_ids
        self.token_ids += tokens.token_ids
        self._logprobs += tokens.logprobs
        if is_first:
            self._prompt_logprobs = tokens.prompt_logprobs
        messages = []
        if self.is_stream:
            said = self._counts(tokens.token_ids, tokens.logprobs, with_prompt=is_first)
            messages.append(wire.GenerateResponse(chunk=wire.GenerateStreamChunk(token_ids=tokens.token_ids, **said)))
        if tokens.finish_reason is not None:
            messages.append(self._complete(tokens.finish_reason.value, tokens))
        return messages

    def prefilled(self, first_token: Tokens, transfer_json: str) -> Any:
        """The only message of a prefill: its token is cut off, since the decode worker tells it."""
        self.take(structs.replace(first_token, finish_reason=None))
        message = self._complete("length", first_token)
        message.complete.kv_transfer_params_json = transfer_json
        return message

    def _complete(self, finish_reason: str, last: Tokens) -> Any:
        token_ids = last.token_ids if self.is_stream else tuple(self.token_ids)
        logprobs = last.logprobs if self.is_stream else tuple(self._logprobs)
        return wire.GenerateResponse(
            complete=wire.GenerateComplete(
                output_ids=token_ids,
                finish_reason=finish_reason,
                matched_token_id=last.stop_token_id,
                **self._counts(token_ids, logprobs, with_prompt=not self.is_stream),
            )
        )

    def _counts(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob], *, with_prompt: bool
    ) -> dict[str, Any]:
        return {
            "prompt_tokens": len(self.prompt_token_ids),
            "completion_tokens": len(token_ids),
            "cached_tokens": self.num_cached_tokens,
            "output_logprobs": _output_logprobs(logprobs),
            "input_logprobs": self._input_logprobs() if with_prompt else None,
        }

    def _input_logprobs(self) -> Any:
        if not self._prompt_logprobs:
            return None
        first, *_ = self.prompt_token_ids
        return wire.InputLogProbs(
            token_logprobs=[
                wire.InputTokenLogProb(),  # nothing comes before the first token
                *(wire.InputTokenLogProb(value=one.logprob) for one in self._prompt_logprobs),
            ],
            token_ids=[first, *(one.token_id for one in self._prompt_logprobs)],
            top_logprobs=[wire.TopLogProbs(), *map(_top, self._prompt_logprobs)],
        )


def _output_logprobs(logprobs: Sequence[TokenLogprob]) -> Any:
    if not logprobs:
        return None
    return wire.OutputLogProbs(
        token_logprobs=[one.logprob for one in logprobs],
        token_ids=[one.token_id for one in logprobs],
        top_logprobs=[_top(one) for one in logprobs],
    )


def _top(one: TokenLogprob) -> Any:
    return wire.TopLogProbs(token_ids=[token_id for token_id, _ in one.top], values=[value for _, value in one.top])
