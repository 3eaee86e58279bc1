"""The benchmark's own gRPC client is told what any client is told."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from bare_client import BareClient, Call
from router_fakes import FakeCluster, eventually

from duopool.core.messages import NackReason
from duopool.proto import inference_pb2 as pb
from duopool.proto.status import read_status

METHOD = "/duopool.v1.Inference/Generate"


def request(*token_ids: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=token_ids), sampling=pb.SamplingParams(max_tokens=5))


async def ends(client: BareClient, *requests: pb.GenerateRequest, timeout_s: float = 20.0) -> list[Call]:
    calls = [client.call(one.SerializeToString(), timeout_s=timeout_s) for one in requests]
    async with asyncio.timeout(10):
        for call in calls:
            await client.ended(call)
    client.read()
    return calls


def test_calls_end_as_they_do_for_any_client() -> None:
    async def run() -> None:
        async with FakeCluster(max_num_waiting_tokens=6) as cluster:
            client = await BareClient.connect(f"127.0.0.1:{cluster.router.port}", METHOD)
            good, bad, again = await ends(client, request(1, 2, 3), request(), request(4, 5, 6))
            for call in (good, again):
                assert call.status().code is grpc.StatusCode.OK
                assert call.sent_at < call.data_at[0] <= call.ended_at
            status = bad.status()
            assert (status.code, status.field) == (grpc.StatusCode.INVALID_ARGUMENT, "token_ids")

            cluster.workers[0].refuse = NackReason.BUSY
            waiting = client.call(request(1, 2, 3, 4, 5, 6).SerializeToString(), timeout_s=0.5)
            room = cluster.router.generation._room
            await eventually(lambda: bool(room.num_tokens))
            (refused,) = await ends(client, request(7))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await anext(aiter(cluster.inference.Generate(request(7))))
            assert refused.status() == read_status(caught.value)
            assert refused.status().retry_after_s
            await client.ended(waiting)
            client.read()
            assert waiting.status().code is grpc.StatusCode.DEADLINE_EXCEEDED
            client.close()

    asyncio.run(run())
