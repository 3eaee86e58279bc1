"""How a chat completion is answered: whole, and as the deltas that add up to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NotRequired

from typing_extensions import TypedDict

from duopool.proto import inference_pb2 as pb
from duopool.router.generation import Stream
from duopool.router.http.call import Call
from duopool.router.http.tools import ToolCallParser, ToolCallPart
from duopool.router.http.usage import Usage, UsageCount


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


class ChatReply:
    """The answer is the sum of the deltas."""

    def __init__(self, call: Call, *, has_logprobs: bool, has_tools: bool) -> None:
        self._call = call
        self._has_logprobs = has_logprobs
        self._has_tools = has_tools
        self._choices: dict[int, ChatChoice] = {}
        self._parsers: dict[int, ToolCallParser] = {}

    def begin(self, stream: Stream) -> None:
        self._usage = UsageCount(stream, num_choices=self._call.num_choices)
        if self._has_tools:
            names = {index: f"call-{self._call.id}-{index}" for index in range(self._call.num_choices)}
            self._parsers = {index: ToolCallParser(name) for index, name in names.items()}

    def chunks(self, message: pb.GenerateResponse) -> Iterator[Mapping[str, Any]]:
        self._usage.take(message)
        for choice in self._deltas(message):
            self._add(choice)
            yield self._chunk([choice], self._usage.so_far() if self._call.repeats_usage else None)

    def last_chunks(self) -> Iterator[Mapping[str, Any]]:
        if self._call.includes_usage:
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
                for index in range(self._call.num_choices):
                    yield _choice(index, {"role": "assistant", "content": ""}, None)
            case "tokens":
                chunk = message.tokens
                logprobs = [_logprob(entry) for entry in chunk.logprobs]
                wanted: ChatLogprobs | None = {"content": logprobs} if self._has_logprobs else None
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
                "logprobs": {"content": []} if self._has_logprobs else None,
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
        if self._call.includes_usage or self._call.repeats_usage:
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
        {"token": each.text, "logprob": each.logprob, "bytes": list(each.token_bytes)} for each in entry.top
    ]
    return {
        "token": entry.text,
        "logprob": entry.logprob,
        "bytes": list(entry.token_bytes),
        "top_logprobs": top,
    }
