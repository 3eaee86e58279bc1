"""D's side of the KV source service: channels to prefill workers and the calls on them.

Owns the channels, one per address. A channel whose source could not be reached is dropped, so that the next call
connects afresh instead of sitting out gRPC's back-off.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import grpc
import msgspec

from duopool.core.messages import DescribeSource, ReadBlocks, SourceDescription, Validate, Verdict
from duopool.engine.transfer.page_read import PeerId
from duopool.engine.transfer.page_store import PageStore
from duopool.proto import codec
from duopool.proto.internal_access import InternalAccess

MAX_SOURCE_BLOCKS = 1 << 22
"""What is made for a source before it is read grows with its blocks."""


class SourceClient:
    """Calls from any thread."""

    def __init__(self, access: InternalAccess | None = None, *, confirm_timeout_s: float) -> None:
        self._access = access
        self._metadata = None if access is None else access.metadata
        self._confirm_timeout_s = confirm_timeout_s
        self._lock = threading.Lock()
        self._channels: dict[str, Any] = {}
        self._channel_of: dict[Any, Any] = {}  # of the calls that have not ended
        self._closed = False

    def read(self, address: str, read: ReadBlocks, *, timeout_s: float) -> Any:
        """The running call: iterate over it for one page's bytes after the other; `forget` it in the end."""
        request = codec.encode(read)

        def start(channel: Any) -> Any:
            return channel.unary_stream(codec.READ_METHOD)(request, timeout=timeout_s, metadata=self._metadata)

        return self._begin(address, start)

    def forget(self, address: str, call: Any) -> None:
        """The call is over; if it found nobody at its address, the channel goes."""
        with self._lock:
            channel = self._channel_of.pop(call, None)
            if channel is None:
                return
            if call.code() is grpc.StatusCode.UNAVAILABLE and self._channels.get(address) is channel:
                del self._channels[address]
            in_use = channel in self._channels.values() or channel in self._channel_of.values()
            is_left = not in_use and not self._closed
        if is_left:
            # A call's end comes on the channel's own thread, which `close` waits for as long as another call is ending.
            threading.Thread(target=channel.close, name="source-client-close", daemon=True).start()

    def describe(self, address: str, transport: str, done: Callable[[SourceDescription | str], None]) -> None:
        """Ask how the source can be read; `done` gets the answer, or an error as text, on a thread of gRPC's."""
        request = codec.encode(DescribeSource(transport=transport))
        self._unary(address, codec.DESCRIBE_METHOD, request, codec.decode_description, done)

    def validate(self, address: str, validate: Validate, done: Callable[[Verdict], None]) -> None:
        """Ask for a verdict; a source that cannot be reached in time gives none, which is a no."""

        def answered(answer: Verdict | str) -> None:
            done(Verdict(ok=False, reason=answer) if isinstance(answer, str) else answer)

        self._unary(address, codec.VALIDATE_METHOD, codec.encode(validate), codec.decode_verdict, answered)

    def close(self) -> None:
        """End all calls with an error, then all channels."""
        with self._lock:
            self._closed = True
            calls, channels = tuple(self._channel_of), {*self._channels.values(), *self._channel_of.values()}
            self._channels.clear()
        for call in calls:
            call.cancel()
        for channel in channels:
            channel.close()

    def _unary(
        self,
        address: str,
        method: str,
        request: bytes,
        decode: Callable[[bytes], Any],
        done: Callable[[Any], None],
    ) -> None:
        def start(channel: Any) -> Any:
            return channel.unary_unary(method).future(request, timeout=self._confirm_timeout_s, metadata=self._metadata)

        call = self._begin(address, start)

        def ended(call: Any) -> None:
            self.forget(address, call)
            if call.code() is not grpc.StatusCode.OK:
                done(describe_error(call))
                return
            try:
                answer = decode(call.result())
            except msgspec.DecodeError as error:
                answer = f"unreadable answer: {error}"
            done(answer)

        call.add_done_callback(ended)

    def _begin(self, address: str, start: Callable[[Any], Any]) -> Any:
        with self._lock:
            if self._closed:
                raise RuntimeError("the reader is closed")
            channel = self._channels.get(address)
            if channel is None:
                channel = self._open(address)
                self._channels[address] = channel
            call = start(channel)
            self._channel_of[call] = channel
            return call

    def _open(self, address: str) -> Any:
        if self._access is None:
            return grpc.insecure_channel(address, options=codec.INTERNAL_CHANNEL_OPTIONS)
        return self._access.channel(address)


def misfit(description: SourceDescription, source: PeerId, store: PageStore) -> str:
    """Says why pages of a source that describes itself so cannot be read into `store`; empty if they can."""
    worker_id, incarnation = source
    if description.incarnation != incarnation:
        return f"{worker_id} is incarnation {description.incarnation:016x} now, not {incarnation:016x}"
    if (description.layout_digest, description.page_bytes) != (store.digest, store.page_bytes):
        return f"pages of layout {description.layout_digest}, wanted {store.digest}"
    if not 0 < description.num_blocks <= MAX_SOURCE_BLOCKS:
        return f"{description.num_blocks} pages cannot be"
    return ""


def describe_error(call: Any) -> str:
    """Status and reason of a failed call, in one line."""
    return f"{call.code().name}: {call.details()}"
