"""The client library over routers that break: every token once and in order, and an end that is always told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest

from duopool import client as client_module
from duopool.client import AsyncClient, Client, RequestRefused, ServerUnavailable, StreamEvent
from duopool.proto import inference_pb2 as pb
from duopool.proto.inference_pb2_grpc import InferenceServicer, add_InferenceServicer_to_server

NUM_TOKENS = 20


class Router(InferenceServicer):
    """Token i of a stream is seed + i. Breaks off after as many tokens as `breaks` says for each call."""

    def __init__(self, breaks: list[int]) -> None:
        self.breaks = breaks
        self.requests: list[pb.GenerateRequest] = []

    def Generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
        self.requests.append(request)
        room = self.breaks.pop(0) if self.breaks else NUM_TOKENS + 1
        seed = request.sampling.seed if request.sampling.HasField("seed") else 1000
        yield pb.GenerateResponse(started=pb.Started(seed=seed))
        for index in range(len(request.resume_from.ids), NUM_TOKENS):
            if room == 0:
                context.abort(grpc.StatusCode.UNAVAILABLE, "broken by the test")
            room -= 1
            yield pb.GenerateResponse(tokens=pb.TokenChunk(index=index, token_ids=[seed + index]))
        yield pb.GenerateResponse(finished=pb.Finished(finish_reason="length"))
        if room == 0:
            context.abort(grpc.StatusCode.UNAVAILABLE, "broken by the test after the end")


@contextmanager
def serving(*routers: InferenceServicer) -> Iterator[list[str]]:
    servers, addresses = [], []
    for router in routers:
        server = grpc.server(ThreadPoolExecutor(4))
        add_InferenceServicer_to_server(router, server)  # type: ignore[no-untyped-call]
        addresses.append(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
        server.start()
        servers.append(server)
    try:
        yield addresses
    finally:
        for server in servers:
            server.stop(None)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "FIRST_BACKOFF_S", 0.001)
    monkeypatch.setattr(client_module, "MAX_BACKOFF_S", 0.001)


def read(addresses: list[str], kind: str, **fields: object) -> list[StreamEvent]:
    async def gather() -> list[StreamEvent]:
        async with AsyncClient(addresses) as client:
            events: AsyncIterator[StreamEvent] = client.generate("hello", max_tokens=NUM_TOKENS, **fields)
            return [event async for event in events]

    if kind == "async":
        return asyncio.run(gather())
    with Client(addresses) as client:
        return list(client.generate("hello", max_tokens=NUM_TOKENS, **fields))


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("breaks", [[0], [5], [0, 0, 7, 0, 3], [NUM_TOKENS - 1], [1] * (NUM_TOKENS - 1), [NUM_TOKENS]])
def test_every_token_comes_once_and_in_order(kind: str, breaks: list[int]) -> None:
    first, second = Router(breaks[::2]), Router(breaks[1::2])
    with serving(first, second) as addresses:
        events = read(addresses, kind)
    chunks = [event for event in events if isinstance(event, pb.TokenChunk)]
    assert [chunk.index for chunk in chunks] == list(range(NUM_TOKENS))
    assert [token_id for chunk in chunks for token_id in chunk.token_ids] == [1000 + at for at in range(NUM_TOKENS)]
    assert [type(event) for event in events if not isinstance(event, pb.TokenChunk)] == [pb.Started, pb.Finished]
    asked = [request for router in (first, second) for request in router.requests]
    assert all(request.sampling.seed == 1000 for request in asked if request.resume_from.ids)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_stream_that_gets_nowhere_ends_with_the_status(kind: str) -> None:
    router = Router([2] + [0] * 100)
    with serving(router) as addresses, pytest.raises(ServerUnavailable, match="broken by the test"):
        read(addresses, kind)
    assert len(router.requests) == 1 + client_module.MAX_RESUMES


class SeveralChoices(InferenceServicer):
    """Token i of choice c is 100 c + i, c + 3 tokens each, in turn. Breaks off each call as `breaks` says."""

    def __init__(self, breaks: list[int]) -> None:
        self.breaks = breaks
        self.requests: list[pb.GenerateRequest] = []

    def Generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
        self.requests.append(request)
        room = self.breaks.pop(0) if self.breaks else 1000
        for message in self.messages(request):
            if room == 0:
                context.abort(grpc.StatusCode.UNAVAILABLE, "broken by the test")
            room -= 1
            yield message

    def messages(self, request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
        yield pb.GenerateResponse(started=pb.Started(seed=1000))
        begun = [len(choice.ids) for choice in request.resume_choices] or [0] * request.sampling.n
        for index in range(request.sampling.n + 3):
            for choice, first in enumerate(begun):
                if first <= index < choice + 3:
                    chunk = pb.TokenChunk(index=index, token_ids=[100 * choice + index], choice=choice)
                    yield pb.GenerateResponse(tokens=chunk)
                if index == max(first, choice + 3) - (first < choice + 3):
                    yield pb.GenerateResponse(finished=pb.Finished(finish_reason="length", choice=choice))


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("breaks", [[0], [1], [3], [6, 2, 4], [10] * 3, [1, 2, 3, 4, 5, 6], [15], [16]])
def test_every_token_of_every_choice_comes_once_and_in_order(kind: str, breaks: list[int]) -> None:
    router = SeveralChoices(breaks)
    with serving(router) as addresses:
        events = read(addresses, kind, n=3)
    outputs: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for event in events:
        if isinstance(event, pb.TokenChunk):
            assert event.index == len(outputs[event.choice])
            outputs[event.choice] += event.token_ids
    assert outputs == {choice: [100 * choice + at for at in range(choice + 3)] for choice in range(3)}
    assert sorted(event.choice for event in events if isinstance(event, pb.Finished)) == [0, 1, 2]
    assert sum(isinstance(event, pb.Started) for event in events) == 1
    assert all(request.sampling.seed == 1000 for request in router.requests if request.resume_choices)


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("n", [-1, 0, 1, 3])
def test_a_refusal_is_told_whatever_n_is(kind: str, n: int) -> None:
    class Refusing(InferenceServicer):
        def Generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no")

    with serving(Refusing()) as addresses, pytest.raises(RequestRefused, match="no"):
        read(addresses, kind, n=n)


def test_a_caller_continues_with_the_tokens_that_it_has() -> None:
    router = Router([])
    with serving(router) as addresses:
        events = read(addresses, "sync", resume_from=[7, 8, 9], seed=5)
    assert list(router.requests[0].resume_from.ids) == [7, 8, 9]
    assert [event.index for event in events if isinstance(event, pb.TokenChunk)] == list(range(3, NUM_TOKENS))
