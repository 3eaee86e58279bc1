"""The rest of a router's face: health, reflection, admin, control, tokenizer calls, the process and the client."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import grpc
import msgspec
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from router_fakes import FakeCluster, FakeWorker, byte_tokenizer, eventually, expected_output, router_tokenizer

from duopool.client import AsyncClient, Client, DeadlineExceeded, RequestRefused, ServerUnavailable
from duopool.core.config import ModelConfig, RouterConfig
from duopool.core.errors import WorkerNotFound
from duopool.proto import control_pb2, control_pb2_grpc
from duopool.proto import inference_pb2 as pb
from duopool.proto.control_codec import result_of
from duopool.router.server import RouterServer

PROMPT = [5, 6, 7]


def test_health_follows_the_pools() -> None:
    async def run() -> None:
        async with FakeCluster() as cluster:
            health = health_pb2_grpc.HealthStub(cluster.channel)
            serving = health_pb2.HealthCheckResponse.ServingStatus

            async def status() -> int:
                names = ("", "duopool.v1.Inference")
                (one, other) = [(await health.Check(health_pb2.HealthCheckRequest(service=n))).status for n in names]
                assert one == other
                return one

            assert await status() == serving.SERVING
            await cluster.workers[0].stop()
            await eventually(lambda: not cluster.router.pools.num_ready("prefill"))
            await asyncio.sleep(0)
            assert await status() == serving.NOT_SERVING

    asyncio.run(run())


def test_reflection_names_the_services() -> None:
    async def run() -> None:
        async with FakeCluster() as cluster:
            stub = reflection_pb2_grpc.ServerReflectionStub(cluster.channel)
            call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
            response = await call.read()
            names = {service.name for service in response.list_services_response.service}
            assert {"duopool.v1.Inference", "grpc.health.v1.Health"} <= names
            assert "duopool.v1.Admin" not in names  # operators' calls are on the internal port
            call.cancel()

    asyncio.run(run())


def test_text_chat_and_ids_meet() -> None:
    async def run() -> None:
        async with FakeCluster() as cluster, AsyncClient(cluster.address) as client:
            text = "héllo 日本"
            assert await client.tokenize(text) == list(text.encode())
            assert await client.detokenize(list(text.encode())) == text
            chat = await client.tokenize(messages=[{"role": "user", "content": "hi"}])
            assert chat == [256, *b"user: hi", 257, 256, *b"assistant: "]
            (model,) = await client.models()
            assert (model.id, model.vocab_size) == ("tiny", 300)

            async def tokens(**fields: object) -> list[int]:
                events = [event async for event in client.generate(**fields, max_tokens=6)]
                return [token for event in events if isinstance(event, pb.TokenChunk) for token in event.token_ids]

            assert await tokens(prompt=text) == expected_output(list(text.encode()), 6)
            assert await tokens(messages=[{"role": "user", "content": "hi"}]) == expected_output(chat, 6)

    asyncio.run(run())


def test_stop_strings_end_the_stream_and_the_worker() -> None:
    async def run() -> None:
        async with FakeCluster() as cluster, AsyncClient(cluster.address) as client:
            letters = "".join(map(chr, expected_output(PROMPT, 60)))
            stop = letters[20:23]
            end = letters.index(stop)
            for include in (False, True):
                *events, finished = [
                    event
                    async for event in client.generate(
                        token_ids=PROMPT, max_tokens=400, stop=[stop], include_stop_str_in_output=include
                    )
                ]
                text = "".join(event.text for event in events[1:])
                assert text == letters[: end + (len(stop) if include else 0)]
                assert (finished.finish_reason, finished.stop_reason) == ("stop", stop)
                assert finished.usage.completion_tokens == end + len(stop)
            await eventually(lambda: not cluster.workers[1].running)

    asyncio.run(run())


def test_supervisor_brings_members_and_takes_commands() -> None:
    async def run() -> None:
        workers = [FakeWorker("prefill-0", "prefill"), FakeWorker("decode-0", "decode")]
        async with FakeCluster(workers) as cluster:
            cluster.router.pools.update(())
            updates: asyncio.Queue[control_pb2.ClusterUpdate] = asyncio.Queue()
            seen: list[control_pb2.ClusterCommand] = []

            def membership() -> control_pb2.ClusterUpdate:
                infos = [msgspec.msgpack.encode(worker.info) for worker in workers]
                members = [control_pb2.MemberUpdate(info=info) for info in infos]
                return control_pb2.ClusterUpdate(members=members, wanted={"prefill": 1, "decode": 3})

            async def said():
                while True:
                    yield await updates.get()

            async def supervise(channel) -> None:
                async for command in cluster.access.stub(control_pb2_grpc.ControlStub, channel).Attach(said()):
                    seen.append(command)
                    error = WorkerNotFound("no") if command.HasField("drain") else None
                    result = result_of(command.command_id, error)
                    updates.put_nowait(control_pb2.ClusterUpdate(results=[result]))

            async with grpc.aio.insecure_channel(f"127.0.0.1:{cluster.router.internal_port}") as channel:
                supervisor = asyncio.create_task(supervise(channel))
                updates.put_nowait(membership())
                await eventually(lambda: cluster.router.pools.num_ready("decode") == 1)
                answer = await cluster.admin.Scale(pb.ScaleRequest(pools={"prefill": 2, "decode": 3}))
                pools = {pool.role: (pool.wanted, pool.ready) for pool in answer.pools}
                assert pools["decode"] == (3, 1)
                assert dict(seen[0].scale.pools) == {"prefill": 2, "decode": 3}
                with pytest.raises(grpc.aio.AioRpcError, match="no") as refused:
                    await cluster.admin.Drain(pb.DrainRequest(worker_id="decode-0"))
                assert refused.value.code() is grpc.StatusCode.NOT_FOUND
                assert seen[1].drain.worker_id == "decode-0"
                (decode,) = [info for info in cluster.router.pools.members if info.worker_id == "decode-0"]
                assert seen[1].drain.incarnation == decode.incarnation
                late = pb.DrainRequest(worker_id="decode-0", incarnation=decode.incarnation + 1)
                with pytest.raises(grpc.aio.AioRpcError, match="replaced") as refused:
                    await cluster.admin.Drain(late)
                assert refused.value.code() is grpc.StatusCode.NOT_FOUND
                assert len(seen) == 2  # the supervisor was not asked
                assert len(cluster.router.pools.members) == 2  # an answer alone changes no membership
                supervisor.cancel()
            await eventually(lambda: cluster.router.pools.num_ready("decode") == 1)
            await asyncio.sleep(0.05)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await cluster.admin.Scale(pb.ScaleRequest(pools={"prefill": 1}))
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            state = await cluster.admin.ClusterState(pb.ClusterStateRequest())
            assert [(worker.worker_id, worker.state) for worker in state.workers] == [
                ("decode-0", "ready"),
                ("prefill-0", "ready"),
            ]

    asyncio.run(run())


def test_clients_raise_readable_errors() -> None:
    async def run() -> None:
        workers = [FakeWorker("prefill-0", "prefill"), FakeWorker("decode-0", "decode", step_s=0.05)]
        async with FakeCluster(workers) as cluster, AsyncClient(cluster.address) as client:
            with pytest.raises(RequestRefused, match="temperature") as caught:
                await anext(client.generate("x", temperature=-1.0))
            assert caught.value.status.field == "temperature"
            with pytest.raises(DeadlineExceeded):
                _ = [event async for event in client.generate("x", max_tokens=300, timeout_s=0.2)]
        async with AsyncClient("127.0.0.1:1") as client:
            with pytest.raises(ServerUnavailable):
                await client.models()

    asyncio.run(run())


def test_a_client_goes_on_at_another_router() -> None:
    async def run() -> None:
        workers = [FakeWorker("prefill-0", "prefill"), FakeWorker("decode-0", "decode", step_s=0.01)]
        async with FakeCluster(workers) as cluster, FakeCluster([]) as other:
            other.router.pools.update([worker.info for worker in workers])
            await eventually(lambda: other.router.pools.num_ready("decode") == 1)
            tokens, kinds = [], []
            async with AsyncClient([cluster.address, other.address]) as client:
                async for event in client.generate(token_ids=PROMPT, max_tokens=40):
                    kinds.append(type(event))
                    if isinstance(event, pb.TokenChunk):
                        assert event.index == len(tokens)
                        tokens += event.token_ids
                    if len(tokens) == 10:
                        await cluster.router.stop(0)
            assert tokens == expected_output(PROMPT, 40)
            assert kinds.count(pb.Started) == kinds.count(pb.Finished) == 1

    asyncio.run(run())


def test_the_sync_client_does_the_same() -> None:
    async def run() -> None:
        async with FakeCluster() as cluster:

            def work() -> None:
                with Client(cluster.address) as client:
                    events = list(client.generate(token_ids=PROMPT, max_tokens=8))
                    tokens = [t for event in events if isinstance(event, pb.TokenChunk) for t in event.token_ids]
                    assert tokens == expected_output(PROMPT, 8)
                    assert client.detokenize(client.tokenize("abc")) == "abc"
                    assert client.models()[0].id == "tiny"
                    with pytest.raises(RequestRefused):
                        next(client.generate(""))

            await asyncio.to_thread(work)

    asyncio.run(run())


def test_the_process_says_where_it_listens_and_stops_when_told(tmp_path: Path) -> None:
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    config = {"port": 0, "model": {"model": str(tmp_path), "served_model_name": "tiny"}}
    command = [sys.executable, "-m", "duopool.router.main", "--config", json.dumps(config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ}) as process:
        timer = threading.Timer(60, process.kill)
        timer.start()
        try:
            assert process.stdout is not None
            ports = json.loads(process.stdout.readline())
            with Client(f"127.0.0.1:{ports['port']}") as client:
                assert [model.id for model in client.models()] == ["tiny"]
            modules = Path(f"/proc/{process.pid}/maps").read_text() if Path("/proc/self/maps").exists() else ""
            assert "libtorch" not in modules
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait() == 0
            timer.cancel()


@pytest.mark.parametrize("field", ["port", "http_port", "internal_port"])
def test_a_router_whose_port_is_taken_names_it_and_leaves_nothing_behind(field: str) -> None:
    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            ports = {"port": 0, "http_port": 0, "internal_port": 0} | {field: port}
            server = RouterServer(RouterConfig(model=ModelConfig(model="tiny"), **ports), router_tokenizer())
            with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"):
                await server.start()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        await server.stop()

    asyncio.run(run())
