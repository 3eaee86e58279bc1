"""What a stream has to say to its client and has not said yet.

Owns the count of unread tokens: gRPC's own window hides some 3,000 tokens from a slow reader, so what waits behind it
is counted here, and a client that leaves too many unread loses its stream. Tokens that wait because this process was
held up, not because a write finds no room, are no fault of the client's.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from duopool.core.errors import DuopoolError, SlowReader
from duopool.proto import inference_pb2 as pb

STUCK_S = 1.0
"""A write that takes this long waits for the client."""
MOST_FACTOR = 16
"""So many times the limit are never kept, whoever is slow."""


class Outbox:
    """A queue of messages for one call, filled by its choices and emptied by the writer."""

    def __init__(
        self, max_unread_tokens: int, *, num_choices: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`max_unread_tokens`: of each choice."""
        self._max_unread_tokens = max_unread_tokens * num_choices
        self._clock = clock
        self._writing_since: float | None = None
        self._num_open_choices = num_choices
        self._items: deque[tuple[pb.GenerateResponse, int]] = deque()
        self._wake = asyncio.Event()
        self.num_unread_tokens = 0
        self.error: DuopoolError | None = None
        """Why the stream fails, once it does."""
        self.on_overflow: Callable[[], None] = lambda: None

    def put(self, message: pb.GenerateResponse, *, num_tokens: int = 0) -> bool:
        """Add a message; False, and the stream has failed, when too many tokens are unread."""
        if self._is_too_much(self.num_unread_tokens + num_tokens):
            self.fail(SlowReader(f"slow_reader: more than {self._max_unread_tokens} tokens were left unread"))
            self.on_overflow()
            return False
        self.num_unread_tokens += num_tokens
        self._items.append((message, num_tokens))
        self._wake.set()
        return True

    def fail(self, error: DuopoolError) -> None:
        """End the stream with an error, behind what is queued already."""
        if self.error is None:
            self.error = error
            self._wake.set()

    def end_choice(self) -> None:
        """One choice has put its last message."""
        self._num_open_choices -= 1
        self._wake.set()

    async def take(self) -> tuple[pb.GenerateResponse, int] | None:
        """The next message and its tokens; at the end of the queue None, or the stream's error is raised."""
        while not self._items:
            if self.error is not None:
                raise self.error
            if self._num_open_choices == 0:
                return None
            self._wake.clear()
            await self._wake.wait()
        self._writing_since = self._clock()
        return self._items.popleft()

    def written(self, num_tokens: int) -> None:
        """gRPC took a message."""
        self._writing_since = None
        self.num_unread_tokens -= num_tokens

    def _is_too_much(self, num_tokens: int) -> bool:
        is_stuck = self._writing_since is not None and self._clock() - self._writing_since >= STUCK_S
        return num_tokens > self._max_unread_tokens * (1 if is_stuck else MOST_FACTOR)
