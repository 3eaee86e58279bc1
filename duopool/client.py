"""A client for Duopool's gRPC API, sync and async.

Owns what a caller should not have to write: requests from plain values, errors as readable exceptions, and going on
with a stream that broke. Such a stream is continued at the next address with the seed and the tokens received so far,
so the caller sees every token once and in order.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, Self

import grpc

from duopool.proto import inference_pb2 as pb
from duopool.proto.client_access import ClientAccess
from duopool.proto.inference_pb2_grpc import InferenceStub
from duopool.proto.status import StatusDetails, read_status

StreamEvent = pb.Started | pb.TokenChunk | pb.Finished
MAX_RESUMES = 8
"""Attempts in a row that bring no token before a stream is given up: about 9 s, enough for a router to be back."""
FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 2.0


class CallFailed(Exception):
    """A call that the server answered with an error, or did not answer; `status` has the parts."""

    def __init__(self, status: StatusDetails) -> None:
        super().__init__(f"{status.code.name.lower().replace('_', ' ')}: {status.message}")
        self.status = status


class RequestRefused(CallFailed):
    """The request itself is wrong; `status.field` names the field."""


class ServerBusy(CallFailed):
    """Too much is under way, or was left unread; `status.retry_after_s` says when to try again."""


class ServerUnavailable(CallFailed):
    """Nobody could serve the call, also not at the other addresses."""


class NotAuthenticated(CallFailed):
    """The API key is missing or unknown."""


class DeadlineExceeded(CallFailed):
    """The timeout passed first."""


_FAILURES = {
    grpc.StatusCode.INVALID_ARGUMENT: RequestRefused,
    grpc.StatusCode.NOT_FOUND: RequestRefused,
    grpc.StatusCode.UNAUTHENTICATED: NotAuthenticated,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ServerBusy,
    grpc.StatusCode.UNAVAILABLE: ServerUnavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
}


def generate_request(
    prompt: str | None = None,
    *,
    messages: Sequence[Mapping[str, str]] | None = None,
    token_ids: Sequence[int] | None = None,
    model: str = "",
    request_id: str = "",
    cache_salt: bytes = b"",
    resume_from: Sequence[int] | None = None,
    resume_choices: Sequence[Sequence[int]] | None = None,
    priority: int = 0,
    json_schema: Mapping[str, Any] | str | None = None,
    json_object: bool = False,
    regex: str | None = None,
    grammar: str | None = None,
    **sampling: Any,
) -> pb.GenerateRequest:
    """A request from plain values: exactly one of `prompt`, `messages` (role and content) and `token_ids`.

    `resume_from` are tokens that an earlier stream of the same request (and seed) gave: this one goes on behind them;
    with `n` above 1 `resume_choices` are those of every choice. Lower values of `priority` go first. At most one of
    `json_schema` (a schema, or its text), `json_object`, `regex` and `grammar` (Lark) says what outputs must look like.
    `sampling` takes the fields of `SamplingParams` in the .proto file; None leaves a field out. Raises ValueError.
    """
    if sum(given is not None for given in (prompt, messages, token_ids)) != 1:
        raise ValueError("give exactly one of prompt, messages and token_ids")
    params = pb.SamplingParams(**{name: value for name, value in sampling.items() if value is not None})
    request = pb.GenerateRequest(
        model=model, request_id=request_id, cache_salt=cache_salt, sampling=params, priority=priority
    )
    guide = _guide(json_schema, json_object, regex, grammar)
    if guide is not None:
        request.guide.CopyFrom(guide)
    if resume_from:
        request.resume_from.CopyFrom(pb.TokenIds(ids=resume_from))
    if resume_choices:
        request.resume_choices.extend(pb.TokenIds(ids=token_ids) for token_ids in resume_choices)
    if messages is not None:
        request.chat.CopyFrom(_chat(messages))
    elif token_ids is not None:
        request.token_ids.CopyFrom(pb.TokenIds(ids=token_ids))
    elif prompt is not None:
        request.text = prompt
    return request


class Client:
    """Blocking calls. `addresses` is one HOST:PORT or several, tried in turn when one is unavailable.

    `access` holds API key and TLS files; without it the environment is asked (DUOPOOL_API_KEY, DUOPOOL_TLS_CA).
    """

    def __init__(self, addresses: str | Sequence[str], *, access: ClientAccess | None = None) -> None:
        self._access = access or ClientAccess.from_environment()
        self._channels = [self._access.channel(address) for address in _listed(addresses)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for channel in self._channels:
            channel.close()

    def generate(
        self, prompt: str | None = None, *, timeout_s: float | None = None, **fields: Any
    ) -> Iterator[StreamEvent]:
        """Started, then token chunks as they come, then Finished; `fields` as in `generate_request`."""
        stream = _Stream(generate_request(prompt, **fields), timeout_s)
        while True:
            stub = self._access.stub(InferenceStub, self._channels[stream.num_attempts % len(self._channels)])
            call = stub.Generate(stream.next_request(), timeout=stream.time_left_s())
            try:
                for response in call:
                    yield from stream.take(response)
                return
            except grpc.RpcError as error:
                if stream.is_finished:
                    return
                time.sleep(stream.backoff_s(error))
            finally:
                call.cancel()

    def tokenize(self, prompt: str | None = None, *, messages: Sequence[Mapping[str, str]] | None = None) -> list[int]:
        request = _tokenize_request(prompt, messages)
        return list(self._call(InferenceStub, "Tokenize", request).token_ids)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        return str(self._call(InferenceStub, "Detokenize", pb.DetokenizeRequest(token_ids=token_ids)).text)

    def models(self) -> list[pb.Model]:
        return list(self._call(InferenceStub, "ListModels", pb.ListModelsRequest()).models)

    def _call(self, stub: Any, method: str, request: Any) -> Any:
        for channel in self._channels:
            try:
                return getattr(self._access.stub(stub, channel), method)(request)
            except grpc.RpcError as error:
                failure = failure_of(error)
                if not isinstance(failure, ServerUnavailable) or channel is self._channels[-1]:
                    raise failure from error
        raise AssertionError("a client has at least one address")


class AsyncClient:
    """The same calls for asyncio."""

    def __init__(self, addresses: str | Sequence[str], *, access: ClientAccess | None = None) -> None:
        self._access = access or ClientAccess.from_environment()
        self._channels = [self._access.aio_channel(address) for address in _listed(addresses)]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()

    async def generate(
        self, prompt: str | None = None, *, timeout_s: float | None = None, **fields: Any
    ) -> AsyncIterator[StreamEvent]:
        """Started, then token chunks as they come, then Finished; `fields` as in `generate_request`."""
        stream = _Stream(generate_request(prompt, **fields), timeout_s)
        while True:
            stub = self._access.stub(InferenceStub, self._channels[stream.num_attempts % len(self._channels)])
            call = stub.Generate(stream.next_request(), timeout=stream.time_left_s())
            try:
                async for response in call:
                    for event in stream.take(response):
                        yield event
                return
            except grpc.RpcError as error:
                if stream.is_finished:
                    return
                await asyncio.sleep(stream.backoff_s(error))
            finally:
                call.cancel()

    async def tokenize(
        self, prompt: str | None = None, *, messages: Sequence[Mapping[str, str]] | None = None
    ) -> list[int]:
        request = _tokenize_request(prompt, messages)
        return list((await self._call(InferenceStub, "Tokenize", request)).token_ids)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        response = await self._call(InferenceStub, "Detokenize", pb.DetokenizeRequest(token_ids=token_ids))
        return str(response.text)

    async def models(self) -> list[pb.Model]:
        return list((await self._call(InferenceStub, "ListModels", pb.ListModelsRequest())).models)

    async def _call(self, stub: Any, method: str, request: Any) -> Any:
        for channel in self._channels:
            try:
                return await getattr(self._access.stub(stub, channel), method)(request)
            except grpc.RpcError as error:
                failure = failure_of(error)
                if not isinstance(failure, ServerUnavailable) or channel is self._channels[-1]:
                    raise failure from error
        raise AssertionError("a client has at least one address")


class _Stream:
    """What must be known of a stream to go on with it elsewhere."""

    def __init__(self, request: pb.GenerateRequest, timeout_s: float | None) -> None:
        self.num_attempts = 0
        self._num_idle_attempts = 0
        """Attempts since the last token."""
        self._request = request
        num_choices = max(1, request.sampling.n)
        given = request.resume_choices or [request.resume_from]
        self._outputs = {
            choice: list(given[choice].ids) if choice < len(given) else [] for choice in range(num_choices)
        }
        """Token ids so far, by choice."""
        self._finished: set[int] = set()
        self._started = False
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s

    @property
    def is_finished(self) -> bool:
        """The caller has had the last event of every choice: whatever breaks now does not matter."""
        return len(self._finished) == len(self._outputs)

    def next_request(self) -> pb.GenerateRequest:
        self.num_attempts += 1
        self._num_idle_attempts += 1
        outputs = [pb.TokenIds(ids=token_ids) for token_ids in self._outputs.values()]
        if any(output.ids for output in outputs):
            if len(outputs) == 1:
                self._request.resume_from.CopyFrom(outputs[0])
            else:
                del self._request.resume_choices[:]
                self._request.resume_choices.extend(outputs)
        return self._request

    def time_left_s(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def take(self, response: pb.GenerateResponse) -> Iterator[StreamEvent]:
        """The response's event, unless the caller has seen it."""
        match response.WhichOneof("event"):
            case "started":
                self._request.sampling.seed = response.started.seed
                if not self._started:
                    self._started = True
                    yield response.started
            case "tokens":
                self._num_idle_attempts = 1
                self._outputs[response.tokens.choice] += response.tokens.token_ids
                yield response.tokens
            case "finished":
                if response.finished.choice not in self._finished:
                    self._finished.add(response.finished.choice)
                    yield response.finished

    def backoff_s(self, error: grpc.RpcError) -> float:
        """How long to wait before the next attempt; raises what the caller must see if there is none."""
        failure = failure_of(error)
        if not isinstance(failure, ServerUnavailable) or self._num_idle_attempts > MAX_RESUMES:
            raise failure from error
        return min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** (self._num_idle_attempts - 1))


def failure_of(error: grpc.RpcError) -> CallFailed:
    """The readable form of what gRPC raised."""
    status = read_status(error)
    return _FAILURES.get(status.code, CallFailed)(status)


def _guide(
    json_schema: Mapping[str, Any] | str | None, json_object: bool, regex: str | None, grammar: str | None
) -> pb.Guide | None:
    if isinstance(json_schema, Mapping):
        json_schema = json.dumps(json_schema)
    given = {"json_schema": json_schema, "json_object": json_object or None, "regex": regex, "grammar": grammar}
    wanted = {kind: value for kind, value in given.items() if value is not None}
    if len(wanted) > 1:
        raise ValueError(f"give at most one of {', '.join(given)}")
    return pb.Guide(**wanted) if wanted else None  # type: ignore[arg-type]


def _chat(messages: Sequence[Mapping[str, str]]) -> pb.ChatMessages:
    return pb.ChatMessages(
        messages=[pb.ChatMessage(role=message["role"], content=message["content"]) for message in messages]
    )


def _tokenize_request(prompt: str | None, messages: Sequence[Mapping[str, str]] | None) -> pb.TokenizeRequest:
    if (prompt is None) == (messages is None):
        raise ValueError("give exactly one of prompt and messages")
    return pb.TokenizeRequest(text=prompt) if messages is None else pb.TokenizeRequest(chat=_chat(messages))


def _listed(addresses: str | Sequence[str]) -> list[str]:
    listed = [addresses] if isinstance(addresses, str) else list(addresses)
    if not listed:
        raise ValueError("a client needs at least one address")
    return listed
