"""What a session talks over: one stream to one life of a worker. Owns the gRPC side of it and nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol

import grpc
import msgspec

from duopool.core.messages import CommandBatch, StepReport
from duopool.core.types import Incarnation
from duopool.proto import codec
from duopool.proto.internal_access import InternalAccess

INCARNATION_KEY = "incarnation"
"""Call metadata: the worker refuses a session that is meant for another life of it."""


class ConnectionBroken(Exception):
    """The stream cannot go on: what the worker or the network does, never a mistake of ours."""


class Connection(Protocol):
    """Messages in order, both ways, until the stream breaks."""

    async def read(self) -> StepReport:
        """The worker's next message; ConnectionBroken at the end of the stream."""
        ...

    async def write(self, batch: CommandBatch) -> None:
        """Hand commands to the stream; ConnectionBroken if it is over."""
        ...


Connect = Callable[[str, Incarnation], AbstractAsyncContextManager[Connection]]
"""Opens a stream to the worker at an address (host:port); leaving the context ends it."""


def connector(access: InternalAccess) -> Connect:
    """Sessions over gRPC, each with a channel of its own, that show the cluster credential."""

    @asynccontextmanager
    async def connect(address: str, incarnation: Incarnation) -> AsyncIterator[Connection]:
        async with access.aio_channel(address) as channel:
            # Answers are decoded by us: gRPC would log what cannot be read and go on with None.
            method = channel.stream_stream(codec.SESSION_METHOD)
            call = method(metadata=((INCARNATION_KEY, str(incarnation)), *access.metadata))
            try:
                yield _GrpcConnection(call)
            finally:
                call.cancel()

    return connect


class _GrpcConnection:
    def __init__(self, call: Any) -> None:
        self._call = call

    async def read(self) -> StepReport:
        try:
            data = await self._call.read()
            if data is not grpc.aio.EOF:
                return codec.decode_report(data)
            raise ConnectionBroken(
                f"the worker ended the session: {await self._call.details() or await self._call.code()}"
            )
        except (grpc.RpcError, msgspec.DecodeError) as error:
            raise ConnectionBroken(_reason(error)) from error

    async def write(self, batch: CommandBatch) -> None:
        try:
            for data in codec.encode_commands(batch):
                await self._call.write(data)
        except grpc.RpcError as error:
            raise ConnectionBroken(_reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error) or type(error).__name__
