"""A gRPC client that takes next to no processor time: for a load whose client shares cores with what it measures.

One HTTP/2 connection (RFC 9113) whose frames are written and told apart here. Every call is of the same method with the
same headers, which are encoded once. What the server answers is kept as it came, and read when there is time for it.
"""

from __future__ import annotations

import asyncio
import struct
import time
from base64 import b64decode
from dataclasses import dataclass, field
from functools import cache
from typing import Self

import grpc
from hpack import Decoder, Encoder, NeverIndexedHeaderTuple

from duopool.proto.status import StatusDetails, read_trailers

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM = ACK = 0x1
END_HEADERS, PADDED, PRIORITY = 0x4, 0x8, 0x20
INITIAL_WINDOW_SIZE = 4
FIRST_WINDOW, LARGEST_WINDOW = 2**16 - 1, 2**31 - 1
CODES = {code.value[0]: code for code in grpc.StatusCode}


@dataclass(slots=True, eq=False)
class Call:
    """Moments are of `time.monotonic()`."""

    sent_at: float
    ended_at: float = 0.0
    data_at: list[float] = field(default_factory=list)
    """When each data frame came; gRPC puts one message or more into one."""
    headers: dict[str, str] | None = None
    """With the trailers; None until they are read."""

    def status(self) -> StatusDetails | None:
        """None of a call that the server cut off without a word."""
        if self.headers is None or "grpc-status" not in self.headers:
            return None
        details = self.headers.get("grpc-status-details-bin")
        packed = None if details is None else b64decode(details + "==")
        return read_trailers(CODES[int(self.headers["grpc-status"])], self.headers.get("grpc-message", ""), packed)


class BareClient(asyncio.Protocol):
    """Calls of one method over one connection."""

    def __init__(self, address: str, method: str) -> None:
        headers = {
            ":method": "POST",
            ":scheme": "http",
            ":path": method,
            ":authority": address,
            "te": "trailers",
            "content-type": "application/grpc",
        }
        self._headers = _block(headers)
        self._came: list[tuple[Call, bytes]] = []
        """Header blocks in the order in which they came: each depends on those before it."""
        self._decoder = Decoder()
        self._calls: dict[int, Call] = {}
        self._next_id = 1
        self._window = FIRST_WINDOW
        """Bytes of requests that the server has room for."""
        self._unread = b""
        self._has_ended = asyncio.Event()
        self._failure: str | None = None

    @classmethod
    async def connect(cls, address: str, method: str) -> Self:
        host, _, port = address.rpartition(":")
        loop = asyncio.get_running_loop()
        _, client = await loop.create_connection(lambda: cls(address, method), host, int(port))
        return client

    def call(self, request: bytes, *, timeout_s: float) -> Call:
        """Send a serialized message; the server ends the call, after `timeout_s` seconds at the latest."""
        message = struct.pack(">BI", 0, len(request)) + request
        self._window -= len(message)
        if self._failure is not None or self._window < 0:
            raise ConnectionError(self._failure or "the server leaves too many bytes of requests unread")
        headers = self._headers + _timeout(timeout_s)
        self._transport.write(
            _frame(HEADERS, END_HEADERS, self._next_id, headers) + _frame(DATA, END_STREAM, self._next_id, message)
        )
        call = self._calls[self._next_id] = Call(time.monotonic())
        self._next_id += 2
        return call

    async def ended(self, call: Call) -> None:
        """Return when the call has ended."""
        while not call.ended_at:
            self._has_ended.clear()
            await self._has_ended.wait()
            if self._failure is not None:
                raise ConnectionError(self._failure)

    def read(self) -> None:
        """Let the calls that have ended know their headers."""
        for call, block in self._came:
            call.headers = (call.headers or {}) | {str(name): str(value) for name, value in self._decoder.decode(block)}
        self._came.clear()

    def close(self) -> None:
        self._transport.close()

    # ---- asyncio.Protocol -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        settings = struct.pack(">HI", INITIAL_WINDOW_SIZE, LARGEST_WINDOW)
        window = struct.pack(">I", LARGEST_WINDOW - FIRST_WINDOW)
        transport.write(PREFACE + _frame(SETTINGS, 0, 0, settings) + _frame(WINDOW_UPDATE, 0, 0, window))

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(f"the connection is lost: {error}")

    def data_received(self, data: bytes) -> None:
        data, at = self._unread + data, 0
        while at + 9 <= len(data):
            size, kind, flags, stream_id = int.from_bytes(data[at : at + 3]), *struct.unpack_from(">BBI", data, at + 3)
            if at + 9 + size > len(data):
                break
            self._take(kind, flags, stream_id, data[at + 9 : at + 9 + size])
            at += 9 + size
        self._unread = data[at:]

    def _take(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if kind in (DATA, HEADERS):
            if flags & (PADDED | PRIORITY) or (kind == HEADERS and not flags & END_HEADERS):
                self._fail("frames with padding, priority or continuation are not understood")
            call = self._calls[stream_id]
            if kind == HEADERS:
                self._came.append((call, payload))
            else:
                call.data_at.append(time.monotonic())
            if flags & END_STREAM:
                self._end(stream_id)
        elif kind == RST_STREAM and stream_id in self._calls:
            self._end(stream_id)
        elif kind == WINDOW_UPDATE and stream_id == 0:
            self._window += int.from_bytes(payload)
        elif kind in (SETTINGS, PING) and not flags & ACK:
            self._transport.write(_frame(kind, ACK, 0, payload if kind == PING else b""))
        elif kind == GOAWAY:
            self._fail(f"the server goes away: {payload[8:].decode(errors='replace')}")

    def _end(self, stream_id: int) -> None:
        self._calls.pop(stream_id).ended_at = time.monotonic()
        self._has_ended.set()

    def _fail(self, why: str) -> None:
        self._failure = self._failure or why
        self._has_ended.set()


def _block(headers: dict[str, str]) -> bytes:
    """Never indexed: it does not depend on what was sent before."""
    return Encoder().encode([NeverIndexedHeaderTuple(*header) for header in headers.items()])


@cache
def _timeout(seconds: float) -> bytes:
    return _block({"grpc-timeout": f"{seconds * 1e3:.0f}m"})


def _frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3) + struct.pack(">BBI", kind, flags, stream_id) + payload
