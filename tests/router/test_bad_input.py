"""Bad input is answered with the fitting code, naming field and limit, and a neighbour's stream never notices."""

from __future__ import annotations

import asyncio
import math

import grpc
import pytest
from router_fakes import MAX_MODEL_LEN, NUM_BLOCKS, VOCAB_SIZE, FakeCluster, FakeWorker, eventually, expected_output

from duopool.core.messages import Cancel, Reserve
from duopool.proto import inference_pb2 as pb
from duopool.proto.inference_pb2_grpc import InferenceStub
from duopool.proto.status import read_status

PROMPT = [1, 2, 3]
CODE = grpc.StatusCode
REFUSED = CODE.INVALID_ARGUMENT


def ids(*token_ids: int, **fields: object) -> pb.GenerateRequest:
    sampling = fields.pop("sampling", {})
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=token_ids), sampling=pb.SamplingParams(**sampling), **fields)


def sampled(**sampling: object) -> pb.GenerateRequest:
    return ids(*PROMPT, sampling=sampling)


def chat(*messages: tuple[str, str]) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        chat=pb.ChatMessages(messages=[pb.ChatMessage(role=role, content=content) for role, content in messages])
    )


BAD = {
    "no prompt": (pb.GenerateRequest(), REFUSED, "prompt"),
    "empty text": (pb.GenerateRequest(text=""), REFUSED, "text"),
    "empty ids": (ids(), REFUSED, "token_ids"),
    "empty chat": (chat(), REFUSED, "chat.messages"),
    "unknown role": (chat(("user", "hi"), ("wizard", "hi")), REFUSED, "chat.messages[1].role"),
    "longer than the model": (ids(*[1] * MAX_MODEL_LEN), REFUSED, "token_ids"),
    "text longer than the model": (pb.GenerateRequest(text="a" * MAX_MODEL_LEN), REFUSED, "text"),
    "more messages than the model has tokens": (chat(*[("user", "")] * 600), REFUSED, "chat.messages"),
    "text far too long": (pb.GenerateRequest(text="a" * 1_000_000), REFUSED, "text"),
    "prompt and output too long": (ids(*[1] * (MAX_MODEL_LEN - 5), sampling={"max_tokens": 6}), REFUSED, "max_tokens"),
    "id out of range": (ids(1, VOCAB_SIZE), REFUSED, "token_ids[1]"),
    "resumed id out of range": (
        ids(1, resume_from=pb.TokenIds(ids=[VOCAB_SIZE])),
        REFUSED,
        "resume_from[0]",
    ),
    "NaN temperature": (sampled(temperature=math.nan), REFUSED, "temperature"),
    "negative temperature": (sampled(temperature=-0.1), REFUSED, "temperature"),
    "infinite temperature": (sampled(temperature=math.inf), REFUSED, "temperature"),
    "top_p zero": (sampled(top_p=0.0), REFUSED, "top_p"),
    "top_p above one": (sampled(top_p=1.01), REFUSED, "top_p"),
    "NaN top_p": (sampled(top_p=math.nan), REFUSED, "top_p"),
    "top_k": (sampled(top_k=-2), REFUSED, "top_k"),
    "min_p": (sampled(min_p=1.5), REFUSED, "min_p"),
    "n zero": (sampled(n=0), REFUSED, "n"),
    "n absurd": (sampled(n=1_000_000_000), REFUSED, "n"),
    "max_tokens zero": (sampled(max_tokens=0), REFUSED, "max_tokens"),
    "max_tokens negative": (sampled(max_tokens=-5), REFUSED, "max_tokens"),
    "max_tokens absurd": (sampled(max_tokens=2**62), REFUSED, "max_tokens"),
    "min_tokens": (sampled(min_tokens=17), REFUSED, "min_tokens"),
    "too many stop strings": (sampled(stop=["x"] * 1000), REFUSED, "stop"),
    "empty stop string": (sampled(stop=["a", ""]), REFUSED, "stop[1]"),
    "giant stop string": (sampled(stop=["x" * 100_000]), REFUSED, "stop[0]"),
    "too many stop ids": (sampled(stop_token_ids=[1] * 1000), REFUSED, "stop_token_ids"),
    "stop id out of range": (sampled(stop_token_ids=[VOCAB_SIZE]), REFUSED, "stop_token_ids[0]"),
    "bias out of range": (sampled(logit_bias={VOCAB_SIZE: 1.0}), REFUSED, "logit_bias[0]"),
    "bias NaN": (sampled(logit_bias={1: math.nan}), REFUSED, "logit_bias[1]"),
    "giant bias": (sampled(logit_bias=dict.fromkeys(range(5000), 1.0)), REFUSED, "logit_bias"),
    "logprobs": (sampled(logprobs=21), REFUSED, "logprobs"),
    "salt": (ids(1, cache_salt=b"x" * 1000), REFUSED, "cache_salt"),
    "request id": (ids(1, request_id="x" * 1000), REFUSED, "request_id"),
    "resume of several choices": (
        ids(1, resume_from=pb.TokenIds(ids=[1]), sampling={"n": 2}),
        REFUSED,
        "resume_from",
    ),
    "resume longer than the output": (
        ids(1, resume_from=pb.TokenIds(ids=[1, 2]), sampling={"max_tokens": 1}),
        REFUSED,
        "resume_from",
    ),
    "unknown model": (ids(1, model="no-such-model"), CODE.NOT_FOUND, None),
    "message over the limit": (pb.GenerateRequest(text="a" * (5 << 20)), CODE.RESOURCE_EXHAUSTED, None),
}
# What the type of the request cannot hold is sent as bytes.
BAD_BYTES = {
    "invalid text": (b"\x12\x02\xff\xfe", "text"),
    "invalid model": (b"\x0a\x02\xc3\x28", "model"),
    "invalid role": (b"\x1a\x05\x0a\x03\x0a\x01\x80", "chat.messages[0].role"),
    "invalid second stop string": (b"\x2a\x08\x62\x01a\x62\x03\xed\xa0\x80", "sampling.stop[1]"),
    "truncated": (b"\x12\x7f\x61", "request"),
    "not protobuf at all": (b"\xff\xff\xff\xff\xff\xff", "request"),
}


async def failure(call) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return caught.value


async def neighbour(cluster: FakeCluster) -> None:
    """A stream that must come through whatever happens beside it."""
    tokens: list[int] = []
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[9, 9]), sampling=pb.SamplingParams(max_tokens=60))
    async for response in cluster.inference.Generate(request):
        tokens += response.tokens.token_ids
    assert tokens == expected_output([9, 9], 60)


def workers(**settings: object) -> list[FakeWorker]:
    return [FakeWorker("prefill-0", "prefill"), FakeWorker("decode-0", "decode", **settings)]


def test_every_bad_request_is_named_and_disturbs_nobody() -> None:
    async def run() -> None:
        async with FakeCluster(workers(step_s=0.005)) as cluster:
            beside = asyncio.create_task(neighbour(cluster))
            for name, (request, code, field) in BAD.items():
                error = await failure(cluster.inference.Generate(request))
                status = read_status(error)
                assert (name, status.code, status.field) == (name, code, field)
            generate = cluster.channel.unary_stream("/duopool.v1.Inference/Generate")
            for name, (data, field) in BAD_BYTES.items():
                status = read_status(await failure(generate(data)))
                assert (name, status.code, status.field) == (name, REFUSED, field)
            await beside

    asyncio.run(run())


def test_limits_are_in_the_message() -> None:
    async def run() -> None:
        async with FakeCluster() as cluster:
            for name, limit in (
                ("longer than the model", str(MAX_MODEL_LEN - 1)),
                ("id out of range", str(VOCAB_SIZE)),
                ("n absurd", "16"),
                ("giant stop string", "256"),
            ):
                error = await failure(cluster.inference.Generate(BAD[name][0]))
                assert limit in error.details()

    asyncio.run(run())


def test_a_prompt_that_no_pool_can_hold_is_refused() -> None:
    async def run() -> None:
        async with FakeCluster() as cluster:
            small = cluster.workers[1].info
            infos = [cluster.workers[0].info, small.__class__(**{**_fields(small), "num_blocks": 8})]
            cluster.router.pools.update(infos)
            status = read_status(await failure(cluster.inference.Generate(ids(*[1] * 40))))
            assert (status.code, status.field) == (REFUSED, "token_ids")
            assert "32" in status.message
            assert NUM_BLOCKS > 8

    asyncio.run(run())


def _fields(info) -> dict:
    return {name: getattr(info, name) for name in info.__struct_fields__}


def test_other_methods_check_their_input_too() -> None:
    async def run() -> None:
        async with FakeCluster() as cluster:
            inference, admin = cluster.inference, cluster.admin
            cases = (
                (inference.Tokenize(pb.TokenizeRequest()), REFUSED, "prompt"),
                (inference.Tokenize(pb.TokenizeRequest(text="a", model="other")), CODE.NOT_FOUND, None),
                (inference.Detokenize(pb.DetokenizeRequest(token_ids=[VOCAB_SIZE])), REFUSED, "token_ids[0]"),
                (inference.Detokenize(pb.DetokenizeRequest(token_ids=[1] * 600)), REFUSED, "token_ids"),
                (admin.Scale(pb.ScaleRequest()), REFUSED, "pools"),
                (admin.Scale(pb.ScaleRequest(pools={"prefill": 0})), REFUSED, "pools[prefill]"),
                (admin.Scale(pb.ScaleRequest(pools={"gpu": 1})), REFUSED, "pools"),
                (admin.Scale(pb.ScaleRequest(pools={"prefill": 2})), CODE.UNAVAILABLE, None),
                (admin.Drain(pb.DrainRequest(worker_id="nobody")), CODE.NOT_FOUND, None),
            )
            for call, code, field in cases:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                status = read_status(caught.value)
                assert (status.code, status.field) == (code, field)

    asyncio.run(run())


def test_past_the_limit_requests_are_told_when_to_come_back() -> None:
    async def run() -> None:
        async with FakeCluster(workers(step_s=0.01), max_num_requests=1) as cluster:
            beside = asyncio.create_task(neighbour(cluster))
            await eventually(lambda: cluster.router.pools.num_requests == 1)
            status = read_status(await failure(cluster.inference.Generate(ids(1))))
            assert status.code is CODE.RESOURCE_EXHAUSTED
            assert status.retry_after_s is not None
            await beside
            await eventually(lambda: cluster.router.pools.num_requests == 0)
            await neighbour(cluster)

    asyncio.run(run())


def test_a_deadline_ends_the_request_everywhere() -> None:
    async def run() -> None:
        async with FakeCluster(workers(step_s=0.02)) as cluster:
            beside = asyncio.create_task(neighbour(cluster))
            await eventually(lambda: cluster.workers[1].running)
            call = cluster.inference.Generate(sampled(max_tokens=400), timeout=0.3)
            error = await failure(call)
            assert error.code() is CODE.DEADLINE_EXCEEDED
            await eventually(lambda: cluster.router.pools.num_requests == 1)
            await eventually(lambda: len(cluster.workers[1].running) == 1)
            deadlines = [reserve.deadline_s for reserve in cluster.workers[1].received(Reserve)]
            assert deadlines[0] is None
            assert 0 < deadlines[1] < 1
            await beside

    asyncio.run(run())


def test_a_client_that_leaves_is_cancelled_and_its_neighbour_goes_on() -> None:
    async def run() -> None:
        async with FakeCluster(workers(step_s=0.01)) as cluster:
            beside = asyncio.create_task(neighbour(cluster))
            async with grpc.aio.insecure_channel(cluster.address) as channel:
                call = channel.unary_stream("/duopool.v1.Inference/Generate")(
                    sampled(max_tokens=400).SerializeToString()
                )
                await call.read()
                await call.read()
            await eventually(lambda: cluster.router.pools.num_requests == 1)
            await eventually(lambda: cluster.workers[1].received(Cancel))
            await beside

    asyncio.run(run())


def test_a_client_that_never_reads_loses_its_stream_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duopool.router.generation.LINGER_S", 0.2)

    async def run() -> None:
        async with FakeCluster(workers(step_s=0.02, tokens_per_step=4), max_unread_tokens=64) as cluster:
            beside = asyncio.create_task(neighbour(cluster))
            # A client's window grows while it reads nothing; this one stays at 64 KiB, which log-probabilities fill.
            options = (("grpc.http2.bdp_probe", 0),)
            async with grpc.aio.insecure_channel(cluster.address, options=options) as channel:
                call = InferenceStub(channel).Generate(sampled(max_tokens=500, logprobs=20))
                assert (await call.read()).HasField("started")
                await eventually(lambda: cluster.workers[1].received(Cancel))
                await beside
                await asyncio.sleep(0.3)  # past the time to linger
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await drain(call)
                status = read_status(caught.value)
                assert status.code is CODE.RESOURCE_EXHAUSTED
                assert "slow_reader" in status.message

    asyncio.run(run())


async def drain(call) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass
