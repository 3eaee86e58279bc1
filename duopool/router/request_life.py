"""The shell around one request's transitions: worker messages in, commands and emitted tokens out.

Owns the request's state, and joins the parts: the pure core, which decides which attempt counts and what is sent
(`core/handoff/request.py`), the search for a route, and an audience. That is the delivery to the client, or, of a
carrier, the lives of its choices.
1. `start` asks for a route; the pools give one now, or call `try_route` when somebody comes back.
2. Workers' messages go through `transition`; its actions are carried out in order.
3. Emitted tokens are shown to the audience; a stop string ends the request from here.
4. `Finish` gives the audience the last word, or the error, and takes the request off the register.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

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
    Carried,
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
    SetDown,
    Stopped,
    begin,
    transition,
)
from duopool.core.messages import (
    BlocksReady,
    Nack,
    NackReason,
    Prefill,
    Reserve,
    Tokens,
)
from duopool.core.types import LeaseId, RequestId
from duopool.router.pools import Pools, RequestMessage
from duopool.router.route_search import RouteSearch, pinned_prefill
from duopool.router.watch import RequestRecord

ROUTE_WAIT_S = 60.0
"""How long a request waits for a pool that has nobody."""


class Audience(Protocol):
    """Who hears what becomes of a request: its client, or the choices that it carries. No call may wait."""

    error: DuopoolError | None
    """Why it wants nothing more, once it does not."""

    def begin(self, output: tuple[int, ...]) -> bool:
        """Behind these tokens of an earlier stream; True if nothing but the end is missing."""
        ...

    def seeks(self, state: RequestState) -> None:
        """A route is looked for."""
        ...

    def routed(self, state: RequestState) -> None:
        """A new attempt has its route."""
        ...

    def note(self, state: RequestState, message: RequestMessage) -> None:
        """A worker says something of the current attempt, which is about to act on the state."""
        ...

    def decodes(self) -> None:
        """The request is in a batch. May be said again."""
        ...

    def show(self, state: RequestState, tokens: Tokens) -> bool:
        """Tokens that count; True when it is to see nothing more."""
        ...

    def end(self, state: RequestState, phase: Phase, error: DuopoolError | None) -> None:
        """The last word."""
        ...

    def record(self, state: RequestState, error: DuopoolError | None) -> RequestRecord:
        """All that is known of the request."""
        ...


class RequestLife:
    """One choice of one call, or the carrier of several, from its first route to its last message."""

    def __init__(
        self,
        state: RequestState,
        audience: Audience,
        *,
        pools: Pools,
        deadline: float | None = None,
        route_wait_s: float = ROUTE_WAIT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`deadline` is on the router's clock."""
        self.on_parted: Callable[[], None] = lambda: None
        """Called when a carrier has no part in the request any more. May be called again."""
        self.num_failed_moves = 0
        self._state = state
        self._audience = audience
        self._pools = pools
        self._deadline = deadline
        self._clock = clock
        self._search = RouteSearch(pools, wait_s=route_wait_s, retry=self.try_route, give_up=self._give_up)
        self._wanted: NeedRoute | None = None
        self._error: DuopoolError | None = None

    @property
    def request_id(self) -> RequestId:
        return self._state.request.request_id

    @property
    def has_ended(self) -> bool:
        return self._state.phase.is_final

    @property
    def priority(self) -> int:
        return self._state.request.priority

    @property
    def is_carrier(self) -> bool:
        return bool(self._state.request.choices)

    @property
    def is_carried(self) -> bool:
        return self._state.phase is Phase.CARRIED

    def start(self) -> None:
        """Enter the register and ask for the first route, unless all tokens are there already."""
        self._pools.enter(self)
        if self._audience.begin(self._state.output):
            self.stop(Phase.DONE)
            return
        self._state, actions = begin(self._state)
        self._perform(actions)

    def stop(self, phase: Phase, error: DuopoolError | None = None) -> None:
        """End the request from outside. Safe to call after its end."""
        if not self.has_ended:
            self._error = error
            self._feed(Stopped(phase))

    # ---- what a carrier tells ---------------------------------------------------------------------------------------

    def carry(self, carrier: RequestState) -> None:
        """The carrier has begun a new attempt."""
        if carrier.route is not None:
            self._feed(Carried(carrier.attempt, carrier.route))
            self._audience.routed(self._state)

    def note(self, message: RequestMessage) -> None:
        """A worker says something of the carrier's current attempt."""
        self._audience.note(self._state, message)

    def set_down(self, carrier: RequestState) -> None:
        """The carrier cannot go on for all its choices."""
        self._feed(SetDown(carrier))

    # ---- what the pools tell ----------------------------------------------------------------------------------------

    def hear(self, member: Member, message: RequestMessage) -> None:
        if message.attempt == self._state.attempt:
            self._audience.note(self._state, message)
            if isinstance(message, Nack):
                self._search.refused(member, message, now=self._clock())
            elif isinstance(message, BlocksReady) and message.first_token is not None:
                self._search.unexpect()
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
        self._wanted = None
        self._feed(Routed(route))
        self._audience.routed(self._state)

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
        return self._audience.record(self._state, self._error)

    def attempt_on(self, member: Member) -> int | None:
        return self._state.attempt_on(member)

    def lease_on(self, member: Member) -> LeaseId | None:
        state = self._state
        is_needed = state.ready and state.phase in (Phase.ADMITTED, Phase.PREFILLING, Phase.LEASED, Phase.READING)
        if not is_needed or state.route is None or state.route.prefill != member:
            return None
        return state.ready[0].lease.lease_id

    # ---- actions ----------------------------------------------------------------------------------------------------

    def _feed(self, event: RequestEvent) -> None:
        was_carried = self.is_carried
        self._state, actions = transition(self._state, event)
        if self._state.phase is Phase.DECODING:
            self._audience.decodes()
        self._perform(actions)
        if was_carried and not self.is_carried:
            self.on_parted()

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
                    self._audience.seeks(self._state)
                    self.try_route()
                case Finish():
                    self._finish(action)
        if stopped and not self.has_ended:
            self._feed(Stopped(Phase.DONE if self._error is None else Phase.FAILED))

    def _show(self, tokens: Tokens) -> bool:
        """True when the audience is to see nothing more."""
        is_over = self._audience.show(self._state, tokens)
        self._error = self._audience.error or self._error
        return is_over

    def _finish(self, finish: Finish) -> None:
        self._wanted = None
        self._search.end()
        self._pools.leave(self.request_id)
        self._error = self._error or _error_of(finish)
        self._audience.end(self._state, finish.phase, self._error)

    def _give_up(self) -> None:
        self.stop(Phase.FAILED, Unavailable("no worker pair became ready in time for this request"))

    def _remaining_s(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - self._clock())


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
