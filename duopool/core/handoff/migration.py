"""The router's side of a live migration: a decoding request changes its worker while it streams.

    begin:  a shadow attempt is reserved at the target, the source lists what it has and decodes on
    heard:  listings go to the target, and how far it has copied goes to the source, which stops when little is left
    commit: the target has joined, so its attempt becomes the current one: the one moment at which the owner changes
    drop, abandon: a fault before that costs nothing but the shadow

The source keeps the request until it hears of the commit, or that the shadow was dropped. When it hears neither, it
goes on by itself, and the fence refuses what it says. Called by `request.py`, which owns the rest of a request's life.
"""

from __future__ import annotations

from dataclasses import replace

import msgspec

from duopool.core.handoff.request_state import Member, Phase, RequestState, Route, Send, Shadow, Step, WorkerMessage
from duopool.core.messages import BlocksReady, Cancel, Copied, Migrate, Nack, Reserve, Stay


def begin(state: RequestState, target: Member) -> Step:
    """Reserve a shadow at `target`; changes nothing unless the request decodes somewhere else."""
    route, output = state.route, state.output
    if state.phase is not Phase.DECODING or route is None or target == route.decode or not output:
        return state, ()
    attempt = state.newest_attempt + 1
    # The KV of the newest token is written by the step that follows it.
    known = msgspec.structs.replace(state.request, output_token_ids=output[:-1])
    shadow = Shadow(attempt=attempt, decode=target, num_known_tokens=len(output) - 1)
    migrate = Migrate(request_id=state.request.request_id, attempt=state.attempt, to_attempt=attempt)
    return replace(state, phase=Phase.MIGRATING, newest_attempt=attempt, shadow=shadow), (
        Send(target, Reserve(request=known, attempt=attempt, is_moving=True)),
        Send(route.decode, migrate),
    )


def heard(state: RequestState, member: Member, message: WorkerMessage) -> Step:
    """What source or target say about the shadow attempt before it counts."""
    route, shadow = state.route, state.shadow
    if route is None or shadow is None:
        return state, ()
    match message:
        case BlocksReady() if member == route.decode:
            return _listed(state, shadow, message)
        case Copied() if member == shadow.decode:
            return state, (Send(route.decode, message),)
        case Nack() if member in (route.decode, shadow.decode):
            return drop(state)
        case _:
            return state, ()


def _listed(state: RequestState, shadow: Shadow, message: BlocksReady) -> Step:
    if message.first_block < shadow.num_listed_blocks:
        return state, ()
    if message.first_block > shadow.num_listed_blocks:
        return drop(state)  # the wire lost a listing
    last = message.first_token
    if last is not None:
        # The source has stopped behind this token, which was emitted before.
        if state.output[last.index :] != last.token_ids:
            return drop(state)
        message = msgspec.structs.replace(message, output=state.output[shadow.num_known_tokens : last.index])
    num_listed_blocks = shadow.num_listed_blocks + len(message.blocks)
    state = replace(state, shadow=replace(shadow, num_listed_blocks=num_listed_blocks))
    return state, (Send(shadow.decode, message),)


def commit(state: RequestState) -> Step:
    """The shadow becomes the attempt that counts; the worker that had the request is told to forget it."""
    route, shadow = state.route, state.shadow
    if route is None or shadow is None:
        return state, ()
    forget = Send(route.decode, Cancel(request_id=state.request.request_id, attempt=state.attempt))
    route = Route(prefill=route.prefill, decode=shadow.decode)
    return replace(
        state, phase=Phase.DECODING, attempt=shadow.attempt, route=route, shadow=None, ready=(), reserved=True
    ), (forget,)


def drop(state: RequestState) -> Step:
    """Give the shadow up; the request stays where it is."""
    route, shadow = state.route, state.shadow
    if route is None or shadow is None:
        return state, ()
    state, actions = abandon(state)
    return state, (*actions, Send(route.decode, Stay(request_id=state.request.request_id, attempt=shadow.attempt)))


def abandon(state: RequestState) -> Step:
    """Give the shadow up because the request leaves its worker another way, or ends."""
    shadow = state.shadow
    if shadow is None:
        return state, ()
    cancel = Cancel(request_id=state.request.request_id, attempt=shadow.attempt)
    return replace(state, phase=Phase.DECODING, shadow=None), (Send(shadow.decode, cancel),)
