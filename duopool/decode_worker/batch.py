"""The step that runs: who is in it, and what it gave them: KV for the cache, tokens for sequences and routers.

Owns what is counted of steps. What a step computes is the scheduler's to decide; no request is ended here.
"""

from __future__ import annotations

from collections.abc import Sequence

from duopool.core.kv_manager import KVCacheManager
from duopool.core.messages import NackReason, Tokens
from duopool.core.step import NO_TOKEN, NOT_NUMBERS, Chunk, SampledToken, StepPlan, StepResult
from duopool.decode_worker.decode_request import DecodePhase, DecodeRequest
from duopool.decode_worker.scheduler import DecodeScheduler
from duopool.engine.next_token import next_tokens
from duopool.engine.outbox import Outbox
from duopool.engine.served_model import ServedModel


class Batch:
    """`plan`, then `commit`. Not thread-safe; the worker's lock covers it."""

    def __init__(
        self,
        scheduler: DecodeScheduler,
        *,
        model: ServedModel,
        manager: KVCacheManager,
        outbox: Outbox,
        max_tokens: int,
    ) -> None:
        self.requests: list[DecodeRequest] = []
        """Whose tables the running step writes to."""
        self.parting: list[tuple[DecodeRequest, tuple[Tokens, ...]]] = []
        """Carriers whose prompt was computed here, with the first token of every choice."""
        self.num_steps = 0
        self.num_computed_tokens = 0
        self.step_s = 0.0
        """Duration of the last step."""
        self._scheduler = scheduler
        self._model = model
        self._manager = manager
        self._outbox = outbox
        self._max_tokens = max_tokens
        """Longest sequence that the worker can hold."""

    def plan(self) -> StepPlan:
        """The next step; its requests keep their tables until it is committed."""
        plan = self._scheduler.schedule()
        by_table = {request.table: request for request in self._scheduler.running}
        self.requests = [by_table[chunk.request_id] for chunk in plan.chunks]
        for request in self.requests:
            request.is_in_step = True
        return plan

    def commit(self, plan: StepPlan, result: StepResult, *, step_s: float) -> list[DecodeRequest]:
        """Take in what the step brought, and give up tables of those that ended meanwhile; who got the last token.

        Carriers whose prompt is computed are left in `parting`.
        """
        requests, self.requests = self.requests, []
        if plan.copies:
            self._manager.unpin([copy.source for copy in plan.copies])
        self.num_steps += 1
        self.num_computed_tokens += plan.num_tokens
        self.step_s = step_s
        complete = []
        for request, chunk in zip(requests, plan.chunks, strict=True):
            request.is_in_step = False
            if self._take(request, chunk, result):
                complete.append(request)
            if request.phase is DecodePhase.ENDED:
                self._manager.free(request.table)
        return complete

    def _take(self, request: DecodeRequest, chunk: Chunk, result: StepResult) -> bool:
        """True if the request got its last token, or can get none."""
        if any(sampled.token_id == NO_TOKEN for sampled in result.tokens.get(request.table, ())):
            if request.phase is DecodePhase.ENDED:
                return False
            reason = NackReason.INTERNAL
            self._outbox.refuse(request.session, request.request_id, request.attempt, reason, NOT_NUMBERS)
            return True
        request.num_computed_tokens += len(chunk.token_ids)
        self._manager.publish(request.table, request.num_computed_tokens)
        if request.phase is DecodePhase.ENDED:
            return False
        request.prompt_logprobs += result.prompt_logprobs.get(request.table, ())
        return bool(chunk.samples) and self._emit(request, result.tokens[request.table])

    def _emit(self, request: DecodeRequest, sampled: Sequence[SampledToken]) -> bool:
        made = next_tokens(
            self._model,
            request.request,
            sampled,
            attempt=request.attempt,
            index=len(request.output),
            max_tokens=self._max_tokens,
            prompt_logprobs=request.prompt_logprobs,
        )
        request.prompt_logprobs.clear()
        if request.request.choices:
            self.parting.append((request, made))
            return False
        (tokens,) = made
        request.output += tokens.token_ids
        self._manager.append(request.table, tokens.token_ids)
        self._outbox.say(request.session, tokens)
        return tokens.finish_reason is not None
