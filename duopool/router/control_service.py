"""The `Control` service, on the internal port: the supervisor brings the membership and takes commands away.

Owns the attachment and the commands under way. The newest attachment is the one that counts; without one the router
goes on with the membership it has, and commands are refused.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc

from duopool.core.errors import InvalidRequest, Unavailable
from duopool.proto import control_pb2
from duopool.proto.control_codec import error_of, read_members
from duopool.proto.public_codec import parse_request
from duopool.proto.status import grpc_status
from duopool.router.pools import Pools

log = logging.getLogger(__name__)

COMMAND_TIMEOUT_S = 30.0

SERVICE = control_pb2.DESCRIPTOR.services_by_name["Control"].full_name
_Outgoing = asyncio.Queue[control_pb2.ClusterCommand | None]
"""Ends with None."""


class ControlService:
    def __init__(self, pools: Pools, *, command_timeout_s: float = COMMAND_TIMEOUT_S) -> None:
        self._pools = pools
        self._command_timeout_s = command_timeout_s
        self._outgoing: _Outgoing | None = None
        self._answers: dict[int, asyncio.Future[control_pb2.CommandResult]] = {}
        self._next_id = 1

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register on a server before it is started."""
        # Updates are decoded by us: gRPC answers INTERNAL to what it cannot read.
        handler = grpc.stream_stream_rpc_method_handler(
            self.attach, response_serializer=control_pb2.ClusterCommand.SerializeToString
        )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Attach": handler}),))

    async def attach(self, updates: AsyncIterator[bytes], context: Any) -> None:
        """Take updates in and hand commands out until either side leaves or a newer supervisor attaches."""
        outgoing: _Outgoing = asyncio.Queue()
        if self._outgoing is not None:
            self._outgoing.put_nowait(None)
        self._outgoing = outgoing
        reader = asyncio.create_task(self._read(updates, outgoing))

        def end(done: asyncio.Task[None]) -> None:
            if not done.cancelled():
                done.exception()  # a supervisor that vanished is no news
            outgoing.put_nowait(None)

        reader.add_done_callback(end)
        try:
            while (command := await outgoing.get()) is not None:
                await context.write(command)
            if reader.done() and isinstance(error := reader.exception(), InvalidRequest):
                await context.abort_with_status(grpc_status(error))
            if self._outgoing is not outgoing:
                await context.abort(grpc.StatusCode.ABORTED, "a newer supervisor is attached")
        finally:
            reader.cancel()
            if self._outgoing is outgoing:
                self._outgoing = None
                self._fail_answers("the supervisor went away")

    async def command(self, command: control_pb2.ClusterCommand) -> None:
        """Have the supervisor do something; raises what it answers, Unavailable when none answers in time."""
        if self._outgoing is None:
            raise Unavailable("no supervisor is attached")
        command.command_id, self._next_id = self._next_id, self._next_id + 1
        answer = self._answers[command.command_id] = asyncio.get_running_loop().create_future()
        self._outgoing.put_nowait(command)
        try:
            result = await asyncio.wait_for(answer, self._command_timeout_s)
        except TimeoutError as timeout:
            raise Unavailable(f"the supervisor did not answer within {self._command_timeout_s:.0f} s") from timeout
        finally:
            del self._answers[command.command_id]
        if result.error:
            raise error_of(result)

    async def _read(self, updates: AsyncIterator[bytes], outgoing: _Outgoing) -> None:
        async for data in updates:
            if self._outgoing is not outgoing:
                return  # a newer supervisor is attached
            update = parse_request(data, control_pb2.ClusterUpdate.DESCRIPTOR)
            # An update that names neither members nor sizes only brings answers.
            if update.members or update.wanted:
                members = read_members(update)
                self._pools.wanted = dict(update.wanted)
                self._pools.update(members)
            for result in update.results:
                answer = self._answers.get(result.command_id)
                if answer is not None and not answer.done():
                    answer.set_result(result)

    def _fail_answers(self, reason: str) -> None:
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(Unavailable(reason))
