"""Past its bounds the router refuses at once, and what it accepted before is finished."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from router_fakes import FakeCluster, eventually, expected_output

from duopool.core.messages import NackReason, Prefill
from duopool.proto import inference_pb2 as pb
from duopool.proto.status import read_status

NUM_TOKENS = 6


def prompt(number: int) -> list[int]:
    return [number] * NUM_TOKENS


async def generate(cluster: FakeCluster, number: int, *, choices: int = 1) -> list[int]:
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt(number)), sampling=pb.SamplingParams(max_tokens=5, n=choices)
    )
    call = cluster.inference.Generate(request)
    return [token for response in [one async for one in call] for token in response.tokens.token_ids]


def test_a_full_waiting_room_refuses_at_once_and_finishes_what_waits() -> None:
    async def run() -> None:
        async with FakeCluster(max_num_waiting_tokens=3 * NUM_TOKENS - 1) as cluster:
            prefill = cluster.workers[0]
            prefill.refuse = NackReason.BUSY
            waiting = [asyncio.create_task(generate(cluster, number)) for number in (1, 2)]
            await eventually(lambda: len({one.request.request_id for one in prefill.received(Prefill)}) == 2)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await generate(cluster, 3, choices=2)
            status = read_status(caught.value)
            assert status.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert status.retry_after_s is not None
            assert status.retry_after_s > 0
            assert {one.request.prompt_token_ids[0] for one in prefill.received(Prefill)} == {1, 2}
            prefill.refuse = None
            for number, task in enumerate(waiting, 1):
                assert await task == expected_output(prompt(number), 5)
            assert await generate(cluster, 3) == expected_output(prompt(3), 5)

    asyncio.run(run())


def test_who_finds_no_room_is_refused_before_the_rest_of_the_request_is_read() -> None:
    async def run() -> None:
        async with FakeCluster(max_num_waiting_tokens=NUM_TOKENS, max_wait_s=1.0) as cluster:
            prefill = cluster.workers[0]
            room = cluster.router.generation._room
            assert await generate(cluster, 1) == expected_output(prompt(1), 5)
            prefill.refuse = NackReason.BUSY
            waiting = asyncio.create_task(generate(cluster, 2))
            await eventually(lambda: bool(room.num_tokens))
            await eventually(lambda: room.wait_s(room.num_tokens) > 1.0)
            empty = pb.GenerateRequest(sampling=pb.SamplingParams(max_tokens=5))
            for _ in range(2):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await anext(aiter(cluster.inference.Generate(empty)))
                status = read_status(caught.value)
                assert (status.code, status.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
                assert status.retry_after_s
            prefill.refuse = None
            assert await waiting == expected_output(prompt(2), 5)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await anext(aiter(cluster.inference.Generate(empty)))
            assert read_status(caught.value).field == "prompt"

    asyncio.run(run())
