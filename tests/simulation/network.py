"""The simulated network: who listens where, how long messages take, what partitions hold up, and streams.

A stream is what gRPC gives: bytes in order both ways, as long as it stands. A partition holds a direction up until it
heals (TCP sends again); a break ends the stream, and each end hears of it in its own time, or never. Faults of single
messages, which gRPC excludes, are put in by `Wilderness`: the protocol must stay safe under them too.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import grpc

from .history import History
from .virtual_time import Process, VirtualTime

Perturb = Callable[[str, bytes], list[tuple[float, bytes]]]
"""(kind, message) -> what arrives of it, each part with an extra delay."""


@dataclass(frozen=True, slots=True)
class Message:
    data: bytes


@dataclass(frozen=True, slots=True)
class End:
    """The other side's last word."""

    code: grpc.StatusCode
    details: str = ""
    trailing: tuple[tuple[str, bytes], ...] = ()


@dataclass(frozen=True, slots=True)
class Server:
    """Handlers of one process, by method name."""

    process: Process
    handlers: list[Any] = field(default_factory=list)

    def add_generic_rpc_handlers(self, handlers: tuple[Any, ...]) -> None:
        """As gRPC servers have it, so that services register themselves as in production."""
        self.handlers.extend(handlers)

    def find(self, method: str) -> Any:
        details = _CallDetails(method)
        return next((found for handler in self.handlers if (found := handler.service(details)) is not None), None)


@dataclass(frozen=True, slots=True)
class _CallDetails:
    method: str
    invocation_metadata: tuple[Any, ...] = ()


class Network:
    def __init__(self, time: VirtualTime, random: Random, history: History) -> None:
        self.time = time
        self.history = history
        self.perturb: Perturb | None = None
        self._random = random
        self._servers: dict[str, Server] = {}
        self._held: dict[tuple[str, str], float] = {}
        """Directions between two places that are held up, and until when."""
        self._streams: list[Stream] = []

    def listen(self, address: str, process: Process) -> Server:
        server = self._servers[address] = Server(process)
        return server

    def server(self, address: str) -> Server | None:
        server = self._servers.get(address)
        return server if server is not None and server.process.is_alive else None

    def hold(self, source: str, target: str, until: float) -> None:
        """Nothing passes from `source` to `target` before `until`."""
        self._held[source, target] = max(until, self._held.get((source, target), 0.0))

    def held_until(self, source: str, target: str) -> float:
        return self._held.get((source, target), 0.0)

    def arrival(self, source: str, target: str) -> float:
        """When a message that is sent now comes in."""
        kind = self._random.random()
        delay_s = 0.0002 + 0.001 * self._random.random()
        if kind < 0.05:
            delay_s += 0.05 * self._random.random()
        return max(self.time.now, self._held.get((source, target), 0.0)) + delay_s

    def open(self, client: Process, address: str, place: str, method: str, metadata: dict[str, str]) -> Stream:
        """A stream to whoever listens at `address` of `place` when the call gets there."""
        stream = Stream(self, client, place, metadata)
        self._streams = [one for one in self._streams if not one.is_over]
        self._streams.append(stream)
        stream.connect(address, method)
        return stream

    def streams(self, one: str, other: str) -> list[Stream]:
        return [stream for stream in self._streams if not stream.is_over and stream.joins(one, other)]


class Pipe:
    """One direction of a stream; read by one task of the target process."""

    def __init__(self, network: Network, source: str, target_place: str) -> None:
        self._network = network
        self._source = source
        self._target_place = target_place
        self.target: Process | None = None
        """None until somebody has answered the call."""
        self._arrived: deque[Message | End] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._last = 0.0
        self.is_cut = False
        self.on_end: Callable[[], object] = lambda: None
        """Called when the other side's end arrives."""

    def send(self, item: Message | End, *, extra_s: float = 0.0, in_order: bool = True) -> None:
        if self.is_cut or self._network.time.is_over:
            return
        when = self._network.arrival(self._source, self._target_place) + extra_s
        if in_order:
            when = self._last = max(when, self._last)
        self._plan(when, item)

    def cut(self, after_s: float, why: str) -> None:
        """Nothing that is under way arrives any more, and the target hears that the stream is broken."""
        if not self.is_cut:
            self.is_cut = True
            now = self._network.time.now
            self._plan(now + after_s, End(grpc.StatusCode.UNAVAILABLE, why), is_last=True)

    @property
    def has_ended(self) -> bool:
        return any(isinstance(item, End) for item in self._arrived)

    async def receive(self) -> Message | End:
        while not self._arrived:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        return self._arrived.popleft()

    def _plan(self, when: float, item: Message | End, *, is_last: bool = False) -> None:
        def arrive() -> None:
            if self.is_cut and not is_last:
                return
            self._arrived.append(item)
            if self._reader is not None and not self._reader.done():
                self._reader.set_result(None)
            if isinstance(item, End):
                self.on_end()

        self._network.time.at(when, arrive, process=self.target)


class Stream:
    """One call, seen from both ends."""

    def __init__(self, network: Network, client: Process, place: str, metadata: dict[str, str]) -> None:
        self.network = network
        self.client = client
        self.server: Process | None = None
        self.place = place
        self.metadata = metadata
        self.to_server = Pipe(network, client.place, place)
        self.to_client = Pipe(network, place, client.place)
        self.to_client.target = client
        self.is_over = False
        client.on_death.append(self._client_died)

    def joins(self, one: str, other: str) -> bool:
        return {self.client.place, self.place} == {one, other}

    def connect(self, address: str, method: str) -> None:
        network = self.network

        def accept() -> None:
            server = network.server(address)
            handler = None if server is None else server.find(method)
            if server is None or handler is None:
                self.to_client.send(End(grpc.StatusCode.UNAVAILABLE, f"nobody listens at {address}"))
                return
            process = self.server = self.to_server.target = server.process
            process.on_death.append(self._server_died)
            process.start(lambda: _serve(self, process, handler))

        network.time.at(network.arrival(self.client.place, self.place), accept)

    def break_off(self, client_after_s: float | None, server_after_s: float | None) -> None:
        """The connection is gone; an end that has no time given does not hear of it."""
        self.is_over = True
        for pipe, after_s in ((self.to_client, client_after_s), (self.to_server, server_after_s)):
            if after_s is None:
                pipe.is_cut = True
            else:
                pipe.cut(after_s, "the connection broke")

    def cancel(self) -> None:
        """The client is done with the call."""
        self.is_over = True
        self.to_server.send(End(grpc.StatusCode.CANCELLED))

    def _client_died(self, says_goodbye: bool) -> None:
        if not self.is_over:
            self.break_off(None, 0.01 if says_goodbye else None)

    def _server_died(self, says_goodbye: bool) -> None:
        if not self.is_over:
            self.break_off(0.01 if says_goodbye else None, None)


class ServerContext:
    """What handlers use of gRPC's context."""

    def __init__(self, stream: Stream, process: Process) -> None:
        self._stream = stream
        self._process = process
        self._has_ended = False
        self._deadline: float | None = None
        if "timeout_s" in stream.metadata:
            self._deadline = process.clock() + float(stream.metadata["timeout_s"])

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return tuple(self._stream.metadata.items())

    def time_remaining(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - self._process.clock())

    async def write(self, message: Any) -> None:
        """Bytes are a session's; what the public service says is a protobuf message."""
        if isinstance(message, bytes):
            send(self._stream.network, self._stream.to_client, "report", message)
        else:
            self._stream.to_client.send(Message(message.SerializeToString()))

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing: Any = ()) -> None:
        self.end(code, details, tuple(trailing))
        raise grpc.aio.AbortError

    async def abort_with_status(self, status: Any) -> None:
        await self.abort(status.code, status.details, status.trailing_metadata)

    def end(self, code: grpc.StatusCode, details: str = "", trailing: tuple[Any, ...] = ()) -> None:
        if not self._has_ended:
            self._has_ended = True
            self._stream.to_client.send(End(code, details, trailing))


def send(network: Network, pipe: Pipe, kind: str, data: bytes) -> None:
    """Put a message on its way, or what the wilderness leaves of it."""
    if network.perturb is None:
        pipe.send(Message(data))
        return
    for extra_s, part in network.perturb(kind, data):
        pipe.send(Message(part), extra_s=extra_s, in_order=extra_s == 0.0)


def _serve(stream: Stream, process: Process, handler: Any) -> None:
    context = ServerContext(stream, process)

    async def run() -> None:
        try:
            if handler.stream_stream is not None:
                await handler.stream_stream(_Requests(stream.to_server), context)
            else:
                request = await stream.to_server.receive()
                if isinstance(request, Message):
                    end_with_client()
                    await handler.unary_stream(request.data, context)
            context.end(grpc.StatusCode.OK)
        except grpc.aio.AbortError:
            pass
        except Exception as error:
            stream.network.time.failures.append(f"{process.place}: a handler failed: {error!r}")
            context.end(grpc.StatusCode.UNKNOWN, str(error))

    def end_with_client() -> None:
        stream.to_server.on_end = task.cancel
        if stream.to_server.has_ended:
            task.cancel()

    task = process.loop.create_task(run())
    if handler.stream_stream is not None:
        end_with_client()


class _Requests:
    """The request iterator of a streaming handler."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe

    def __aiter__(self) -> _Requests:
        return self

    async def __anext__(self) -> bytes:
        item = await self._pipe.receive()
        if isinstance(item, End):
            raise StopAsyncIteration
        return item.data
