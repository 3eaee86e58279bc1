"""Looks for one request's route, until there is one or the time for it is over.

Owns what is remembered between tries: the keys of the prefix, who refused and until when, what was announced to the
load table, and the timers. Which members are fit and which is best is the pools' to say.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from duopool.core.block_keys import KeyChain
from duopool.core.handoff.request import Member, NeedRoute, Phase, RequestState, Route
from duopool.core.messages import Nack, NackReason
from duopool.core.types import BlockKey
from duopool.router.pools import Pools

LEAST_REFUSAL_S = 0.05
"""A worker that was busy is not asked again by the same request before this."""


class RouteSearch:
    """All tries of one request."""

    def __init__(self, pools: Pools, *, wait_s: float, retry: Callable[[], None], give_up: Callable[[], None]) -> None:
        self._pools = pools
        self._wait_s = wait_s
        self._retry = retry
        """Called when somebody who refused may be asked again."""
        self._give_up = give_up
        """Called when nobody was found for `wait_s` seconds."""
        self._keys: KeyChain | None = None
        self._refused: dict[Member, float] = {}
        """Members that were busy or draining, and until when."""
        self._expected: tuple[Member, tuple[BlockKey, ...]] | None = None
        self._paid_down_to: int | None = None
        """The request's `retries_left` down to which its attempts are covered; None before the first try."""
        self._wait_timer: asyncio.TimerHandle | None = None
        self._retry_timer: asyncio.TimerHandle | None = None

    def find(self, state: RequestState, wanted: NeedRoute, *, now: float) -> Route | None:
        """A route for the request as it is now; or None, and the search goes on by itself."""
        self._refused = {member: until for member, until in self._refused.items() if until > now}
        may_go_on = not state.is_suspect and self._is_paid(state, now=now)
        route = self._try(state, wanted) if may_go_on else None
        if route is None:
            self._wait(state, now)
        else:
            self._cancel_timers()
        return route

    def find_decode(self, state: RequestState, *, now: float) -> Member | None:
        """A decode worker that can take the running request over; None if there is nobody but its own."""
        self._refused = {member: until for member, until in self._refused.items() if until > now}
        route, pools = state.route, self._pools
        if route is None:
            return None
        num_tokens = len(state.request.prompt_token_ids) + len(state.output)
        refused = {*self._refused, route.decode}
        found = pools.route_decode(
            route.decode, num_tokens, self._keys_of_prefix(state), excluded=state.excluded, refused=refused
        )
        if found is not None:
            pools.loads.routed(found.decode, state.request.request_id, 0)
        return None if found is None else found.decode

    def refused(self, member: Member, nack: Nack, *, now: float) -> None:
        """A member said no; one that is busy or draining is left alone for a while."""
        if nack.reason is NackReason.BUSY:
            self._refused[member] = now + max(LEAST_REFUSAL_S, nack.retry_after_s)
        elif nack.reason is NackReason.DRAINING:
            self._refused[member] = float("inf")

    def lost(self, member: Member) -> None:
        """The member is gone; whoever comes back under its name has refused nothing."""
        self._refused.pop(member, None)

    def unexpect(self) -> None:
        """The prefix is cached where it was announced, or never will be."""
        if self._expected is not None:
            self._pools.loads.unexpect(*self._expected)
            self._expected = None

    def end(self) -> None:
        """No route is looked for any more."""
        self._cancel_timers()
        self.unexpect()

    def _is_paid(self, state: RequestState, *, now: float) -> bool:
        """Whether the attempt is one that the request began with, or the budget allows another."""
        is_retry = self._paid_down_to is not None and state.retries_left < self._paid_down_to
        if is_retry and not self._pools.retries.spend(now=now):
            return False
        self._paid_down_to = state.retries_left
        return True

    def _try(self, state: RequestState, wanted: NeedRoute) -> Route | None:
        pools, request_id = self._pools, state.request.request_id
        num_tokens = len(state.request.prompt_token_ids) + len(state.output)
        keys = self._keys_of_prefix(state)
        pinned = pinned_prefill(state)
        if pinned is not None:
            return pools.route_decode(pinned, num_tokens, keys, excluded=wanted.excluded, refused=self._refused)
        decision = pools.route(num_tokens, keys, excluded=wanted.excluded, refused=self._refused)
        if decision is None:
            return None
        route = decision.route
        pools.loads.routed(
            route.prefill or route.decode, request_id, decision.num_prefill_tokens, state.request.num_outputs
        )
        if route.prefill is not None:
            pools.loads.routed(route.decode, request_id, 0, state.request.num_outputs)
            pools.loads.expect(route.prefill, keys)
            self._expected = (route.prefill, tuple(keys))
        return route

    def _keys_of_prefix(self, state: RequestState) -> Sequence[BlockKey]:
        if self._keys is None:
            block_size, namespace = self._pools.namespace()
            self._keys = KeyChain(block_size, salt=state.request.cache_salt, namespace=namespace)
        tokens = state.request.prompt_token_ids + state.output
        self._keys.extend(tokens[self._keys.num_tokens :])
        return self._keys.keys

    def _wait(self, state: RequestState, now: float) -> None:
        loop = asyncio.get_running_loop()
        if self._wait_timer is None:
            self._wait_timer = loop.call_later(self._wait_s, self._give_up)
        if self._retry_timer is not None:
            self._retry_timer.cancel()
            self._retry_timer = None
        soonest = min(self._refused.values(), default=float("inf"))
        if self._paid_down_to is not None and state.retries_left < self._paid_down_to:
            soonest = min(soonest, self._pools.retries.next_at(now=now))
        if soonest < float("inf"):
            self._retry_timer = loop.call_later(max(0.0, soonest - now) + 0.001, self._retry)

    def _cancel_timers(self) -> None:
        for timer in (self._wait_timer, self._retry_timer):
            if timer is not None:
                timer.cancel()
        self._wait_timer = self._retry_timer = None


def pinned_prefill(state: RequestState) -> Member | None:
    """The prefill worker whose finished work is still leased, while a decode worker is looked for."""
    if state.phase is not Phase.ADMITTED or not state.is_handed_over or state.route is None:
        return None
    return state.route.prefill
