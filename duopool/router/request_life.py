"""The shell around one request's transitions: worker messages in, commands and client messages out.

Owns the request's state, its clock and its stage times, and joins the parts: the pure core, which decides which attempt
counts and what is sent (`core/handoff/request.py`), the search for a route, and the delivery to the client.
1. `start` asks for a route; the pools give one now, or call `try_route` when somebody comes back.
2. Workers' messages go through `transition`; its actions are carried out in order.
3. Emitted tokens are delivered as text; a stop string ends the request from here.
4. `Finish` delivers the last message, or the error, and takes the request off the register.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from duopool.core.audit import RequestEntry
from duopool.core.errors import (
    DeadlineMissed,
    DuopoolError,
    PromptTooLong,
    SuspectedPoison,
    Unavailable,
    WorkerLost,
)
from duopool.core.handoff.request import (
    Action,
    Emit,
    Evicted,
    Finish,
    Gone,
    Heard,
    Lost,
    Member,
    Moved,
    NeedRoute,
    Phase,
    RequestEvent,
    RequestState,
    Returned,
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
from duopool.core.types import LeaseId, RequestId
from duopool.router.delivery import Delivery
from duopool.router.outbox import Outbox
from duopool.router.pools import Pools, RequestMessage
from duopool.router.route_search import RouteSearch, pinned_prefill
from duopool.router.stage_times import StageTimes
from duopool.router.text_stream import TextStream
from duopool.router.tokenizer import Tokenizer
from duopool.router.waiting_room import Place
from duopool.router.watch import NOBODY, RequestRecord, Watch

ROUTE_WAIT_S = 60.0
"""How long a request waits for a pool that has nobody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What one call says once for all its choices."""

    name: str
    """The request's id as the client sees it."""
    choice: int = 0
    deadline: float | None = None
    """On the router's clock."""
    route_wait_s: float = ROUTE_WAIT_S
    traceparent: str = ""
    """W3C trace context of the caller."""


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
        place: Place,
        watch: Watch = NOBODY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._state = state
        self._watch = watch
        self._origin = origin
        self._place = place
        self._pools = pools
        self._clock = clock
        self._stage = StageTimes(began_at=clock())
        self._delivery = Delivery(
            state.request,
            self._stage,
            name=origin.name,
            choice=origin.choice,
            text=text,
            tokenizer=tokenizer,
            outbox=outbox,
            clock=clock,
        )
        self._search = RouteSearch(pools, wait_s=origin.route_wait_s, retry=self.try_route, give_up=self._give_up)
        self.num_failed_moves = 0
        self._wanted: NeedRoute | None = None
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
        self._watch.began()
        if self._delivery.resume(self._state.output):
            self.stop(Phase.DONE)
            return
        self._state, actions = begin(self._state)
        self._perform(actions)

    def stop(self, phase: Phase, error: DuopoolError | None = None) -> None:
        """End the request from outside. Safe to call after its end."""
        if not self.has_ended:
            self._error = error
            self._feed(Stopped(phase))

    # ---- what the pools tell ----------------------------------------------------------------------------------------

    def hear(self, member: Member, message: RequestMessage) -> None:
        if message.attempt == self._state.attempt:
            self._note(member, message)
        elif isinstance(message, Nack):
            self._search.refused(member, message, now=self._clock())
            is_fault = message.reason not in (NackReason.BUSY, NackReason.DRAINING)
            self.num_failed_moves += self.is_moving and is_fault
        self._feed(Heard(member, message))

    def lose(self, member: Member) -> None:
        self._search.lost(member)
        was_pinned = pinned_prefill(self._state) is not None
        self._feed(Lost(member))
        if was_pinned and self._wanted is not None and pinned_prefill(self._state) is None:
            self.try_route()

    def find_again(self, member: Member) -> None:
        self._feed(Returned(member))

    def bury(self, member: Member) -> None:
        self._feed(Gone(member))

    def try_route(self) -> None:
        if self._wanted is None or self.has_ended:
            return
        route = self._search.find(self._state, self._wanted, now=self._clock())
        if route is None:
            return
        if self._stage.routed_at is None:
            self._stage.routed_at = self._clock()
        self._wanted = None
        self._feed(Routed(route))

    def decodes_on(self, member: Member) -> bool:
        state = self._state
        is_decoding = state.phase in (Phase.DECODING, Phase.MIGRATING)
        return is_decoding and state.route is not None and state.route.decode == member

    @property
    def is_moving(self) -> bool:
        return self._state.phase is Phase.MIGRATING

    def move(self) -> None:
        target = self._search.find_decode(self._state, now=self._clock())
        if target is not None:
            self._feed(Moved(target))

    def evict(self, member: Member) -> None:
        self._feed(Evicted(member))

    def entry(self) -> RequestEntry:
        state, route = self._state, self._state.route
        return RequestEntry(
            attempt=state.attempt,
            phase=state.phase,
            prefill=route.prefill if route else None,
            decode=route.decode if route else None,
            shadow=(state.shadow.decode, state.shadow.attempt) if state.shadow else None,
        )

    def record(self) -> RequestRecord:
        state = self._state
        return self._delivery.record(
            state.phase,
            state.route,
            attempts=state.attempt,
            error=self._error,
            traceparent=self._origin.traceparent,
        )

    def lease_on(self, member: Member) -> LeaseId | None:
        state = self._state
        is_needed = state.ready and state.phase in (Phase.ADMITTED, Phase.PREFILLING, Phase.LEASED, Phase.READING)
        if not is_needed or state.route is None or state.route.prefill != member:
            return None
        return state.ready[0].lease.lease_id

    # ---- actions ----------------------------------------------------------------------------------------------------

    def _feed(self, event: RequestEvent) -> None:
        self._state, actions = transition(self._state, event)
        if self._state.phase is Phase.DECODING:
            self._place.decodes()
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
                    stopped = self._show(tokens)
                case NeedRoute():
                    self._wanted = action
                    self._search.unexpect()
                    self.try_route()
                case Finish():
                    self._finish(action)
        if stopped and not self.has_ended:
            self._feed(Stopped(Phase.DONE if self._error is None else Phase.FAILED))

    def _show(self, tokens: Tokens) -> bool:
        """Show tokens to the client; True when it is to see nothing more."""
        self._place.emitted(len(tokens.token_ids))
        before = self._stage.last_token_at
        stopped = self._delivery.show(tokens, self._state.route)
        self._error = self._delivery.error or self._error
        since = self._stage.began_at if before is None else before
        now = self._stage.last_token_at or since
        self._watch.shown(len(tokens.token_ids), now - since, is_first=before is None)
        return stopped

    def _finish(self, finish: Finish) -> None:
        self._wanted = None
        self._search.end()
        self._pools.leave(self.request_id)
        self._place.leave(is_finished=finish.phase is Phase.DONE)
        error = self._error or _error_of(finish)
        if error is not None:
            self._delivery.fail(error)
        elif finish.phase is Phase.DONE:
            self._delivery.finish(self._state.route, attempts=self._state.attempt)
        self._delivery.close()
        self._error = error
        self._watch.ended(self.record())

    def _give_up(self) -> None:
        self.stop(Phase.FAILED, Unavailable("no worker pair became ready in time for this request"))

    # ---- times and counts -------------------------------------------------------------------------------------------

    def _note(self, member: Member, message: RequestMessage) -> None:
        """Remember what the message says beyond its effect on the transitions."""
        stage, route, now = self._stage, self._state.route, self._clock()
        match message:
            case Accepted():
                self._delivery.num_cached_tokens = message.num_cached_tokens
                self._delivery.start(route)
            case Reserved() if route is not None and route.prefill is None:
                self._delivery.num_cached_tokens = message.num_cached_tokens
                stage.reserved_at = now
                self._delivery.start(route)
            case BlocksReady():
                self._delivery.num_cached_tokens = message.num_cached_tokens
                stage.worker_queue_s, stage.prefill_s = message.queue_s, message.prefill_s
                if message.first_token is not None:
                    stage.ready_at = now
                    self._search.unexpect()
            case Tokens() if stage.reserved_at is not None and stage.first_token_at is None:
                stage.prefill_s = now - stage.reserved_at
            case Joined():
                stage.joined_at = now
                stage.transfer_s += message.transfer_s
                stage.num_pulled_blocks += message.num_pulled_blocks
                stage.num_pulled_bytes += message.num_pulled_bytes
            case Nack():
                self._search.refused(member, message, now=now)
            case _:
                pass

    def _remaining_s(self) -> float | None:
        deadline = self._origin.deadline
        return None if deadline is None else max(0.0, deadline - self._clock())


def _error_of(finish: Finish) -> DuopoolError | None:
    """What a failed request's client is told."""
    if finish.phase is not Phase.FAILED:
        return None
    if finish.is_poison:
        return SuspectedPoison(finish.reason)
    nack = finish.nack
    match nack.reason if nack is not None else None:
        case NackReason.DEADLINE:
            return DeadlineMissed(finish.reason)
        case NackReason.TOO_LARGE:
            return PromptTooLong("prompt", finish.reason)
        case NackReason.INTERNAL:
            return DuopoolError(finish.reason)
        case _:
            return WorkerLost(finish.reason)
