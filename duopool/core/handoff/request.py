"""The router's side of the handoff: one request's life as a pure function `(state, event) -> (state, actions)`.

Owns the attempt fence: a token is emitted only if its attempt is the current one and its index is the next. Knows no
clock and no I/O; the router's shell turns actions into messages and messages into events, and so does the simulation.

    ADMITTED -> PREFILLING -> LEASED -> READING -> DECODING -> DONE | CANCELLED | FAILED
                                                   |      ^
                                                   MIGRATING   (see migration.py)

The choices of one prompt share all that comes before DECODING. One more request, the carrier, goes through it; they are
CARRIED meanwhile, under its attempt, and answer for themselves from the moment the decode worker has their prompt. The
carrier emits their first tokens and never has any of its own; what befalls workers until then is its to mend.
"""

from __future__ import annotations

from dataclasses import replace

import msgspec

from duopool.core.handoff import migration
from duopool.core.handoff.request_state import (
    POISON_LIMIT,
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
    Route,
    Routed,
    Send,
    SetDown,
    Shadow,
    Step,
    Stopped,
    WorkerMessage,
)
from duopool.core.messages import (
    Accepted,
    BlocksReady,
    Cancel,
    Copied,
    GenerationRequest,
    Joined,
    Nack,
    NackReason,
    Prefill,
    Rebind,
    Reserve,
    Reserved,
    Tokens,
)

__all__ = [
    "POISON_LIMIT",
    "Action",
    "Carried",
    "Emit",
    "Evicted",
    "Finish",
    "Gone",
    "Heard",
    "Lost",
    "Member",
    "Moved",
    "NeedRoute",
    "Phase",
    "RequestEvent",
    "RequestState",
    "Returned",
    "Route",
    "Routed",
    "Send",
    "SetDown",
    "Shadow",
    "Step",
    "Stopped",
    "WorkerMessage",
    "begin",
    "transition",
]
"""The values of `request_state.py` belong to this face."""


def begin(state: RequestState) -> Step:
    """The first action of a request; the route of one that is carried comes from its carrier."""
    return state, () if state.phase is Phase.CARRIED else (NeedRoute(state.excluded),)


def transition(state: RequestState, event: RequestEvent) -> Step:
    """What the event makes of the request. Events of a past attempt, and all after the end, change nothing."""
    if state.phase.is_final:
        return _after_the_end(state, event)
    if isinstance(event, Returned):
        return replace(state, missing=state.missing - {event.member}), ()
    if isinstance(event, Gone):
        return _gone(state, event.member)
    if state.shadow is not None:
        return _migrating(state, state.shadow, event)
    match event:
        case Routed(route=route):
            return _routed(state, route)
        case Carried(attempt=attempt, route=route):
            return _carried(state, attempt, route)
        case SetDown(carrier=carrier):
            return _set_down(state, carrier)
        case Lost(member=member):
            return _lost(state, member)
        case Moved(decode=decode):
            return migration.begin(state, decode)
        case Evicted(member=member):
            return _evicted(state, member)
        case Stopped(phase=phase, reason=reason):
            return _end(state, Finish(phase, reason))
        case Heard(member=member, message=message):
            if isinstance(message, Tokens) and message.attempt < state.attempt and message.finish_reason is None:
                # Still running: the Cancel that ended this attempt was lost, or is under way.
                return state, (Send(member, _cancel_of(state, message.attempt)),)
            # An attempt that was given up keeps its number until the next route: what it still says is late.
            if message.attempt != state.attempt or not _is_on_route(state, member):
                return state, ()
            if state.phase is Phase.ADMITTED:
                return _lease_refused(state, member) if isinstance(message, Nack) else (state, ())
            return _heard(state, member, message)


def _migrating(state: RequestState, shadow: Shadow, event: RequestEvent) -> Step:
    """Two workers have a part in the request: what only the source can say counts as if it were alone."""
    source = None if state.route is None else state.route.decode
    match event:
        case Heard(member=member, message=message) if message.attempt == shadow.attempt:
            if member == shadow.decode and isinstance(message, Joined | Tokens):
                return _then(migration.commit(state), event)
            return migration.heard(state, member, message)
        case Heard(member=member, message=message) if member == source and message.attempt == state.attempt:
            match message:
                case Tokens(index=index, finish_reason=reason) if index <= len(state.output):
                    ends = reason is not None and index == len(state.output)
                    return _then(migration.abandon(state), event) if ends else _tokens(state, message)
                case Tokens() | Nack():
                    return _then(migration.abandon(state), event)
                case _:
                    return state, ()
        case Lost(member=member) | Evicted(member=member) if member == shadow.decode:
            return migration.drop(state)
        case Lost(member=member) | Evicted(member=member) if member == source:
            return _then(migration.abandon(state), event)
        case Stopped():
            return _then(migration.abandon(state), event)
        case _:
            return state, ()


def _then(step: Step, event: RequestEvent) -> Step:
    """Let the event see what an earlier step has made of the state."""
    state, actions = transition(step[0], event)
    return state, (*step[1], *actions)


def _routed(state: RequestState, route: Route) -> Step:
    if state.phase is not Phase.ADMITTED:
        return state, ()
    lease_holder = state.route.prefill if state.is_handed_over and state.route is not None else None
    if lease_holder is not None and route.prefill == lease_holder:
        return _rebind(state, lease_holder, route.decode)
    given_up = _cancel(state)
    attempt = state.newest_attempt + 1
    request = _request(state, state.output)
    reserve = Send(route.decode, Reserve(request=request, attempt=attempt, local_prefill=route.prefill is None))
    state = replace(
        state,
        phase=Phase.PREFILLING,
        attempt=attempt,
        newest_attempt=attempt,
        route=route,
        reserved=False,
        ready=(),
    )
    if route.prefill is None:
        return state, (*given_up, reserve)
    return state, (*given_up, Send(route.prefill, Prefill(request=request, attempt=attempt)), reserve)


def _carried(state: RequestState, attempt: int, route: Route) -> Step:
    if state.phase is not Phase.CARRIED:
        return state, ()
    return replace(state, attempt=attempt, newest_attempt=attempt, route=route), ()


def _set_down(state: RequestState, carrier: RequestState) -> Step:
    if state.phase is not Phase.CARRIED:
        return state, ()
    return _again(
        replace(
            state,
            excluded=carrier.excluded,
            missing=carrier.missing,
            dead=carrier.dead,
            retries_left=carrier.retries_left,
        )
    )


def _heard(state: RequestState, member: Member, message: WorkerMessage) -> Step:
    match message:
        case BlocksReady():
            return _ready(state, message)
        case Reserved():
            phase = Phase.READING if state.phase is Phase.LEASED else state.phase
            return replace(state, reserved=True, phase=phase), ()
        case Joined():
            return replace(state, phase=Phase.DECODING), ()
        case Tokens(index=index) if index > len(state.output):
            return _missed(state, f"tokens before index {index} never came")
        case Tokens(token_ids=token_ids) if len(state.output) + len(token_ids) > state.request.params.max_tokens:
            return _missed(state, "more tokens came than were asked for")
        case Tokens() if state.phase is Phase.CARRIED and state.route is not None and member == state.route.prefill:
            return _tokens(state, message)
        case Tokens():
            return _tokens(replace(state, phase=Phase.DECODING, missing=frozenset(), dead=frozenset()), message)
        case Nack():
            return _nack(state, member, message)
        case _:
            return state, ()


def _ready(state: RequestState, message: BlocksReady) -> Step:
    route = state.route
    if route is None or state.phase is not Phase.PREFILLING or message.first_block < _num_ready_blocks(state):
        return state, ()
    if message.first_block > _num_ready_blocks(state):
        return _missed(state, f"blocks before block {message.first_block} were never listed")
    state = replace(state, ready=(*state.ready, message))
    forward = Send(route.decode, message)
    if message.first_token is None:
        return state, (forward,)
    state = replace(state, phase=Phase.READING if state.reserved else Phase.LEASED)
    if state.request.choices:
        if [one.request_id for one in message.first_tokens] != [one.request_id for one in state.request.choices]:
            return _missed(state, "first tokens came that are not those of the choices")
        goes_on = any(tokens.finish_reason is None for tokens in message.first_tokens)
        return state, (*((forward,) if goes_on else ()), *map(Emit, message.first_tokens))
    state, actions = _tokens(state, message.first_token)
    if state.phase.is_final:
        return state, actions
    return state, (*actions, forward)


def _tokens(state: RequestState, tokens: Tokens) -> Step:
    """The fence: only the next index is emitted."""
    if tokens.index != len(state.output):
        return state, ()
    state = replace(state, output=state.output + tokens.token_ids)
    if tokens.finish_reason is None:
        return state, (Emit(tokens),)
    finish = Finish(Phase.DONE)
    if state.phase is Phase.DECODING:
        return replace(state, phase=Phase.DONE), (Emit(tokens), finish)  # D ended it by itself
    state, actions = _end(state, finish)
    return state, (Emit(tokens), *actions)


def _nack(state: RequestState, member: Member, nack: Nack) -> Step:
    if state.phase is Phase.DECODING and state.route is not None and member != state.route.decode:
        return state, ()  # P's part is over
    if nack.reason is NackReason.UNKNOWN and state.attempt_on(member) is None:
        return state, ()  # it was asked before its part was over
    if nack.reason in (NackReason.BUSY, NackReason.DRAINING):
        return _elsewhere(state, member)  # no failure: what was accepted waits until somebody takes it
    final = (NackReason.TOO_LARGE, NackReason.DEADLINE, NackReason.INTERNAL)
    if nack.reason in final or state.retries_left == 0:
        return _end(state, Finish(Phase.FAILED, nack.detail or nack.reason.value, nack))
    state = replace(state, retries_left=state.retries_left - 1)
    if nack.reason is NackReason.TRANSFER_FAILED and state.route is not None and state.route.prefill is not None:
        # Its memory cannot be reached or does not hold what it sealed: somebody else should compute it this time.
        # If it must be the same one again, it must not offer the same pages again.
        return _again(replace(state, excluded=state.excluded | {state.route.prefill}), check_pages=True)
    if nack.reason in (NackReason.LEASE_LOST, NackReason.TRANSFER_FAILED):
        return _again(state)
    return _elsewhere(replace(state, excluded=state.excluded | {member}), member)


def _missed(state: RequestState, what: str) -> Step:
    """The wire lost or reordered a message, and the worker will not say it again: only a new attempt goes on."""
    if state.retries_left == 0:
        return _end(state, Finish(Phase.FAILED, what))
    return _again(replace(state, retries_left=state.retries_left - 1))


def _lease_refused(state: RequestState, member: Member) -> Step:
    """P takes its finished work back while another decode worker is sought: all must be routed anew."""
    if not state.ready or state.route is None or member != state.route.prefill:
        return state, ()
    return replace(state, ready=()), (NeedRoute(state.excluded),)


def _lost(state: RequestState, member: Member) -> Step:
    route = state.route
    if route is None or not _is_on_route(state, member) or state.phase is Phase.CARRIED:
        return state, ()
    if state.phase is Phase.ADMITTED:
        if member != route.prefill or not state.ready:
            return state, ()
        state = replace(state, ready=(), excluded=state.excluded | {member})
        return state, (NeedRoute(state.excluded),)
    if member == route.prefill and state.phase is Phase.DECODING and member != route.decode:
        return state, ()
    missing = state.missing | ({member} if _is_at_work(state, member) else frozenset())
    state = replace(state, missing=missing, excluded=state.excluded | {member})
    if state.retries_left == 0:
        return _end(state, Finish(Phase.FAILED, f"worker {member.worker_id} was lost and no retries are left"))
    return _elsewhere(replace(state, retries_left=state.retries_left - 1), member)


def _gone(state: RequestState, member: Member) -> Step:
    """One that was lost over this request is dead; when there are too many of them, the request itself is suspected."""
    if member not in state.missing:
        return state, ()
    state = replace(state, missing=state.missing - {member}, dead=state.dead | {member})
    if len(state.dead) < POISON_LIMIT:
        return state, ()
    reason = f"{len(state.dead)} workers died one after the other while they worked on this request"
    state, dropped = migration.abandon(state)
    state, actions = _end(state, Finish(Phase.FAILED, reason, is_poison=True))
    return state, (*dropped, *actions)


def _is_at_work(state: RequestState, member: Member) -> bool:
    """Whether this member of the route was to do something with the request, not only to keep room or blocks for it."""
    is_prefilling = state.phase is Phase.PREFILLING
    route = state.route
    if route is None:
        return False
    return member == (route.prefill or route.decode if is_prefilling else route.decode)


def _evicted(state: RequestState, member: Member) -> Step:
    """Nothing has failed: leaving a worker that drains costs no retry."""
    if state.phase is not Phase.DECODING or state.route is None or member != state.route.decode:
        return state, ()
    return _again(state)


def _elsewhere(state: RequestState, failed: Member) -> Step:
    """Go on without the member that failed: with P's leased blocks if only D failed before it joined."""
    route = state.route
    keeps_lease = state.phase in (Phase.LEASED, Phase.READING) and route is not None and failed == route.decode
    if route is None or route.prefill is None or not keeps_lease:
        return _again(state)
    cancel = _cancel_of(state, state.attempt)
    state = replace(state, phase=Phase.ADMITTED, reserved=False)
    return state, (Send(route.decode, cancel), NeedRoute(state.excluded, route.prefill))


def _again(state: RequestState, *, check_pages: bool = False) -> Step:
    """A new attempt: the old one is cancelled wherever it may live, and a route is asked for."""
    return replace(state, phase=Phase.ADMITTED, ready=(), reserved=False), (
        *_cancel(state, check_pages=check_pages),
        NeedRoute(state.excluded),
    )


def _rebind(state: RequestState, prefill: Member, decode: Member) -> Step:
    """Give P's finished, still leased work to another decode worker, under a new attempt."""
    attempt = state.newest_attempt + 1
    ready = tuple(_renumbered(message, attempt) for message in state.ready)
    # P's first token is part of what D joins behind, not of the prefix that has KV.
    request = _request(state, state.output[:-1])
    rebind = Rebind(request_id=request.request_id, lease_id=ready[0].lease.lease_id, attempt=attempt)
    route = Route(prefill=prefill, decode=decode)
    state = replace(
        state,
        phase=Phase.LEASED,
        attempt=attempt,
        newest_attempt=attempt,
        route=route,
        reserved=False,
        ready=ready,
    )
    return state, (
        Send(prefill, rebind),
        Send(decode, Reserve(request=request, attempt=attempt)),
        *(Send(decode, message) for message in ready),
    )


def _renumbered(message: BlocksReady, attempt: int) -> BlocksReady:
    first = message.first_token
    return BlocksReady(
        request_id=message.request_id,
        attempt=attempt,
        lease=message.lease,
        first_block=message.first_block,
        blocks=message.blocks,
        first_token=None if first is None else _told_again(first, attempt),
        first_tokens=tuple(_told_again(tokens, attempt) for tokens in message.first_tokens),
    )


def _told_again(tokens: Tokens, attempt: int) -> Tokens:
    return Tokens(
        request_id=tokens.request_id,
        attempt=attempt,
        index=tokens.index,
        token_ids=tokens.token_ids,
        finish_reason=tokens.finish_reason,
    )


def _end(state: RequestState, finish: Finish) -> Step:
    return replace(state, phase=finish.phase), (*_cancel(state), finish)


def _after_the_end(state: RequestState, event: RequestEvent) -> Step:
    """A sign of life after the end is answered with another Cancel: the first may have been lost."""
    match event:
        case Heard(message=Tokens(finish_reason=reason)) if reason is not None:
            return state, ()  # it ended there by itself
        case Heard(
            member=member, message=BlocksReady() | Copied() | Reserved() | Joined() | Accepted() | Tokens() as message
        ):
            cancel = _cancel_of(state, max(state.attempt, message.attempt))
            return state, (Send(member, cancel),)
        case _:
            return state, ()


def _cancel(state: RequestState, *, check_pages: bool = False) -> tuple[Action, ...]:
    """Cancel whatever the current attempt may still hold. A decode worker that finished by itself ignores it."""
    if state.route is None:
        return ()
    cancel = _cancel_of(state, state.attempt, check_pages=check_pages)
    if state.phase is Phase.ADMITTED:  # all but P's finished work was given up when the request came back here
        return (Send(state.route.prefill, cancel),) if state.ready and state.route.prefill is not None else ()
    members = {state.route.decode: None}
    if state.route.prefill is not None and state.phase not in (Phase.DECODING, Phase.CARRIED):
        members[state.route.prefill] = None
    return tuple(Send(member, cancel) for member in members)


def _cancel_of(state: RequestState, attempt: int, *, check_pages: bool = False) -> Cancel:
    return Cancel(request_id=state.request.request_id, attempt=attempt, check_pages=check_pages)


def _is_on_route(state: RequestState, member: Member) -> bool:
    return state.route is not None and member in (state.route.prefill, state.route.decode)


def _num_ready_blocks(state: RequestState) -> int:
    return sum(len(message.blocks) for message in state.ready)


def _request(state: RequestState, output: tuple[int, ...]) -> GenerationRequest:
    """The request as a new attempt must see it: what was emitted belongs to the prefix."""
    return msgspec.structs.replace(state.request, output_token_ids=output)
