"""One streaming client for every system: OpenAI's completions, or llama.cpp's own, over bare HTTP/1.1.

Owns the clock. Lines are kept as they come and read only after the burst, so that the client takes as little of the
machine as it can.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

LIMIT_BYTES = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A greedy request past any end of sequence."""

    token_ids: Sequence[int]
    max_tokens: int
    salt: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a system listens and what it wants to be told."""

    port: int
    path: str = "/v1/completions"
    model: str = ""

    def body(self, request: Request) -> bytes:
        fields: dict[str, Any] = {
            "prompt": list(request.token_ids),
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        if self.path == "/completion":
            fields |= {"n_predict": request.max_tokens, "cache_prompt": True}
        else:
            fields |= {"model": self.model, "max_tokens": request.max_tokens, "cache_salt": request.salt}
        return json.dumps(fields).encode()


@dataclass(slots=True)
class Stream:
    """One request as the client saw it, in seconds on the local monotonic clock."""

    request: Request
    sent_at: float = 0.0
    lines: list[tuple[float, bytes]] = field(default_factory=list)

    @property
    def arrivals(self) -> list[float]:
        """When events with output came. Raises ValueError if the stream did not run to its end."""
        times, is_finished = [], False
        for at, line in self.lines:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise ValueError(f"a stream failed: {event['error']}")
            choices = event.get("choices")
            choice = event if choices is None else choices[0] if choices else {}
            is_finished = is_finished or bool(choice.get("finish_reason") or event.get("stop"))
            # An event may bring the end alone; one whose text is held back still brings a token.
            if not event.get("stop") and (choice.get("text") or not choice.get("finish_reason")) and choice:
                times.append(at)
        if not is_finished or len(times) < self.request.max_tokens // 2:
            raise ValueError(f"a stream ended early: {len(times)} events, {self.lines[:1]}")
        return times


async def send_all(endpoint: Endpoint, requests: Sequence[Request]) -> list[Stream]:
    """All at once; one record each, in order."""
    return list(await asyncio.gather(*(send(endpoint, request) for request in requests)))


async def send(endpoint: Endpoint, request: Request) -> Stream:
    """Raises OSError when the system is not there."""
    body = endpoint.body(request)
    reader, writer = await asyncio.open_connection("127.0.0.1", endpoint.port, limit=LIMIT_BYTES)
    head = (
        f"POST {endpoint.path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    )
    stream = Stream(request, time.monotonic())
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    try:
        while line := await reader.readline():
            if len(line) > 6:
                stream.lines.append((time.monotonic(), line))
    finally:
        writer.close()
    return stream
