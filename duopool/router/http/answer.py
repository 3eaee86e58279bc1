"""Runs a call and answers it: as one JSON object, or as server-sent events.

Owns the client's going away: it is noticed while the call runs, and the lives of the call are stopped at once. A call
that fails before its first message is answered with a status; later the error is the stream's last event but `[DONE]`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Protocol

import msgspec
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from duopool.core.errors import DuopoolError, SlowReader
from duopool.proto import inference_pb2 as pb
from duopool.router.ask import Ask
from duopool.router.generation import Generation, Stream
from duopool.router.http.errors import error_body

log = logging.getLogger(__name__)

WRITE_TIMEOUT_S = 30.0
"""A client that takes nothing for this long loses its stream, whether its outputs go on or have all ended."""
LAST_WORD_S = 1.0
"""A stream that broke has this long to say so before its connection is closed."""
DONE = b"data: [DONE]\n\n"


class Reply(Protocol):
    """How one endpoint words the messages of one call."""

    def begin(self, stream: Stream) -> None:
        """The call was admitted."""
        ...

    def chunks(self, message: pb.GenerateResponse) -> Iterable[Mapping[str, Any]]:
        """What a stream says of the message."""
        ...

    def last_chunks(self) -> Iterable[Mapping[str, Any]]:
        """What a stream says at its end."""
        ...

    def whole(self) -> Mapping[str, Any]:
        """The answer in one piece, once all messages went through `chunks`."""
        ...


async def answer(request: Request, generation: Generation, ask: Ask, reply: Reply, *, is_stream: bool) -> Response:
    """Serve the call. For a stream the response does the serving."""
    if is_stream:
        return EventStream(generation, ask, reply)
    try:
        async with _stopped_by_disconnect(request.receive), generation.open(ask) as stream:
            reply.begin(stream)
            while (item := await stream.outbox.take()) is not None:
                message, num_tokens = item
                for _ in reply.chunks(message):
                    pass
                stream.outbox.written(num_tokens)
    except ClientGone:
        return Response(status_code=499)  # nobody reads it
    return Response(msgspec.json.encode(reply.whole()), media_type="application/json")


class EventStream(Response):
    """A `text/event-stream` that is written while the call runs."""

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, ask: Ask, reply: Reply) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._generation = generation
        self._ask = ask
        self._reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        events = _Events(send, self)
        try:
            async with _stopped_by_disconnect(receive):
                await self._run(events)
        except ClientGone:
            pass
        except Exception as error:
            if not events.has_begun:
                raise  # the application's error handlers give it a status
            if not isinstance(error, DuopoolError):
                log.exception("a stream failed in a way that nobody planned for")
            with contextlib.suppress(TimeoutError, SlowReader):
                # A client that has stopped reading takes no error either.
                async with asyncio.timeout(LAST_WORD_S):
                    await events.write([error_body(error)], DONE, more=False)

    async def _run(self, events: _Events) -> None:
        reply = self._reply
        async with self._generation.open(self._ask) as stream:
            reply.begin(stream)
            while (item := await stream.outbox.take()) is not None:
                message, num_tokens = item
                await events.write(reply.chunks(message))
                stream.outbox.written(num_tokens)
        await events.write(reply.last_chunks(), DONE, more=False)


class _Events:
    """Writes events; the first one writes the status and headers too."""

    def __init__(self, send: Send, response: Response) -> None:
        self.has_begun = False
        self._send = send
        self._response = response

    async def write(self, events: Iterable[Any], end: bytes = b"", *, more: bool = True) -> None:
        if not self.has_begun:
            self.has_begun = True
            await self._send(
                {"type": "http.response.start", "status": 200, "headers": self._response.raw_headers},
            )
        body = b"".join(b"data: " + msgspec.json.encode(event) + b"\n\n" for event in events) + end
        if body or not more:
            try:
                async with asyncio.timeout(WRITE_TIMEOUT_S):
                    await self._send({"type": "http.response.body", "body": body, "more_body": more})
            except TimeoutError as error:
                raise SlowReader(f"slow_reader: nothing was read for {WRITE_TIMEOUT_S:.0f} s") from error


class ClientGone(Exception):
    """The client closed its connection before it had its answer."""


@asynccontextmanager
async def _stopped_by_disconnect(receive: Receive) -> AsyncIterator[None]:
    """Cancel what runs in the block when the client goes away, and raise ClientGone out of it."""
    task = asyncio.current_task()
    assert task is not None
    is_gone = False

    async def watch() -> None:
        nonlocal is_gone
        while (await receive())["type"] != "http.disconnect":
            pass
        is_gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if not is_gone:
            raise
        task.uncancel()
        raise ClientGone from None
    finally:
        watcher.cancel()
