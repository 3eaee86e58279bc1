"""Empties decode workers that drain: their running requests go on elsewhere.

Owns when which request leaves. How a request leaves without losing a token is its own affair (`core/handoff/`), and who
drains is the supervisor's. Nobody leaves before another decode worker is there to take requests.
"""

from __future__ import annotations

import asyncio

from duopool.core.types import Role
from duopool.router.pools import Pools

LOOK_S = 0.02
"""Time between two looks at workers that drain."""


class Evacuation:
    """`run` for as long as the router; `wake` whenever the membership may have changed."""

    def __init__(self, pools: Pools) -> None:
        self._pools = pools
        self._wake = asyncio.Event()

    def wake(self) -> None:
        self._wake.set()

    async def run(self) -> None:
        """Look after workers that drain, until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._pools.draining(Role.DECODE):
                self.look()
                await asyncio.sleep(LOOK_S)

    def look(self) -> None:
        """Let every request that decodes on a draining worker leave, if there is somewhere to go."""
        pools = self._pools
        if not pools.num_ready(Role.DECODE):
            return
        for info in pools.draining(Role.DECODE):
            member = pools.member_of(info)
            for life in pools.lives:
                if life.decodes_on(member):
                    life.evict(member)
