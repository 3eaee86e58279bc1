"""Every call x who makes it: refused with the code of docs/security.md, or served.

The methods come from the services' own descriptors, so a new one without a row fails here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import msgspec
import openai
import pytest
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection, reflection_pb2
from router_fakes import FakeCluster, eventually
from served_worker import INCARNATION, ServedPrefill
from worker_fakes import VOCAB_SIZE

from duopool.core.messages import (
    BlocksReady,
    Cancel,
    Command,
    CommandBatch,
    DescribeSource,
    Event,
    GenerationRequest,
    Nack,
    NackReason,
    Prefill,
    ReadBlocks,
    Validate,
)
from duopool.core.sampling_params import SamplingParams
from duopool.core.types import Incarnation, LeaseId, RequestId
from duopool.proto import codec, control_pb2
from duopool.proto import inference_pb2 as pb
from duopool.proto.bearer import bearer
from duopool.proto.internal_access import InternalAccess

CODE = grpc.StatusCode
ALICE, BOB = "alice-key-0123456789", "bob-key-0123456789ab"
CLUSTER = "the cluster's credential"
SHOWN = {"nothing": "", "a wrong one": "wrong-0123456789abcdef", "a key": ALICE, "the credential": CLUSTER}

PUBLIC = {
    "/duopool.v1.Inference/Generate": pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[1, 2, 3]), sampling=pb.SamplingParams(max_tokens=2)
    ),
    "/duopool.v1.Inference/Tokenize": pb.TokenizeRequest(text="a"),
    "/duopool.v1.Inference/Detokenize": pb.DetokenizeRequest(token_ids=[97]),
    "/duopool.v1.Inference/ListModels": pb.ListModelsRequest(),
}
OPEN = {
    "/grpc.health.v1.Health/Check": b"",
    "/grpc.health.v1.Health/Watch": b"",
    f"/{reflection.SERVICE_NAME}/ServerReflectionInfo": reflection_pb2.ServerReflectionRequest(
        list_services=""
    ).SerializeToString(),
}
ROUTER_INTERNAL = {
    "/duopool.v1.Admin/ClusterState": pb.ClusterStateRequest(),
    "/duopool.v1.Admin/Scale": pb.ScaleRequest(pools={"prefill": 1}),
    "/duopool.v1.Admin/Drain": pb.DrainRequest(worker_id="nobody"),
    "/duopool.v1.Admin/Restart": pb.RestartRequest(),
    "/duopool.v1.Admin/Audit": pb.AuditRequest(),
    "/duopool.internal.v1.Control/Attach": control_pb2.ClusterUpdate(),
}
WORKER_INTERNAL = {
    codec.SESSION_METHOD: CommandBatch(commands=()),
    codec.DESCRIBE_METHOD: DescribeSource(transport="grpc"),
    codec.READ_METHOD: ReadBlocks(lease_id=LeaseId(1), incarnation=INCARNATION, attempt=1, blocks=()),
    codec.VALIDATE_METHOD: Validate(lease_id=LeaseId(1), incarnation=INCARNATION, attempt=1),
}
LONG_LIVED = (codec.SESSION_METHOD, "/duopool.internal.v1.Control/Attach", "/grpc.health.v1.Health/Watch")
"""Served when their first message, or none, comes without an error."""


def test_every_method_has_a_row() -> None:
    described = {
        f"/{service.full_name}/{method.name}"
        for file in (pb.DESCRIPTOR, control_pb2.DESCRIPTOR)
        for service in file.services_by_name.values()
        for method in service.methods
    }
    internal = {value for name, value in vars(codec).items() if name.endswith("_METHOD")}
    assert described | internal == {*PUBLIC, *ROUTER_INTERNAL, *WORKER_INTERNAL}
    assert {method.split("/")[1] for method in OPEN} == {health.SERVICE_NAME, reflection.SERVICE_NAME}


@asynccontextmanager
async def cluster_with_keys(
    folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> AsyncIterator[FakeCluster]:
    monkeypatch.setenv("DUOPOOL_CREDENTIAL", CLUSTER)
    keys = folder / "keys"
    keys.write_text(f"alice {ALICE}\nbob {BOB}\n")
    keys.chmod(0o600)
    async with FakeCluster(api_keys_file=str(keys), **settings) as cluster:
        await cluster.channel.close()
        yield cluster


async def code_of(address: str, method: str, message: Any, metadata: Any) -> grpc.StatusCode:
    """How a call ends; OK for one that is still being served."""
    if isinstance(message, bytes):
        data = message
    else:
        data = codec.encode(message) if isinstance(message, msgspec.Struct) else message.SerializeToString()
    return await asyncio.to_thread(_code_of, address, method, data, metadata)


def _code_of(address: str, method: str, data: bytes, metadata: Any) -> grpc.StatusCode:
    # The blocking client: asyncio's makes INTERNAL of a write to a call that was refused a moment before.
    with grpc.insecure_channel(address) as channel:
        is_long = method in LONG_LIVED
        call = channel.stream_stream(method)(iter([data]), metadata=metadata, timeout=0.3 if is_long else 20)
        with contextlib.suppress(grpc.RpcError):
            for _ in call:
                pass
        code: grpc.StatusCode = call.code()
        return CODE.OK if is_long and code is CODE.DEADLINE_EXCEEDED else code


async def end_of(call: Any) -> grpc.StatusCode:
    """The code that a call ends with; what it says before is dropped."""
    with contextlib.suppress(grpc.RpcError, asyncio.CancelledError):
        while await call.read() is not grpc.aio.EOF:
            pass
    code: grpc.StatusCode = await call.code()
    return code


SERVED_AS = {
    # What a call that is let in answers here, where nobody supervises and no lease exists.
    "/duopool.v1.Admin/Scale": CODE.UNAVAILABLE,
    "/duopool.v1.Admin/Drain": CODE.NOT_FOUND,
    "/duopool.v1.Admin/Restart": CODE.UNAVAILABLE,
    codec.READ_METHOD: CODE.FAILED_PRECONDITION,
}


def test_who_may_call_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with cluster_with_keys(tmp_path, monkeypatch) as cluster:
            worker = ServedPrefill(InternalAccess(credential=CLUSTER))
            internal = f"127.0.0.1:{cluster.router.internal_port}"
            try:
                for address, methods, entitled in (
                    (cluster.address, PUBLIC, {"a key"}),
                    (cluster.address, OPEN, set(SHOWN)),
                    (internal, ROUTER_INTERNAL, {"the credential"}),
                    (worker.address, WORKER_INTERNAL, {"the credential"}),
                    (internal, {"/duopool.v1.Admin/Unknown": b""}, set()),
                    (worker.address, {"/duopool.v1.Inference/Generate": b""}, set()),
                ):
                    for method, message in methods.items():
                        for who, secret in SHOWN.items():
                            metadata = (*bearer(secret), ("incarnation", str(INCARNATION)))
                            code = await code_of(address, method, message, metadata)
                            expected = SERVED_AS.get(method, CODE.OK) if who in entitled else CODE.UNAUTHENTICATED
                            if method.endswith(("Unknown", "Generate")) and address != cluster.address:
                                expected = CODE.UNIMPLEMENTED if who == "the credential" else CODE.UNAUTHENTICATED
                            assert (method, who, code) == (method, who, expected)
                # Internal services are nowhere to be found on the public port, whatever is shown.
                for method, message in (ROUTER_INTERNAL | WORKER_INTERNAL).items():
                    code = await code_of(cluster.address, method, message, bearer(CLUSTER))
                    assert (method, code) == (method, CODE.UNIMPLEMENTED)
            finally:
                worker.stop()

    asyncio.run(run())


def test_http_asks_for_the_same_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [
        ("POST", "/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 2}),
        ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}),
        ("POST", "/tokenize", {"prompt": "a"}),
        ("POST", "/detokenize", {"tokens": [97]}),
        ("GET", "/v1/models", None),
        ("GET", "/version", None),
        ("GET", "/openapi.json", None),
        ("GET", "/health", None),
        ("GET", "/ready", None),
        ("GET", "/metrics", None),
        ("GET", "/", None),
    ]

    async def run() -> None:
        async with cluster_with_keys(tmp_path, monkeypatch, http_port=0) as cluster:
            url = f"http://127.0.0.1:{cluster.router.http_port}"
            async with httpx.AsyncClient(base_url=url) as client:
                for method, path, body in calls:
                    for who, secret in SHOWN.items():
                        answer = await client.request(method, path, json=body, headers=dict(bearer(secret)))
                        if path in ("/health", "/ready"):
                            entitled = set(SHOWN)
                        else:
                            entitled = {"the credential" if path in ("/metrics", "/") else "a key"}
                        assert (path, who, answer.status_code) == (path, who, 200 if who in entitled else 401)
                        if answer.status_code == 401:
                            assert answer.headers["WWW-Authenticate"] == "Bearer"
                            assert answer.json()["error"]["code"] == "invalid_api_key"
                unknown = await client.get("/nowhere")
                assert unknown.status_code == 401
                events = await client.get("/live/events", headers=dict(bearer(ALICE)))
                assert events.status_code == 401

    asyncio.run(run())


def test_openais_client_brings_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unmodified: by argument or by its own environment variable; a wrong one is its own error."""

    async def run() -> None:
        async with cluster_with_keys(tmp_path, monkeypatch, http_port=0) as cluster:
            url = f"http://127.0.0.1:{cluster.router.http_port}/v1"
            monkeypatch.setenv("OPENAI_API_KEY", BOB)
            for keyed in ({"api_key": ALICE}, {}):
                async with openai.AsyncOpenAI(base_url=url, max_retries=0, **keyed) as client:
                    (model,) = (await client.models.list()).data
                    answer = await client.completions.create(model=model.id, prompt=[1, 2, 3], max_tokens=2)
                    assert answer.usage is not None
                    assert answer.usage.completion_tokens == 2
            async with openai.AsyncOpenAI(base_url=url, max_retries=0, api_key="wrong-0123456789abcdef") as stranger:
                with pytest.raises(openai.AuthenticationError, match="key"):
                    await stranger.completions.create(model=model.id, prompt=[1, 2, 3], max_tokens=2)

    asyncio.run(run())


def test_tenants_share_no_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The salts that reach the workers: one per tenant and salt asked for, the same on every router."""

    async def salts(run: int) -> list[bytes]:
        async with cluster_with_keys(tmp_path, monkeypatch) as cluster:
            for key in (ALICE, BOB):
                for asked in (b"", b"mine"):
                    message = pb.GenerateRequest(
                        token_ids=pb.TokenIds(ids=[1, 2, 3]), sampling=pb.SamplingParams(max_tokens=1), cache_salt=asked
                    )
                    method = "/duopool.v1.Inference/Generate"
                    assert await code_of(cluster.address, method, message, bearer(key)) is CODE.OK
            return [command.request.cache_salt for command in cluster.workers[0].received(Prefill)]

    first, second = asyncio.run(salts(1)), asyncio.run(salts(2))
    assert len(set(first)) == len(first) == 4
    assert first == second


# ---- replayed and stale: past the credential -------------------------------------------------------------------------


class Session:
    """A router's end of a session that shows the credential."""

    def __init__(self, worker: ServedPrefill, incarnation: int = INCARNATION) -> None:
        self._channel = grpc.aio.insecure_channel(worker.address)
        metadata = (*bearer(CLUSTER), ("incarnation", str(incarnation)))
        self.call = self._channel.stream_stream(codec.SESSION_METHOD)(metadata=metadata)

    async def __aenter__(self) -> Session:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.call.cancel()
        await self._channel.close()

    async def send(self, *commands: Command) -> None:
        await self.call.write(codec.encode(CommandBatch(commands=commands)))

    async def until(self, is_it: Callable[[Event], bool]) -> Event:
        while True:
            data = await asyncio.wait_for(self.call.read(), 20)
            assert data is not grpc.aio.EOF, await self.call.details()
            for event in codec.decode_report(data).events:
                if is_it(event):
                    return event


def prefill(name: str, attempt: int) -> Prefill:
    request = GenerationRequest(
        request_id=RequestId(name),
        prompt_token_ids=(1, 2, 3, 4, 5),
        params=SamplingParams(max_tokens=4, ignore_eos=True),
    )
    return Prefill(request=request, attempt=attempt)


def with_worker(work: Callable[[ServedPrefill], Awaitable[None]]) -> None:
    async def run() -> None:
        worker = await asyncio.to_thread(ServedPrefill, InternalAccess(credential=CLUSTER))
        try:
            async with asyncio.timeout(60):
                await work(worker)
        finally:
            await asyncio.to_thread(worker.stop)

    assert VOCAB_SIZE > 5
    asyncio.run(run())


async def unary(worker: ServedPrefill, method: str, message: Any) -> Any:
    async with grpc.aio.insecure_channel(worker.address) as channel:
        data = await channel.unary_unary(method)(codec.encode(message), metadata=bearer(CLUSTER))
        return codec.decode_verdict(data) if method == codec.VALIDATE_METHOD else codec.decode_description(data)


def test_a_session_meant_for_another_life_is_refused() -> None:
    async def work(worker: ServedPrefill) -> None:
        for stale in (INCARNATION + 1, 0, -1):
            async with Session(worker, stale) as session:
                assert await end_of(session.call) is CODE.FAILED_PRECONDITION
        code = await code_of(worker.address, codec.SESSION_METHOD, b"", bearer(CLUSTER))
        assert code is CODE.FAILED_PRECONDITION, "a session that names no incarnation"

    with_worker(work)


def test_old_attempts_and_replays_of_commands_find_nothing_to_do() -> None:
    async def work(worker: ServedPrefill) -> None:
        def is_ready(event: Event) -> bool:
            return isinstance(event, BlocksReady) and event.first_token is not None

        def is_stale(event: Event) -> bool:
            return isinstance(event, Nack) and event.reason is NackReason.STALE

        async with Session(worker) as session:
            await session.send(prefill("r", 2))
            first = await session.until(is_ready)
            await session.send(prefill("r", 2))  # the same command again, maybe a lost answer: the same answer
            assert await session.until(is_ready) == first
            await session.send(prefill("r", 1))
            stale = await session.until(is_stale)
            assert isinstance(stale, Nack)
            assert stale.attempt == 1
            await session.send(Cancel(request_id=RequestId("r"), attempt=2), prefill("r", 2), prefill("r", 1))
            assert (await session.until(is_stale)).attempt == 1  # type: ignore[union-attr]
            await eventually(lambda: worker.worker.is_idle)

    with_worker(work)


def test_reads_and_validates_of_another_attempt_life_or_lease_get_no_data() -> None:
    async def work(worker: ServedPrefill) -> None:
        async with Session(worker) as session:
            await session.send(prefill("r", 2))
            ready = await session.until(lambda event: isinstance(event, BlocksReady) and event.first_token is not None)
            assert isinstance(ready, BlocksReady)
            right = ReadBlocks(lease_id=ready.lease.lease_id, incarnation=INCARNATION, attempt=2, blocks=ready.blocks)
            replace = msgspec.structs.replace
            block = ready.blocks[0]
            wrong = {
                "an older attempt": replace(right, attempt=1),
                "another life": replace(right, incarnation=Incarnation(INCARNATION + 1)),
                "another lease": replace(right, lease_id=LeaseId(999)),
                "another generation": replace(right, blocks=(replace(block, generation=block.generation + 1),)),
                "another block": replace(right, blocks=(replace(block, block_id=31),)),
                "a block that is none": replace(right, blocks=(replace(block, block_id=-1),)),
                "a block far outside": replace(right, blocks=(replace(block, block_id=2**40),)),
            }
            for name, read in wrong.items():
                code = await code_of(worker.address, codec.READ_METHOD, read, bearer(CLUSTER))
                assert (name, code) == (name, CODE.FAILED_PRECONDITION)
            assert await code_of(worker.address, codec.READ_METHOD, right, bearer(CLUSTER)) is CODE.OK
            asked = Validate(lease_id=right.lease_id, incarnation=INCARNATION, attempt=2, release=True)
            for stale in (
                replace(asked, attempt=1),
                replace(asked, incarnation=Incarnation(1)),
                replace(asked, lease_id=LeaseId(999)),
            ):
                assert not (await unary(worker, codec.VALIDATE_METHOD, stale)).ok
            assert (await unary(worker, codec.VALIDATE_METHOD, asked)).ok
            assert not (await unary(worker, codec.VALIDATE_METHOD, asked)).ok, "a replay after the release"
            code = await code_of(worker.address, codec.READ_METHOD, right, bearer(CLUSTER))
            assert code is CODE.FAILED_PRECONDITION, "a replay after the release"

    with_worker(work)


def test_an_older_supervisor_is_told_so_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with cluster_with_keys(tmp_path, monkeypatch) as cluster:
            address = f"127.0.0.1:{cluster.router.internal_port}"
            async with grpc.aio.insecure_channel(address) as channel:
                attach = channel.stream_stream("/duopool.internal.v1.Control/Attach")
                update = control_pb2.ClusterUpdate(wanted={"prefill": 1}).SerializeToString()
                member = control_pb2.MemberUpdate(info=msgspec.msgpack.encode(cluster.workers[0].info))
                newest = control_pb2.ClusterUpdate(wanted={"prefill": 7}, members=[member]).SerializeToString()
                older = attach(metadata=bearer(CLUSTER))
                await older.write(update)
                await eventually(lambda: cluster.router.pools.wanted == {"prefill": 1})
                newer = attach(metadata=bearer(CLUSTER))
                await newer.write(newest)
                assert await end_of(older) is CODE.ABORTED
                await eventually(lambda: cluster.router.pools.wanted == {"prefill": 7})
                no_member = control_pb2.ClusterUpdate(members=[control_pb2.MemberUpdate(info=b"\xc1")])
                for garbage in (b"\xff\xff", no_member.SerializeToString()):
                    again = attach(metadata=bearer(CLUSTER))
                    await again.write(garbage)
                    assert await end_of(again) is CODE.INVALID_ARGUMENT
                assert cluster.router.pools.wanted == {"prefill": 7}
                assert len(cluster.router.pools.members) == 1

    asyncio.run(run())
