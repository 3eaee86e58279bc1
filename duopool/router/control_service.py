"""The `Control` service, on the internal port: the supervisor brings the membership and takes commands away.

Owns the attachment and the commands under way. The newest attachment is the one that counts; without one the router
goes on with the membership it has, and commands are refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import msgspec

from duopool.core.errors import DuopoolError, Unavailable
from duopool.core.messages import WorkerInfo
from duopool.proto import control_pb2, control_pb2_grpc
from duopool.router.pools import Pools

log = logging.getLogger(__name__)

COMMAND_TIMEOUT_S = 30.0

_decode_info = msgspec.msgpack.Decoder(WorkerInfo).decode


class ControlService(control_pb2_grpc.ControlServicer):
    def __init__(self, pools: Pools, *, command_timeout_s: float = COMMAND_TIMEOUT_S) -> None:
        self._pools = pools
        self._command_timeout_s = command_timeout_s
        self._outgoing: asyncio.Queue[control_pb2.ClusterCommand] | None = None
        self._answers: dict[int, asyncio.Future[str]] = {}
        self._next_id = 1

    async def Attach(
        self, updates: AsyncIterator[control_pb2.ClusterUpdate], context: Any
    ) -> AsyncIterator[control_pb2.ClusterCommand]:
        outgoing: asyncio.Queue[control_pb2.ClusterCommand] = asyncio.Queue()
        self._outgoing = outgoing
        reader = asyncio.create_task(self._read(updates, outgoing))
        try:
            while True:
                getter = asyncio.create_task(outgoing.get())
                await asyncio.wait((getter, reader), return_when=asyncio.FIRST_COMPLETED)
                if reader.done():
                    getter.cancel()
                    return
                yield getter.result()
        finally:
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError, grpc.RpcError):
                await reader
            if self._outgoing is outgoing:
                self._outgoing = None
                self._fail_answers("the supervisor went away")

    async def command(self, command: control_pb2.ClusterCommand) -> None:
        """Have the supervisor do something; Unavailable when none is attached or it does not answer in time."""
        if self._outgoing is None:
            raise Unavailable("no supervisor is attached")
        command.command_id, self._next_id = self._next_id, self._next_id + 1
        answer = self._answers[command.command_id] = asyncio.get_running_loop().create_future()
        self._outgoing.put_nowait(command)
        try:
            error = await asyncio.wait_for(answer, self._command_timeout_s)
        except TimeoutError as timeout:
            raise Unavailable(f"the supervisor did not answer within {self._command_timeout_s:.0f} s") from timeout
        finally:
            del self._answers[command.command_id]
        if error:
            raise DuopoolError(error)

    async def _read(
        self, updates: AsyncIterator[control_pb2.ClusterUpdate], outgoing: asyncio.Queue[control_pb2.ClusterCommand]
    ) -> None:
        async for update in updates:
            if self._outgoing is not outgoing:
                return  # a newer supervisor is attached
            # An update that names neither members nor sizes only brings answers.
            if update.members or update.wanted:
                self._pools.wanted = dict(update.wanted)
                self._pools.update([_decode_info(member.info) for member in update.members])
            for result in update.results:
                answer = self._answers.get(result.command_id)
                if answer is not None and not answer.done():
                    answer.set_result(result.error)

    def _fail_answers(self, reason: str) -> None:
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(Unavailable(reason))
