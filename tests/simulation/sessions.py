"""A router's connections over the simulated network: the other implementation of `router.connection.Connection`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from duopool.core.messages import CommandBatch, StepReport
from duopool.core.types import Incarnation
from duopool.proto import codec
from duopool.router.connection import INCARNATION_KEY, Connect, Connection, ConnectionBroken

from .laws import Laws
from .network import End, Network, Stream, send
from .virtual_time import Process


def connector(network: Network, process: Process, laws: Laws) -> Connect:
    """What `Pools` takes as `connect`. An address is `place:port`."""

    @asynccontextmanager
    async def connect(address: str, incarnation: Incarnation) -> AsyncIterator[Connection]:
        place = address.split(":")[0]
        metadata = {INCARNATION_KEY: str(incarnation)}
        stream = network.open(process, address, place, codec.SESSION_METHOD, metadata)
        try:
            yield _SimulatedConnection(stream, laws)
        finally:
            stream.cancel()

    return connect


class _SimulatedConnection:
    def __init__(self, stream: Stream, laws: Laws) -> None:
        self._stream = stream
        self._laws = laws

    async def read(self) -> StepReport:
        stream = self._stream
        item = await stream.to_client.receive()
        if isinstance(item, End):
            ending = "the worker ended the session" if item.code is grpc.StatusCode.OK else item.code.name
            stream.network.history.note(stream.client.place, f"session with {stream.place}: {ending} {item.details}")
            raise ConnectionBroken(f"{ending}: {item.details}")
        stream.network.history.note(stream.client.place, f"< {stream.place}", item.data)
        report = codec.decode_report(item.data)
        for event in report.events:
            self._laws.fence.router_hears(event)
        return report

    async def write(self, batch: CommandBatch) -> None:
        stream = self._stream
        data = codec.encode(batch)
        for command in batch.commands:
            self._laws.fence.router_says(command)
        stream.network.history.note(stream.client.place, f"command > {stream.place}", data)
        send(stream.network, stream.to_server, "commands", data)
