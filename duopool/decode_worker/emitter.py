"""What a step gave one request: KV for the cache, a token for its sequence and for the router. Ends no request."""

from __future__ import annotations

from duopool.core.kv_manager import KVCacheManager
from duopool.core.step import Chunk, SampledToken, StepResult
from duopool.decode_worker.decode_request import DecodePhase, DecodeRequest
from duopool.engine.next_token import next_token
from duopool.engine.outbox import Outbox
from duopool.engine.served_model import ServedModel


class Emitter:
    """Takes results in, request by request. Not thread-safe; the worker's lock covers it."""

    def __init__(self, model: ServedModel, manager: KVCacheManager, outbox: Outbox, *, max_tokens: int) -> None:
        self._model = model
        self._manager = manager
        self._outbox = outbox
        self._max_tokens = max_tokens
        """Longest sequence that the worker can hold."""

    def take(self, request: DecodeRequest, chunk: Chunk, result: StepResult) -> bool:
        """Take in what the chunk brought; True if the request got its last token."""
        request.num_computed_tokens += len(chunk.token_ids)
        self._manager.publish(request.table, request.num_computed_tokens)
        if request.phase is DecodePhase.ENDED:
            return False
        request.prompt_logprobs += result.prompt_logprobs.get(request.table, ())
        return chunk.sample is not None and self._emit(request, result.tokens[request.table])

    def _emit(self, request: DecodeRequest, sampled: SampledToken) -> bool:
        request.output.append(sampled.token_id)
        self._manager.append(request.table, (sampled.token_id,))
        tokens = next_token(
            self._model,
            request.request,
            sampled,
            attempt=request.attempt,
            index=len(request.output) - 1,
            max_tokens=self._max_tokens,
            prompt_logprobs=request.prompt_logprobs,
        )
        request.prompt_logprobs.clear()
        self._outbox.say(request.session, tokens)
        return tokens.finish_reason is not None
