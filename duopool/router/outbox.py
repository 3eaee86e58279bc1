"""What a stream has to say to its client and has not said yet.

Owns the count of unread tokens: gRPC's own window hides some 3,000 tokens from a slow reader, so what waits behind it
is counted here, and a client that leaves too many unread loses its stream.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from duopool.core.errors import DuopoolError, SlowReader
from duopool.proto import inference_pb2 as pb


class Outbox:
    """A queue of messages for one call, filled by its choices and emptied by the writer."""

    def __init__(self, max_unread_tokens: int, *, num_choices: int) -> None:
        self._max_unread_tokens = max_unread_tokens
        self._num_open_choices = num_choices
        self._items: deque[tuple[pb.GenerateResponse, int]] = deque()
        self._wake = asyncio.Event()
        self.num_unread_tokens = 0
        self.error: DuopoolError | None = None
        """Why the stream fails, once it does."""
        self.on_overflow: Callable[[], None] = lambda: None

    def put(self, message: pb.GenerateResponse, *, num_tokens: int = 0) -> bool:
        """Add a message; False, and the stream has failed, when too many tokens are unread."""
        if self.num_unread_tokens + num_tokens > self._max_unread_tokens:
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
        return self._items.popleft()

    def written(self, num_tokens: int) -> None:
        """gRPC took a message."""
        self.num_unread_tokens -= num_tokens
