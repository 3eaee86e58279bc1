"""The shell around one request's transitions: worker messages in, commands and client messages out.

Owns what the pure core must not know: the clock, the route that is waited for, the text, the stage times. What decides
which attempt counts and what is sent is in `core/handoff/request.py`.
1. `start` asks for a route; the pools give one now, or call `try_route` when somebody comes back.
2. Workers' messages go through `transition`; its actions are carried out in order.
3. Emitted tokens become text; a stop string ends the request from here.
4. `Finish` puts the last message, or the error, into the outbox and takes the request off the register.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from duopool.core.block_keys import KeyChain
from duopool.core.errors import DeadlineMissed, DuopoolError, Overloaded, PromptTooLong, Unavailable, WorkerLost
from duopool.core.handoff.request import (
    Action,
    Emit,
    Finish,
    Heard,
    Lost,
    Member,
    NeedRoute,
    Phase,
    RequestEvent,
    RequestState,
    Route,
    Routed,
    Send,
    Stopped,
    begin,
    transition,
)
from duopool.core.messages import (
    Accepted,
    BlocksReady,
    Joined,
    Nack,
    NackReason,
    Prefill,
    Reserve,
    Reserved,
    Tokens,
)
from duopool.core.types import BlockKey, FinishReason, LeaseId, RequestId
from duopool.proto import inference_pb2 as pb
from duopool.proto.public_codec import started, token_chunk
from duopool.router.outbox import Outbox
from duopool.router.pools import Pools, RequestMessage
from duopool.router.stage_times import StageTimes
from duopool.router.text_stream import TextStream
from duopool.router.tokenizer import Tokenizer

ROUTE_WAIT_S = 60.0
"""How long a request waits for a pool that has nobody."""
LEAST_REFUSAL_S = 0.05
"""A worker that was busy is not asked again by the same request before this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What one call says once for all its choices."""

    name: str
    """The request's id as the client sees it."""
    choice: int = 0
    deadline: float | None = None
    """On the router's clock."""
    route_wait_s: float = ROUTE_WAIT_S


class RequestLife:
    """One choice of one call, from its first route to its last message."""

    def __init__(
        self,
        state: RequestState,
        origin: Origin,
        *,
        text: TextStream,
        tokenizer: Tokenizer,
        pools: Pools,
        outbox: Outbox,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._state = state
        self._origin = origin
        self._text = text
        self._tokenizer = tokenizer
        self._pools = pools
        self._outbox = outbox
        self._announce = origin.choice == 0
        """Whether `started` is still to be sent; the first choice does it for all."""
        self._clock = clock
        self._keys: KeyChain | None = None
        self._wanted: NeedRoute | None = None
        self._wait_timer: asyncio.TimerHandle | None = None
        self._retry_timer: asyncio.TimerHandle | None = None
        self._refused: dict[Member, float] = {}
        """Members that were busy or draining, and until when."""
        self._expected: tuple[Member, tuple[BlockKey, ...]] | None = None
        self._stage = StageTimes(began_at=clock())
        self._num_cached_tokens = 0
        self._num_resumed_tokens = len(state.output)
        self._stop_reason: str | None = None
        self._finish_reason = FinishReason.STOP
        self._error: DuopoolError | None = None

    @property
    def request_id(self) -> RequestId:
        return self._state.request.request_id

    @property
    def has_ended(self) -> bool:
        return self._state.phase.is_final

    def start(self) -> None:
        """Enter the register and ask for the first route, unless all tokens are there already."""
        self._pools.enter(self)
        self._text.push(self._state.output)
        if self._is_complete():
            self.stop(Phase.DONE)
            return
        self._state, actions = begin(self._state)
        self._perform(actions)

    def stop(self, phase: Phase, error: DuopoolError | None = None) -> None:
        """End the request from outside. Safe to call after its end."""
        if not self.has_ended:
            self._error = error
            self._feed(Stopped(phase))

    def _is_complete(self) -> bool:
        """Whether the tokens of an earlier stream were all but its last message."""
        output, params = self._state.output, self._state.request.params
        if not output:
            return False
        if self._text.stopped_by is not None:
            self._stop_reason = self._text.stopped_by
            return True
        if len(output) > params.min_tokens and output[-1] in params.stop_token_ids:
            self._stop_reason = str(output[-1])
            return True
        if len(output) > params.min_tokens and not params.ignore_eos and output[-1] in self._tokenizer.eos_token_ids:
            return True
        self._finish_reason = FinishReason.LENGTH
        return len(output) >= params.max_tokens

    # ---- what the pools tell ----------------------------------------------------------------------------------------

    def hear(self, member: Member, message: RequestMessage) -> None:
        if message.attempt == self._state.attempt:
            self._note(member, message)
        self._feed(Heard(member, message))

    def lose(self, member: Member) -> None:
        self._refused.pop(member, None)
        was_pinned = self._pinned() is not None
        self._feed(Lost(member))
        if was_pinned and self._wanted is not None and self._pinned() is None:
            self.try_route()

    def try_route(self) -> None:
        if self._wanted is None or self.has_ended:
            return
        wanted, now = self._wanted, self._clock()
        self._refused = {member: until for member, until in self._refused.items() if until > now}
        route = self._find_route(wanted)
        if route is None:
            self._wait_for_route(now)
            return
        self._wanted = None
        self._cancel_timers()
        self._feed(Routed(route))

    def lease_on(self, member: Member) -> LeaseId | None:
        state = self._state
        is_needed = state.ready and state.phase in (Phase.ADMITTED, Phase.PREFILLING, Phase.LEASED, Phase.READING)
        if not is_needed or state.route is None or state.route.prefill != member:
            return None
        return state.ready[0].lease.lease_id

    def computes_on(self, member: Member) -> bool:
        state, route = self._state, self._state.route
        if route is None or state.phase not in (Phase.PREFILLING, Phase.DECODING):
            return False
        is_decoding = state.phase is Phase.DECODING or route.prefill is None
        return member == (route.decode if is_decoding else route.prefill)

    # ---- actions ----------------------------------------------------------------------------------------------------

    def _feed(self, event: RequestEvent) -> None:
        self._state, actions = transition(self._state, event)
        self._perform(actions)

    def _perform(self, actions: Sequence[Action]) -> None:
        stopped = False
        for action in actions:
            match action:
                case Send(member=member, command=command):
                    if isinstance(command, Prefill | Reserve):
                        command = msgspec.structs.replace(command, deadline_s=self._remaining_s())
                    self._pools.send(member, command)
                case Emit(tokens=tokens):
                    stopped = self._emit(tokens)
                case NeedRoute():
                    self._wanted = action
                    self._unexpect()
                    self.try_route()
                case Finish():
                    self._finish(action)
        if stopped and not self.has_ended:
            self._feed(Stopped(Phase.DONE if self._error is None else Phase.FAILED))

    def _emit(self, tokens: Tokens) -> bool:
        """Show tokens to the client; True when they complete a stop string."""
        stage = self._stage
        stage.last_token_at = self._clock()
        if stage.first_token_at is None:
            stage.first_token_at = stage.last_token_at
        num_taken, text = self._text.push(tokens.token_ids, hidden=self._hidden(tokens))
        stage.num_tokens += num_taken
        if self._text.stopped_by is not None:
            self._stop_reason = self._text.stopped_by
            self._finish_reason = FinishReason.STOP
        elif tokens.finish_reason is not None:
            text += self._text.finish()
            self._finish_reason = tokens.finish_reason
            self._stop_reason = self._text.stopped_by
            if self._stop_reason is not None:
                self._finish_reason = FinishReason.STOP
            elif tokens.stop_token_id in self._state.request.params.stop_token_ids:
                self._stop_reason = str(tokens.stop_token_id)
        self._send_started()
        chunk = token_chunk(
            index=tokens.index,
            token_ids=tokens.token_ids[:num_taken],
            text=text,
            choice=self._origin.choice,
            logprobs=tokens.logprobs[:num_taken],
            prompt_logprobs=tokens.prompt_logprobs,
            text_of=self._tokenizer.text_of,
        )
        if not self._outbox.put(chunk, num_tokens=num_taken):
            self._error = self._outbox.error
            return True
        return self._text.stopped_by is not None

    def _hidden(self, tokens: Tokens) -> int | None:
        return None if self._state.request.params.include_stop_str_in_output else tokens.stop_token_id

    def _finish(self, finish: Finish) -> None:
        self._wanted = None
        self._cancel_timers()
        self._unexpect()
        self._pools.leave(self.request_id)
        error = self._error or _error_of(finish)
        if error is not None:
            self._outbox.fail(error)
        elif finish.phase is Phase.DONE:
            self._send_started()
            self._outbox.put(pb.GenerateResponse(finished=self._finished()))
        self._outbox.end_choice()

    def _send_started(self) -> None:
        if not self._announce:
            return
        self._announce = False
        route, request = self._state.route, self._state.request
        self._outbox.put(
            started(
                request_id=self._origin.name,
                prompt_tokens=len(request.prompt_token_ids),
                cached_tokens=self._num_cached_tokens,
                prefill_worker=_name(route.prefill if route else None),
                decode_worker=_name(route.decode if route else None),
                seed=request.params.seed,
            )
        )

    # ---- routes -----------------------------------------------------------------------------------------------------

    def _find_route(self, wanted: NeedRoute) -> Route | None:
        state, pools = self._state, self._pools
        pinned = self._pinned()
        num_tokens = len(state.request.prompt_token_ids) + len(state.output)
        keys = self._keys_of_prefix()
        if pinned is not None:
            return pools.route_decode(pinned, num_tokens, keys, excluded=wanted.excluded, refused=self._refused)
        decision = pools.route(num_tokens, keys, excluded=wanted.excluded, refused=self._refused)
        if decision is None:
            return None
        route = decision.route
        computes, request_id = route.prefill or route.decode, self.request_id
        pools.loads.routed(computes, request_id, decision.num_prefill_tokens)
        if route.prefill is not None:
            pools.loads.routed(route.decode, request_id, 0)
            pools.loads.expect(route.prefill, keys)
            self._expected = (route.prefill, tuple(keys))
        if self._stage.routed_at is None:
            self._stage.routed_at = self._clock()
        return route

    def _pinned(self) -> Member | None:
        """The prefill worker whose finished work is still leased, while a decode worker is looked for."""
        state = self._state
        if state.phase is not Phase.ADMITTED or not state.is_handed_over or state.route is None:
            return None
        return state.route.prefill

    def _keys_of_prefix(self) -> Sequence[BlockKey]:
        request = self._state.request
        if self._keys is None:
            block_size, namespace = self._pools.namespace()
            self._keys = KeyChain(block_size, salt=request.cache_salt, namespace=namespace)
        tokens = request.prompt_token_ids + self._state.output
        self._keys.extend(tokens[self._keys.num_tokens :])
        return self._keys.keys

    def _wait_for_route(self, now: float) -> None:
        loop = asyncio.get_running_loop()
        if self._wait_timer is None:
            self._wait_timer = loop.call_later(self._origin.route_wait_s, self._give_up)
        if self._retry_timer is not None:
            self._retry_timer.cancel()
            self._retry_timer = None
        soonest = min(self._refused.values(), default=float("inf"))
        if soonest < float("inf"):
            self._retry_timer = loop.call_later(max(0.0, soonest - now) + 0.001, self.try_route)

    def _give_up(self) -> None:
        self.stop(Phase.FAILED, Unavailable("no worker pair became ready in time for this request"))

    def _cancel_timers(self) -> None:
        for timer in (self._wait_timer, self._retry_timer):
            if timer is not None:
                timer.cancel()
        self._wait_timer = self._retry_timer = None

    def _unexpect(self) -> None:
        if self._expected is not None:
            self._pools.loads.unexpect(*self._expected)
            self._expected = None

    # ---- times and counts -------------------------------------------------------------------------------------------

    def _note(self, member: Member, message: RequestMessage) -> None:
        """Remember what the message says beyond its effect on the transitions."""
        stage, route, now = self._stage, self._state.route, self._clock()
        match message:
            case Accepted():
                self._num_cached_tokens = message.num_cached_tokens
                self._send_started()
            case Reserved() if route is not None and route.prefill is None:
                self._num_cached_tokens = message.num_cached_tokens
                stage.reserved_at = now
                self._send_started()
            case BlocksReady():
                self._num_cached_tokens = message.num_cached_tokens
                stage.worker_queue_s, stage.prefill_s = message.queue_s, message.prefill_s
                if message.first_token is not None:
                    stage.ready_at = now
                    self._unexpect()
            case Tokens() if stage.reserved_at is not None and stage.first_token_at is None:
                stage.prefill_s = now - stage.reserved_at
            case Joined():
                stage.joined_at = now
                stage.transfer_s += message.transfer_s
                stage.num_pulled_blocks += message.num_pulled_blocks
                stage.num_pulled_bytes += message.num_pulled_bytes
            case Nack() if message.reason is NackReason.BUSY:
                self._refused[member] = now + max(LEAST_REFUSAL_S, message.retry_after_s)
            case Nack() if message.reason is NackReason.DRAINING:
                self._refused[member] = float("inf")
            case _:
                pass

    def _remaining_s(self) -> float | None:
        deadline = self._origin.deadline
        return None if deadline is None else max(0.0, deadline - self._clock())

    def _finished(self) -> pb.Finished:
        state = self._state
        num_prompt_tokens = len(state.request.prompt_token_ids)
        finished = pb.Finished(
            finish_reason=self._finish_reason.value,
            usage=pb.Usage(
                prompt_tokens=num_prompt_tokens,
                completion_tokens=self._num_resumed_tokens + self._stage.num_tokens,
                cached_tokens=min(self._num_cached_tokens, num_prompt_tokens),
            ),
            times=self._stage.as_message(self._clock()),
            prefill_worker=_name(state.route.prefill if state.route else None),
            decode_worker=_name(state.route.decode if state.route else None),
            attempts=state.attempt,
            choice=self._origin.choice,
        )
        if self._stop_reason is not None:
            finished.stop_reason = self._stop_reason
        return finished


def _name(member: Member | None) -> str:
    return "" if member is None else member.worker_id


def _error_of(finish: Finish) -> DuopoolError | None:
    """What a failed request's client is told."""
    if finish.phase is not Phase.FAILED:
        return None
    nack = finish.nack
    match nack.reason if nack is not None else None:
        case NackReason.DEADLINE:
            return DeadlineMissed(finish.reason)
        case NackReason.TOO_LARGE:
            return PromptTooLong("prompt", finish.reason)
        case NackReason.BUSY:
            return Overloaded("all workers are busy", retry_after_s=(nack.retry_after_s if nack else 0.0) or 1.0)
        case NackReason.INTERNAL:
            return DuopoolError(finish.reason)
        case _:
            return WorkerLost(finish.reason)
