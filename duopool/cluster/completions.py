"""Sends generation requests to a router and keeps what came back and when.

Used by the command line, the demo and the benchmark. Retrying and resuming streams belong to the client library.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from duopool.proto import inference_pb2 as pb
from duopool.proto import inference_pb2_grpc
from duopool.proto.client_access import ClientAccess
from duopool.proto.status import StatusDetails, read_status


@dataclass(slots=True, kw_only=True)
class Completion:
    """One request's stream as the client saw it. Times are seconds on the local monotonic clock."""

    request: pb.GenerateRequest
    sent_at: float = 0.0
    started: pb.Started | None = None
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    arrivals: list[float] = field(default_factory=list)
    """When each token came; tokens of one message share their time."""
    finished: pb.Finished | None = None
    error: StatusDetails | None = None

    @property
    def time_to_first_token_s(self) -> float:
        """From sending the request to its first token; NaN without one."""
        return self.arrivals[0] - self.sent_at if self.arrivals else float("nan")

    @property
    def inter_token_s(self) -> list[float]:
        """Gaps between tokens."""
        return [later - earlier for earlier, later in zip(self.arrivals, self.arrivals[1:], strict=False)]

    @property
    def mean_inter_token_s(self) -> float:
        """NaN with fewer than two tokens."""
        gaps = self.inter_token_s
        return sum(gaps) / len(gaps) if gaps else float("nan")


OnUpdate = Callable[[int, Completion, str], None]
"""Called with the request's position, its record and the text that is new."""


async def complete_all(
    address: str, requests: Sequence[pb.GenerateRequest], *, on_update: OnUpdate | None = None
) -> list[Completion]:
    """Send all requests at once; one record each, in order. Errors are kept in the records, never raised."""
    access = ClientAccess.from_environment()
    async with access.aio_channel(address) as channel:
        stub = access.stub(inference_pb2_grpc.InferenceStub, channel)
        await _reach(channel)
        records = [Completion(request=request) for request in requests]
        await asyncio.gather(*(_complete(stub, record, at, on_update) for at, record in enumerate(records)))
        return records


async def _reach(channel: Any) -> None:
    """Open the connection before any clock runs; a server that is away shows up in the calls themselves."""
    channel.get_state(try_to_connect=True)
    for _ in range(50):
        if channel.get_state() is grpc.ChannelConnectivity.READY:
            return
        await asyncio.sleep(0.02)


async def _complete(stub: Any, record: Completion, at: int, on_update: OnUpdate | None) -> None:
    record.sent_at = time.monotonic()
    try:
        async for response in stub.Generate(record.request):
            now, text = time.monotonic(), ""
            match response.WhichOneof("event"):
                case "started":
                    record.started = response.started
                case "tokens":
                    text = response.tokens.text
                    record.token_ids += response.tokens.token_ids
                    record.text += text
                    record.arrivals += [now] * len(response.tokens.token_ids)
                case "finished":
                    record.finished = response.finished
            if on_update is not None:
                on_update(at, record, text)
    except grpc.RpcError as error:
        record.error = read_status(error)
        if on_update is not None:
            on_update(at, record, "")
