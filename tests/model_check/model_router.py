"""The router's part for one request: the production transitions, and what the client has been shown.

Routes are chosen like the pools choose them: members that failed the request only if there are no others. Workers that
the request has not touched are alike, so only the first of them is tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import msgspec
from model_setting import REQUEST, Setting, Violation, token_at

from duopool.core.handoff.request import (
    Action,
    Emit,
    Finish,
    Heard,
    Lost,
    Member,
    NeedRoute,
    Phase,
    RequestState,
    Route,
    Routed,
    Send,
    Stopped,
    begin,
    transition,
)
from duopool.core.messages import Cancel, Nack, Tokens
from duopool.core.types import WorkerId
from duopool.router.route_search import pinned_prefill


@dataclass(frozen=True, slots=True)
class RouterSide:
    """The request's state and what must not happen twice."""

    state: RequestState
    wanted: bool = False
    """A route is looked for."""
    num_shown: int = 0
    has_ended: bool = False


Step = tuple[RouterSide, tuple[Send, ...]]


def first_side(setting: Setting) -> RouterSide:
    state, actions = begin(RequestState(request=REQUEST, retries_left=setting.max_retries))
    return _perform(RouterSide(state), actions, setting)[0]


def hear(side: RouterSide, member: Member, message: object, setting: Setting) -> Step:
    """A worker's message arrives."""
    state, guards = side.state, setting.guards
    if state.phase.is_final and guards.end_is_final:
        if isinstance(message, Nack) or (isinstance(message, Tokens) and message.finish_reason):
            return side, ()
        cancel = Cancel(request_id=REQUEST.request_id, attempt=message.attempt)  # type: ignore[attr-defined]
        return side, (Send(member, cancel),)
    if not guards.attempt_fence and state.route is not None and state.phase is not Phase.ADMITTED:
        on_route = state.route.prefill if member.worker_id.startswith("P") else state.route.decode
        member = on_route or member
        message = msgspec.structs.replace(message, attempt=state.attempt)  # type: ignore[type-var]
    if not guards.index_fence and isinstance(message, Tokens):
        message = msgspec.structs.replace(message, index=len(state.output))
    return _feed(side, Heard(member, message), setting)  # type: ignore[arg-type]


def lose(side: RouterSide, member: Member, setting: Setting) -> Step:
    """The session to a member ended."""
    return (side, ()) if side.has_ended else _feed(side, Lost(member), setting)


def stop(side: RouterSide, setting: Setting) -> Step:
    """The client goes away, or its deadline has come."""
    return _feed(side, Stopped(Phase.CANCELLED), setting)


def route(side: RouterSide, choice: Route, setting: Setting) -> Step:
    """A route was found."""
    return _feed(replace(side, wanted=False), Routed(choice), setting)


def routes(
    side: RouterSide, members: Sequence[Member], untouched: frozenset[WorkerId], setting: Setting
) -> tuple[Route, ...]:
    """The routes that may be chosen now."""
    pinned = pinned_prefill(side.state)
    prefills = (pinned,) if pinned is not None else tuple(_eligible(side, members, untouched, "P"))
    if setting.local_prefill and pinned is None:
        prefills = (*prefills, None)  # type: ignore[assignment]
    return tuple(
        Route(prefill=prefill, decode=decode)
        for decode in _eligible(side, members, untouched, "D")
        for prefill in prefills
    )


def horizon(side: RouterSide, worker_id: str) -> int:
    """Messages of attempts before this one change nothing at the router, and never will."""
    state = side.state
    is_given_up = state.phase is Phase.ADMITTED and (worker_id.startswith("D") or not state.ready)
    return state.attempt + 1 if is_given_up else state.attempt


def lease_wanted(side: RouterSide, member: Member, attempt: int) -> bool:
    """Whether a lease of this attempt is still to be used: named in heartbeats (`RequestLife.lease_on`), or news of it
    is on the way, which takes less time than a lease lasts."""
    state = side.state
    if side.has_ended or state.route is None or state.route.prefill != member or state.phase is Phase.DECODING:
        return False
    return bool(state.ready) or attempt >= horizon(side, member.worker_id)


def _eligible(
    side: RouterSide, members: Sequence[Member], untouched: frozenset[WorkerId], role: str
) -> Iterator[Member]:
    ready = [member for member in members if member.worker_id.startswith(role)]
    fit = [member for member in ready if member not in side.state.excluded] or ready
    fresh_seen = False
    for member in fit:
        if member.worker_id in untouched:
            if fresh_seen:
                continue
            fresh_seen = True
        yield member


def _feed(side: RouterSide, event: Heard | Lost | Routed | Stopped, setting: Setting) -> Step:
    before = side.state
    state, actions = transition(before, event)
    side, sends = _perform(replace(side, state=state), actions, setting)
    if state.phase.is_final and not setting.guards.end_is_final:
        return replace(side, state=replace(state, phase=before.phase)), sends
    return replace(side, state=_same(side.state)), sends


def _same(state: RequestState) -> RequestState:
    """The one of several states that behave alike which stands for all of them.

    Who was lost over the request decides nothing as long as there are fewer faults than it takes to suspect it.
    """
    state = replace(state, missing=frozenset(), dead=frozenset())
    if state.phase.is_final:
        return RequestState(request=REQUEST, phase=Phase.DONE)
    if state.phase is Phase.DECODING:
        return replace(state, ready=(), reserved=False)
    phase = Phase.LEASED if state.phase is Phase.READING else state.phase
    return replace(state, phase=phase, reserved=False)


def _perform(side: RouterSide, actions: Sequence[Action], setting: Setting) -> Step:
    sends = []
    for action in actions:
        match action:
            case Send():
                sends.append(action)
            case NeedRoute():
                side = replace(side, wanted=True)
            case Emit(tokens=tokens):
                side = _show(side, tokens)
            case Finish(phase=phase):
                if phase is Phase.FAILED and not setting.may_fail:
                    raise Violation("the request fails although it had a retry for every fault")
                if side.has_ended:
                    raise Violation("the client is told the end twice")
                if phase is Phase.DONE and side.num_shown != REQUEST.params.max_tokens:
                    raise Violation(f"the client is told that all is done after {side.num_shown} tokens")
                side = replace(side, has_ended=True, wanted=False, num_shown=0)  # nobody looks at these any more
    return side, tuple(sends)


def _show(side: RouterSide, tokens: Tokens) -> RouterSide:
    if side.has_ended:
        raise Violation("the client is shown a token after the end")
    for offset, token in enumerate(tokens.token_ids):
        index = side.num_shown + offset
        if token != token_at(index):
            what = f"token {token - token_at(0)}" if token >= token_at(0) else "a token of wrong blocks"
            raise Violation(f"the client is shown {what} as token {index}")
    return replace(side, num_shown=side.num_shown + len(tokens.token_ids))
