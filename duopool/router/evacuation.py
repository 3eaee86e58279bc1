"""Empties decode workers that drain: their running requests go over to others while they stream.

Owns when which request leaves. How it leaves without losing a token is its own affair (`core/handoff/migration.py`),
and who drains is the supervisor's. Few move at a time, so that neither side's steps are held up by copies. One that
cannot be moved, or is left when the drain's time is nearly up, goes on elsewhere by its tokens. Nobody leaves before
another decode worker is there to take requests.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from duopool.core.handoff.request import Member
from duopool.core.messages import WorkerInfo
from duopool.core.types import Role
from duopool.router.pools import Pools

LOOK_S = 0.02
"""Time between two looks at workers that drain."""
MAX_MOVING = 4
"""Requests that leave one worker at the same time."""
MAX_TRIES = 3
"""A request whose migration failed so often leaves by its tokens."""
FALLBACK_SHARE = 0.75
"""Share of a drain's time after which nobody is moved any more: all that are left leave by their tokens."""


class Evacuation:
    """`run` for as long as the router; `wake` whenever the membership may have changed."""

    def __init__(self, pools: Pools, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._pools = pools
        self._clock = clock
        self._drains: dict[Member, float] = {}
        """Workers that are to be empty, and since when."""
        self._wake = asyncio.Event()

    def wake(self) -> None:
        self._wake.set()

    async def run(self) -> None:
        """Look after workers that drain, until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self.look():
                await asyncio.sleep(LOOK_S)

    def look(self) -> bool:
        """Let requests leave as they can; False if no worker drains."""
        pools, now = self._pools, self._clock()
        draining = {pools.member_of(info): info for info in pools.draining(Role.DECODE)}
        self._drains = {member: self._drains.get(member, now) for member in draining}
        if pools.num_ready(Role.DECODE):
            for member, info in draining.items():
                self._lead_out(member, info, now)
        return bool(draining)

    def _lead_out(self, member: Member, info: WorkerInfo, now: float) -> None:
        lives = [life for life in self._pools.lives if life.decodes_on(member)]
        is_late = bool(info.drain_s) and now - self._drains[member] >= FALLBACK_SHARE * info.drain_s
        num_free = MAX_MOVING - sum(life.is_moving for life in lives)
        for life in lives:
            if is_late or (not life.is_moving and life.num_failed_moves >= MAX_TRIES):
                life.evict(member)
            elif num_free > 0 and not life.is_moving:
                life.move()
                num_free -= life.is_moving
