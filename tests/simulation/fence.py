"""The attempt fence, seen from outside the router: what it says to workers, hears of them, and hands to clients.

The router itself is not asked which attempt counts. An attempt begins to count with the command that starts it, or when
the shadow of a migration has joined; it is given up with its Cancel.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from duopool.core.messages import BlocksReady, Cancel, Command, Event, Joined, Prefill, Rebind, Reserve, Tokens
from duopool.core.types import RequestId


@dataclass(slots=True)
class _Told:
    """One request, as its router's messages tell of it."""

    current: int = 0
    """Attempts before this one have been given up."""
    dropped: set[int] = field(default_factory=set)
    """Shadows that were given up while an older attempt went on."""
    has_parted: bool = False
    """It answers for itself, whatever becomes of its carrier."""
    fresh: set[int] = field(default_factory=set)
    stale: set[int] = field(default_factory=set)
    """Indices of tokens that came from an attempt that could count, and from one that could not."""


class Fence:
    """Looks on at all routers; request ids are never used twice."""

    def __init__(self, breach: Callable[[str], None]) -> None:
        self._breach = breach
        self._told: dict[RequestId, _Told] = defaultdict(_Told)
        self._carried: dict[RequestId, tuple[RequestId, ...]] = {}
        """Choices by their carrier."""

    def router_says(self, command: Command) -> None:
        """A command leaves a router."""
        match command:
            case Prefill(request=request, attempt=attempt):
                self._carried[request.request_id] = tuple(choice.request_id for choice in request.choices)
                self._begin_all(request.request_id, attempt)
            case Reserve(request=request, attempt=attempt, local_prefill=True):
                # A Reserve of any other kind comes with a Prefill or a Rebind, or is for a shadow.
                self._carried[request.request_id] = tuple(choice.request_id for choice in request.choices)
                self._begin_all(request.request_id, attempt)
            case Rebind(request_id=request_id, attempt=attempt):
                self._begin_all(request_id, attempt)
            case Cancel(request_id=request_id, attempt=attempt):
                told = self._told[request_id]
                if attempt == told.current:
                    told.current = attempt + 1
                elif attempt > told.current:
                    told.dropped.add(attempt)
            case _:
                pass

    def router_hears(self, event: Event) -> None:
        """A worker's message comes in at a router."""
        if isinstance(event, Joined) and event.attempt not in self._told[event.request_id].dropped:
            self._begin(event.request_id, event.attempt)
        if isinstance(event, Joined | Tokens) and event.attempt >= self._told[event.request_id].current:
            self._told[event.request_id].has_parted = True
        heard = (event.first_token, *event.first_tokens) if isinstance(event, BlocksReady) else (event,)
        for tokens in heard:
            if not isinstance(tokens, Tokens):
                continue
            told = self._told[tokens.request_id]
            is_stale = tokens.attempt < told.current or tokens.attempt in told.dropped
            (told.stale if is_stale else told.fresh).add(tokens.index)

    def client_hears(self, request_id: RequestId, index: int) -> None:
        """A token leaves a router for its client."""
        told = self._told[request_id]
        if index in told.stale and index not in told.fresh:
            self._breach(f"token {index} of {request_id[:6]} was taken from an attempt that had been given up")

    def _begin_all(self, request_id: RequestId, attempt: int) -> None:
        self._begin(request_id, attempt)
        for choice in self._carried.get(request_id, ()):
            if not self._told[choice].has_parted:
                self._begin(choice, attempt)

    def _begin(self, request_id: RequestId, attempt: int) -> None:
        told = self._told[request_id]
        told.current = max(told.current, attempt)
