"""The VllmEngine protocol of smg-grpc-proto over both workers: a gateway that does the least, on real ports."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import grpc
import pytest
from worker_fakes import EOS, VOCAB_SIZE, Pair, expected_stream, make_pair, next_token, worker_config

from duopool.core.messages import WorkerInfo
from duopool.core.sampling_params import SamplingParams
from duopool.core.types import Incarnation, Role, WorkerId
from duopool.engine.served_model import ServedModel
from duopool.proto.internal_access import InternalAccess
from duopool.proto.worker_service import WorkerService

pytest.importorskip("smg_grpc_proto", reason="the extra 'smg' is not installed")

from smg_grpc_proto import vllm_engine_pb2 as wire
from smg_grpc_proto import vllm_engine_pb2_grpc

from duopool.engine.smg.exchange import HANDLE_TTL_S
from duopool.engine.smg.handle import HandleSeal
from duopool.engine.smg.service import EngineServer, Served

ACCESS = InternalAccess(credential="a credential for tests")
PROMPT = tuple(range(1, 12))
MAX_LEN = 60


class Gateway:
    """Both workers' stubs, and the steps in between that the gateway's PD mode takes."""

    def __init__(self, pair: Pair, prefill: Any, decode: Any, raw: Any) -> None:
        self.pair = pair
        self.raw = raw
        """The decode worker's channel."""
        self.prefill = prefill
        self.decode = decode

    async def handle(self, request: wire.GenerateRequest) -> str:
        """What a prefill worker gives for the decode worker, asked as the gateway asks."""
        asked = wire.GenerateRequest()
        asked.CopyFrom(request)
        asked.stream = False
        asked.kv_transfer_params_json = json.dumps({"do_remote_decode": True, "do_remote_prefill": False})
        sampling = asked.sampling_params
        sampling.max_tokens, sampling.min_tokens, sampling.n, sampling.ignore_eos = 1, 0, 1, True
        del sampling.stop[:], sampling.stop_token_ids[:]
        (answer,) = [response.complete async for response in self.prefill.Generate(asked)]
        assert (len(answer.output_ids), answer.finish_reason) == (1, "length")
        return str(answer.kv_transfer_params_json)

    async def ask(self, request: wire.GenerateRequest, handle: str | None) -> list[Any]:
        """The decode worker's messages."""
        asked = wire.GenerateRequest()
        asked.CopyFrom(request)
        if handle is not None:
            asked.kv_transfer_params_json = handle
        return [response async for response in self.decode.Generate(asked)]

    async def generate(self, request: wire.GenerateRequest) -> list[Any]:
        return await self.ask(request, await self.handle(request))


def request_of(prompt: Sequence[int] = PROMPT, *, stream: bool = False, **sampling: Any) -> wire.GenerateRequest:
    return wire.GenerateRequest(
        request_id="chatcmpl-1",
        tokenized=wire.TokenizedInput(input_ids=prompt),
        sampling_params=wire.SamplingParams(**{"max_tokens": 9, "seed": 3, "ignore_eos": True} | sampling),
        stream=stream,
    )


def expected(prompt: Sequence[int] = PROMPT, **params: Any) -> list[int]:
    return expected_stream(prompt, SamplingParams(**{"max_tokens": 9, "seed": 3, "ignore_eos": True} | params))


def tokens_of(messages: Sequence[Any]) -> list[int]:
    return [token_id for message in messages for token_id in message.chunk.token_ids]


@asynccontextmanager
async def gateway(folder: Path) -> AsyncIterator[Gateway]:
    """Two workers that step whenever there is something to do, each behind its own port."""
    pair = make_pair(max_model_len=MAX_LEN)
    model = ServedModel(vocab_size=VOCAB_SIZE, max_model_len=MAX_LEN, eos_token_ids=frozenset({EOS}))
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    (folder / "tokenizer.json").write_text("{}")
    server = grpc.aio.server()
    services, tasks, channels = [], [], []
    for role, worker in ((Role.PREFILL, pair.prefill), (Role.DECODE, pair.decode)):
        service = WorkerService(
            worker, incarnation=Incarnation(1), heartbeat_s=0.02, on_commands=lambda: None, clock=pair.clock
        )
        service.add_to(server)
        engine = await EngineServer.listen("127.0.0.1", 0)
        info = WorkerInfo(
            worker_id=WorkerId(f"{role}-0"),
            role=role.value,
            incarnation=Incarnation(1),
            address="",
            model="m",
            model_digest="d",
            layout_digest="l",
            block_size=4,
            num_blocks=64,
            max_model_len=MAX_LEN,
            vocab_size=VOCAB_SIZE,
        )
        served = Served(
            info=info, model=model, folder=folder, config=worker_config(role), access=ACCESS, load=worker.load
        )
        running = engine.run(service, served)
        tasks.append(asyncio.create_task(running))
        services.append(service)
        channels.append(grpc.aio.insecure_channel(engine.address))

    async def pump() -> None:
        while True:
            pair.prefill.step(now=pair.clock.now)
            pair.decode.step(now=pair.clock.now)
            while pair.reader.pending:
                pair.reader.run()
            for service in services:
                service.flush()
            await asyncio.sleep(0.001)

    tasks.append(asyncio.create_task(pump()))
    try:
        stubs = [vllm_engine_pb2_grpc.VllmEngineStub(channel) for channel in channels]
        yield Gateway(pair, *stubs, raw=channels[-1])
    finally:
        for channel in channels:
            await channel.close()
        for task in reversed(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def run(folder: Path, body: Callable[[Gateway], Awaitable[None]]) -> None:
    async def whole() -> None:
        async with gateway(folder) as running:
            await body(running)
            await until(lambda: running.pair.decode.is_idle)
            running.pair.decode.check()
            running.pair.prefill.check()

    asyncio.run(asyncio.wait_for(whole(), 30))


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await asyncio.sleep(0.002)


async def refusal_of(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    return refused.value.code(), refused.value.details() or ""


@pytest.mark.parametrize("length", [1, 4, 11, 40])
def test_a_handle_brings_every_block_and_the_first_token(length: int, tmp_path: Path) -> None:
    async def body(one: Gateway) -> None:
        prompt = [at % VOCAB_SIZE for at in range(length)]
        request = request_of(prompt)
        (answer,) = await one.generate(request)
        assert list(answer.complete.output_ids) == expected(prompt)
        assert (answer.complete.prompt_tokens, answer.complete.completion_tokens) == (length, 9)
        assert answer.complete.finish_reason == "length"
        assert one.pair.reader.num_blocks_read == -(-length // 4)
        assert one.pair.prefill.is_idle, "the read has released the lease"
        computed = one.pair.decode.load().num_computed_tokens
        assert computed == 8, "the decode worker computes no token of the prompt"

    run(tmp_path, body)


def test_a_stream_tells_the_same_in_pieces(tmp_path: Path) -> None:
    async def body(one: Gateway) -> None:
        *chunks, last = await one.generate(request_of(stream=True, logprobs=0))
        assert tokens_of(chunks) == expected()
        assert sum(message.chunk.completion_tokens for message in chunks) == 9
        assert [list(message.chunk.output_logprobs.token_ids) for message in chunks] == [[id_] for id_ in expected()]
        assert (last.WhichOneof("response"), last.complete.finish_reason) == ("complete", "length")

    run(tmp_path, body)


def test_the_seed_that_the_prefill_worker_drew_is_the_requests(tmp_path: Path) -> None:
    async def body(one: Gateway) -> None:
        request = request_of()
        request.sampling_params.ClearField("seed")
        handle = await one.handle(request)
        opened = HandleSeal(ACCESS.credential, model_digest="d").from_json(handle, PROMPT)
        assert opened is not None
        (answer,) = await one.ask(request, handle)
        assert list(answer.complete.output_ids) == expected(seed=opened.seed)

    run(tmp_path, body)


def test_a_handle_that_was_used_or_is_too_old_costs_a_prefill_and_nothing_else(tmp_path: Path) -> None:
    async def body(one: Gateway) -> None:
        request = request_of()
        handle = await one.handle(request)
        await one.ask(request, handle)
        (again,) = await one.ask(request, handle)
        assert list(again.complete.output_ids) == expected()
        late = await one.handle(request_of(range(20, 40)))
        one.pair.clock.now += HANDLE_TTL_S + 10
        await asyncio.sleep(0.1)
        one.pair.prefill.tick(now=one.pair.clock.now + 10)
        assert one.pair.prefill.is_idle
        (answer,) = await one.ask(request_of(range(20, 40)), late)
        assert list(answer.complete.output_ids) == expected(range(20, 40))

    run(tmp_path, body)


def test_the_lease_lives_while_the_handle_is_on_its_way(tmp_path: Path) -> None:
    async def body(one: Gateway) -> None:
        request = request_of()
        handle = await one.handle(request)
        ttl_s = worker_config(Role.PREFILL).handoff.lease_ttl_s
        for _ in range(3):
            one.pair.clock.now += 0.8 * ttl_s
            await asyncio.sleep(0.06)
            one.pair.prefill.tick(now=one.pair.clock.now)
        read_before = one.pair.reader.num_blocks_read
        (answer,) = await one.ask(request, handle)
        assert list(answer.complete.output_ids) == expected()
        assert one.pair.reader.num_blocks_read > read_before

    run(tmp_path, body)


def test_the_client_says_when_the_first_token_is_the_last(tmp_path: Path) -> None:
    """The gateway keeps stop tokens from the prefill worker."""

    async def body(one: Gateway) -> None:
        first = next_token(PROMPT, 3)
        (stopped,) = await one.generate(request_of(stop_token_ids=[first]))
        assert list(stopped.complete.output_ids) == [first]
        assert (stopped.complete.finish_reason, stopped.complete.matched_token_id) == ("stop", first)
        (single,) = await one.generate(request_of(max_tokens=1))
        assert (list(single.complete.output_ids), single.complete.finish_reason) == ([first], "length")
        (longer,) = await one.generate(request_of(stop_token_ids=[first], min_tokens=9))
        assert list(longer.complete.output_ids) == expected(), "the sampler of these tests forbids nothing"
        prompt = next(found for at in range(1000) if next_token(found := [at // 50, at % 50], 3) == EOS)
        (ended,) = await one.generate(request_of(prompt, ignore_eos=False))
        assert (list(ended.complete.output_ids), ended.complete.finish_reason) == ([EOS], "stop")

    run(tmp_path, body)


def test_a_decode_worker_without_a_handle_computes_the_prompt(tmp_path: Path) -> None:
    async def body(one: Gateway) -> None:
        (answer,) = await one.ask(request_of(), None)
        assert list(answer.complete.output_ids) == expected()
        assert one.pair.reader.num_blocks_read == 0

    run(tmp_path, body)


def test_a_handle_counts_for_its_prompt_and_cluster_only(tmp_path: Path) -> None:
    async def body(one: Gateway) -> None:
        handle = json.loads(await one.handle(request_of()))
        others = HandleSeal("another cluster's credential", model_digest="d")
        forged = {**handle, "duopool_seal": others._seal(b"")}
        for params, request in (
            (handle, request_of(PROMPT[1:])),
            (forged, request_of()),
            ({**handle, "duopool_seal": None}, request_of()),
            ({**handle, "duopool_handle": "&"}, request_of()),
            ({**handle, "duopool_handle": handle["duopool_handle"][4:]}, request_of()),
            ([], request_of()),
        ):
            code, details = await refusal_of(one.ask(request, json.dumps(params)))
            assert (code, "kv_transfer_params_json" in details) == (grpc.StatusCode.INVALID_ARGUMENT, True), details
        code, _ = await refusal_of(one.ask(request_of(), "{"))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        (answer,) = await one.ask(request_of(), json.dumps(handle))
        assert list(answer.complete.output_ids) == expected()

    run(tmp_path, body)


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("tokenized.input_ids", request_of(())),
        ("tokenized.input_ids", request_of([VOCAB_SIZE])),
        ("tokenized.input_ids", request_of([1] * MAX_LEN)),
        ("text", wire.GenerateRequest(text="hello")),
        ("n", request_of(n=2)),
        ("json_object", request_of(json_object=True)),
        ("temperature", request_of(temperature=-1)),
        ("max_tokens", request_of(max_tokens=0)),
        ("truncate_prompt_tokens", request_of(truncate_prompt_tokens=5)),
        ("sampling_params", request_of(stop_token_ids=[VOCAB_SIZE])),
        ("mm_inputs", wire.GenerateRequest(mm_inputs=wire.MultimodalInputs())),
    ],
)
def test_what_is_not_served_is_refused_by_name(field: str, request_: wire.GenerateRequest, tmp_path: Path) -> None:
    async def body(one: Gateway) -> None:
        code, details = await refusal_of(one.ask(request_, None))
        assert (code, field in details) == (grpc.StatusCode.INVALID_ARGUMENT, True), details
        if field != "max_tokens":
            return
        code, details = await refusal_of(anext(aiter(one.prefill.Generate(request_of(max_tokens=5)))))
        assert (code, "max_tokens" in details) == (grpc.StatusCode.INVALID_ARGUMENT, True), details

    run(tmp_path, body)


def wild_request(random: Random) -> wire.GenerateRequest:
    """A request whose fields hold what nobody should send, and some what anybody may."""
    numbers = (0.0, -1.0, 0.5, 1.5, 1e30, math.nan, math.inf, -math.inf)
    counts = (0, 1, 3, 2**31 - 1, 2**32 - 1)
    sampling: dict[str, Any] = {}
    for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
        if random.random() < 0.3:
            sampling[name] = random.choice(numbers)
    for name in ("top_k", "max_tokens", "min_tokens"):
        if random.random() < 0.3:
            sampling[name] = random.choice(counts)
    for name in ("logprobs", "prompt_logprobs", "seed"):
        if random.random() < 0.3:
            sampling[name] = random.choice((-(2**31), -1, 0, 5, 2**31 - 1))
    if random.random() < 0.2:
        sampling["logit_bias"] = {random.randint(-5, 60): random.choice(numbers) for _ in range(3)}
    if random.random() < 0.2:
        sampling["stop_token_ids"] = [random.choice(counts) for _ in range(3)]
    request = request_of([random.randint(0, VOCAB_SIZE) for _ in range(random.randint(0, MAX_LEN + 3))], **sampling)
    request.stream = random.random() < 0.5
    if random.random() < 0.5:
        handles = (
            "",
            "null",
            "[" * 5000,
            '{"duopool_handle": 1}',
            '{"duopool_handle": "AAAA", "duopool_seal": {}}',
            "é",
        )
        request.kv_transfer_params_json = random.choice(handles)
    return request


def test_nothing_that_is_sent_takes_a_worker_down(tmp_path: Path) -> None:
    async def body(one: Gateway) -> None:
        random, ended = Random(1), Counter[grpc.StatusCode]()
        for _ in range(300):
            call = random.choice((one.prefill, one.decode)).Generate(wild_request(random))
            with contextlib.suppress(grpc.aio.AioRpcError):
                _ = [response async for response in call]
            ended[await call.code()] += 1
        assert set(ended) == {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT}, ended
        for name in ("Generate", "Abort", "GetLoads", "Embed"):
            call = one.raw.unary_stream(f"/vllm.grpc.engine.VllmEngine/{name}")(random.randbytes(40))
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                _ = [answer async for answer in call]
            assert refused.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED)
        (answer,) = await one.generate(request_of())
        assert list(answer.complete.output_ids) == expected()

    run(tmp_path, body)


@pytest.mark.parametrize("is_abort", [True, False], ids=["abort", "cancel"])
def test_a_request_that_is_given_up_holds_nothing(is_abort: bool, tmp_path: Path) -> None:
    async def body(one: Gateway) -> None:
        request = request_of(stream=True, max_tokens=40)
        request.kv_transfer_params_json = await one.handle(request)
        call = one.decode.Generate(request)
        await call.read()
        if is_abort:
            await one.decode.Abort(wire.AbortRequest(request_ids=["chatcmpl-1", "nobody"]))
        else:
            call.cancel()
        await until(lambda: one.pair.decode.is_idle)
        await until(lambda: one.pair.prefill.is_idle or one.pair.prefill.load().num_leases == 1)

    run(tmp_path, body)


def test_the_gateway_learns_what_it_needs_to_pair_the_pools(tmp_path: Path) -> None:
    async def body(one: Gateway) -> None:
        infos = [await stub.GetServerInfo(wire.GetServerInfoRequest()) for stub in (one.prefill, one.decode)]
        assert {info.kv_connector for info in infos} == {"NixlConnector"}
        assert infos[0].pairing_protocol == infos[1].pairing_protocol != ""
        assert [info.kv_role for info in infos] == ["kv_producer", "kv_consumer"]
        model = await one.decode.GetModelInfo(wire.GetModelInfoRequest())
        assert (model.max_context_length, model.vocab_size, list(model.eos_token_ids)) == (MAX_LEN, VOCAB_SIZE, [EOS])
        assert (await one.decode.HealthCheck(wire.HealthCheckRequest())).healthy
        (load,) = (await one.decode.GetLoads(wire.GetLoadsRequest())).loads
        assert (load.num_running_reqs, load.max_total_num_tokens) == (0, 64 * 4)

    run(tmp_path, body)
