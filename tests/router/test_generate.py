"""Streams through a whole router: what comes out is what the model says, one token after the other."""

from __future__ import annotations

import asyncio

import pytest
from http_fakes import client_of
from router_fakes import FakeCluster, FakeWorker, eventually, expected_output

from duopool.core.messages import Cancel, Prefill, Reserve
from duopool.proto import inference_pb2 as pb

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
CHAT = [{"role": "user", "content": "hi"}]


def request(prompt: list[int] = PROMPT, **sampling: object) -> pb.GenerateRequest:
    sampling.setdefault("max_tokens", 12)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=pb.SamplingParams(**sampling))


async def collect(call) -> tuple[pb.Started, list[pb.TokenChunk], pb.Finished]:
    responses = [response async for response in call]
    assert [response.WhichOneof("event") for response in responses] == [
        "started",
        *["tokens"] * (len(responses) - 2),
        "finished",
    ]
    return responses[0].started, [response.tokens for response in responses[1:-1]], responses[-1].finished


def test_stream_is_started_then_tokens_then_finished() -> None:
    async def run() -> None:
        async with FakeCluster() as cluster:
            started, chunks, finished = await collect(cluster.inference.Generate(request()))
            assert (started.prefill_worker, started.decode_worker) == ("prefill-0", "decode-0")
            assert started.prompt_tokens == len(PROMPT)
            assert [token for chunk in chunks for token in chunk.token_ids] == expected_output(PROMPT, 12)
            assert [chunk.index for chunk in chunks] == list(range(12))
            text = "".join(chunk.text for chunk in chunks)
            assert text == "".join(map(chr, expected_output(PROMPT, 12)))
            assert finished.finish_reason == "length"
            assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (8, 12)
            assert finished.times.transfer_bytes == 3000
            assert finished.times.prefill_s == pytest.approx(0.002)
            assert finished.attempts == 1

    asyncio.run(run())


def test_tokens_come_while_decoding_runs() -> None:
    async def run() -> None:
        workers = [FakeWorker("prefill-0", "prefill"), FakeWorker("decode-0", "decode", step_s=0.02)]
        async with FakeCluster(workers) as cluster:
            call = cluster.inference.Generate(request(max_tokens=400))
            for _ in range(4):
                await call.read()
            assert workers[1].running
            call.cancel()
            await eventually(lambda: workers[1].received(Cancel) and not workers[1].running)

    asyncio.run(run())


def test_choices_have_seeds_of_their_own() -> None:
    async def run() -> None:
        async with FakeCluster() as cluster:
            call = cluster.inference.Generate(request(n=3, seed=7, max_tokens=5))
            responses = [response async for response in call]
            tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
            for response in responses:
                if response.HasField("tokens"):
                    assert response.tokens.index == len(tokens[response.tokens.choice])
                    tokens[response.tokens.choice] += response.tokens.token_ids
            assert all(ids == expected_output(PROMPT, 5) for ids in tokens.values())
            assert sorted(r.finished.choice for r in responses if r.HasField("finished")) == [0, 1, 2]
            assert sum(response.HasField("started") for response in responses) == 1
            (prefill,) = cluster.workers[0].received(Prefill)
            (reserve,) = cluster.workers[1].received(Reserve)
            assert prefill.request == reserve.request
            assert [output.params.seed for output in prefill.request.outputs] == [7, 8, 9]

    asyncio.run(run())


def test_the_priority_reaches_both_workers() -> None:
    async def run() -> None:
        async with FakeCluster() as cluster, client_of(cluster) as client:
            asked = request(max_tokens=2)
            asked.priority = -7
            await collect(cluster.inference.Generate(asked))
            for path, prompt in (("completions", {"prompt": "hi"}), ("chat/completions", {"messages": CHAT})):
                answer = await client.post(f"/v1/{path}", json={**prompt, "max_tokens": 2, "priority": 9})
                assert answer.status_code == 200
            answer = await client.post("/v1/completions", json={"prompt": "hi", "priority": 2**31})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "priority")
            for worker, kind in zip(cluster.workers, (Prefill, Reserve), strict=True):
                assert [command.request.priority for command in worker.received(kind)] == [-7, 9, 9]

    asyncio.run(run())


def test_the_bytes_of_a_token_are_told_also_where_they_are_no_text() -> None:
    async def run() -> None:
        async with FakeCluster() as cluster, client_of(cluster) as client:
            asked = request(max_tokens=2, logprobs=20)
            _, chunks, _ = await collect(cluster.inference.Generate(asked))
            top = chunks[0].logprobs[0].top
            assert [entry.token_bytes for entry in top] == [bytes([token_id]) for token_id in range(20)]
            body = {"messages": CHAT, "max_tokens": 2, "logprobs": True, "top_logprobs": 3}
            answer = (await client.post("/v1/chat/completions", json=body)).json()
            for entry in answer["choices"][0]["logprobs"]["content"]:
                assert bytes(entry["bytes"]).decode() == entry["token"]
                assert [each["bytes"] for each in entry["top_logprobs"]] == [[0], [1], [2]]

    asyncio.run(run())


def test_many_streams_at_once_do_not_mix() -> None:
    async def run() -> None:
        async with FakeCluster() as cluster:
            prompts = [[n, n + 1, n + 2] for n in range(24)]
            results = await asyncio.gather(*(collect(cluster.inference.Generate(request(p))) for p in prompts))
            for prompt, (_, chunks, _) in zip(prompts, results, strict=True):
                assert [t for chunk in chunks for t in chunk.token_ids] == expected_output(prompt, 12)
            assert len(cluster.workers[1].received(Reserve)) == 24

    asyncio.run(run())
