"""POST /v1/chat/completions: what is asked, and how it is answered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NotRequired

from fastapi import APIRouter, Request, Response
from pydantic import Field
from typing_extensions import TypedDict

from duopool.core.errors import InvalidRequest
from duopool.proto import inference_pb2 as pb
from duopool.router.ask import Ask, ChatPrompt
from duopool.router.generation import Generation, Stream
from duopool.router.guide import Guide
from duopool.router.http.answer import answer
from duopool.router.http.body import StrictRoute
from duopool.router.http.call import Call, responses
from duopool.router.http.messages import ChatMessage, read_messages
from duopool.router.http.sampling_fields import SamplingFields
from duopool.router.http.tools import NamedTool, Tool, ToolCallParser, ToolCallPart, tool_guide, with_description
from duopool.router.http.usage import Usage, UsageCount
from duopool.router.tokenizer import Tokenizer
from duopool.router.traces import TRACEPARENT


class ChatRequest(SamplingFields):
    """Answer a conversation."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = Field(default=None, description="As max_tokens; as many as fit when neither.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, description="Alternatives per token; needs logprobs.")
    tools: list[Tool] | None = None
    tool_choice: str | NamedTool | None = Field(default=None, description="none, auto, required or one function.")
    parallel_tool_calls: bool | None = None

    @property
    def num_logprobs(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs", "needs logprobs to be true")
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def offered_tools(self) -> list[Tool]:
        return [] if self.tool_choice == "none" else self.tools or []

    def prompt(self, tokenizer: Tokenizer) -> ChatPrompt:
        """The conversation, with the tools where the model's template has a place for them."""
        messages: Sequence[Mapping[str, Any]] = read_messages(self.messages)
        tools = self.offered_tools
        if tools and not tokenizer.template_knows_tools:
            return ChatPrompt(messages=tuple(with_description(messages, tools)), field="messages")
        told = tuple(tool.model_dump(exclude_none=True) for tool in tools)
        return ChatPrompt(messages=tuple(messages), field="messages", tools=told)

    def output_guide(self) -> Guide | None:
        """What the output must look like: a call, or what the request says."""
        guide = self.guide
        call = tool_guide(self.tools or [], self.tool_choice, is_parallel=self.parallel_tool_calls is not False)
        if guide is not None and call is not None:
            raise InvalidRequest("tool_choice", f"cannot be combined with {guide.field}")
        return guide or call


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    content: list[TokenLogprob]


class Message(TypedDict):
    role: str
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[ToolCallPart]]


class ChatChoice(TypedDict):
    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | None


class ChatCompletion(TypedDict):
    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(TypedDict):
    role: NotRequired[str]
    content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallPart]]


class ChunkChoice(TypedDict):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: NotRequired[str | None]


def routes(generation: Generation) -> APIRouter:
    router = APIRouter(route_class=StrictRoute)

    @router.post("/v1/chat/completions", responses=responses(ChatCompletion), tags=["OpenAI"])
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation by the model's chat template; `stream` makes it server-sent events."""
        call = Call.of(request, body, generation, prefix="chatcmpl")
        max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        more = {} if max_tokens is None else {"max_tokens": max_tokens}
        ask = Ask(
            tenant=request.state.tenant,
            model=body.model or "",
            prompts=(body.prompt(generation.tokenizer),),
            params=body.sampling(seed=generation.draw_seed(), logprobs=body.num_logprobs, **more),
            guide=body.output_guide(),
            takes_all_room=max_tokens is None,
            num_choices=body.num_choices,
            request_id=call.id,
            cache_salt=body.salt,
            traceparent=request.headers.get(TRACEPARENT, ""),
        )
        return await answer(request, generation, ask, ChatReply(body, call), is_stream=bool(body.stream))

    return router


class ChatReply:
    """The answer is the sum of the deltas."""

    def __init__(self, body: ChatRequest, call: Call) -> None:
        self._body = body
        self._call = call
        self._choices: dict[int, ChatChoice] = {}
        self._parsers: dict[int, ToolCallParser] = {}

    def begin(self, stream: Stream) -> None:
        self._usage = UsageCount(stream, num_choices=self._body.num_choices)
        if self._body.offered_tools:
            names = {index: f"call-{self._call.id}-{index}" for index in range(self._body.num_choices)}
            self._parsers = {index: ToolCallParser(name) for index, name in names.items()}

    def chunks(self, message: pb.GenerateResponse) -> Iterator[Mapping[str, Any]]:
        self._usage.take(message)
        for choice in self._deltas(message):
            self._add(choice)
            yield self._chunk([choice], self._usage.so_far() if self._body.repeats_usage else None)

    def last_chunks(self) -> Iterator[Mapping[str, Any]]:
        if self._body.includes_usage:
            yield self._chunk([], self._usage.so_far())

    def whole(self) -> Mapping[str, Any]:
        choices = [self._choices[index] for index in sorted(self._choices)]
        for choice in choices:
            if choice["message"].get("tool_calls"):
                choice["message"]["content"] = choice["message"]["content"] or None
        return {**self._call.header("chat.completion"), "choices": choices, "usage": self._usage.so_far()}

    def _deltas(self, message: pb.GenerateResponse) -> Iterator[ChunkChoice]:
        match message.WhichOneof("event"):
            case "started":
                for index in range(self._body.num_choices):
                    yield _choice(index, {"role": "assistant", "content": ""}, None)
            case "tokens":
                chunk = message.tokens
                logprobs = [_logprob(entry) for entry in chunk.logprobs]
                wanted: ChatLogprobs | None = {"content": logprobs} if self._body.logprobs else None
                delta = self._delta(chunk.choice, chunk.text)
                if delta or logprobs:
                    yield _choice(chunk.choice, delta, wanted)
            case "finished":
                finished = message.finished
                parser = self._parsers.get(finished.choice)
                rest = _joined(*parser.finish()) if parser else {}
                choice = _choice(finished.choice, rest, None)
                has_called = parser is not None and parser.num_calls > 0 and finished.finish_reason == "stop"
                choice["finish_reason"] = "tool_calls" if has_called else finished.finish_reason
                choice["stop_reason"] = finished.stop_reason if finished.HasField("stop_reason") else None
                yield choice
            case _:
                pass

    def _delta(self, index: int, text: str) -> Delta:
        parser = self._parsers.get(index)
        return _joined(*parser.push(text)) if parser else _joined(text, [])

    def _add(self, choice: ChunkChoice) -> None:
        index = choice["index"]
        whole = self._choices.setdefault(
            index,
            {
                "index": index,
                "message": {"role": "assistant", "content": "", "refusal": None},
                "logprobs": {"content": []} if self._body.logprobs else None,
                "finish_reason": None,
                "stop_reason": None,
            },
        )
        message, delta = whole["message"], choice["delta"]
        message["content"] = (message["content"] or "") + delta.get("content", "")
        if "tool_calls" in delta:
            message["tool_calls"] = [*message.get("tool_calls", []), *delta["tool_calls"]]
        whole["finish_reason"] = choice["finish_reason"]
        whole["stop_reason"] = choice.get("stop_reason")
        if choice["logprobs"] is not None and whole["logprobs"] is not None:
            whole["logprobs"]["content"] += choice["logprobs"]["content"]

    def _chunk(self, choices: list[ChunkChoice], usage: Usage | None) -> Mapping[str, Any]:
        chunk = {**self._call.header("chat.completion.chunk"), "choices": choices}
        if self._body.includes_usage or self._body.repeats_usage:
            chunk["usage"] = usage
        return chunk


def _joined(content: str, calls: list[ToolCallPart]) -> Delta:
    delta: Delta = {}
    if content:
        delta["content"] = content
    if calls:
        delta["tool_calls"] = calls
    return delta


def _choice(index: int, delta: Delta, logprobs: ChatLogprobs | None) -> ChunkChoice:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


def _logprob(entry: pb.Logprob) -> TokenLogprob:
    top: list[TopLogprob] = [
        {"token": each.text, "logprob": each.logprob, "bytes": list(each.text.encode())} for each in entry.top
    ]
    return {
        "token": entry.text,
        "logprob": entry.logprob,
        "bytes": list(entry.text.encode()),
        "top_logprobs": top,
    }
