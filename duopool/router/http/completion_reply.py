"""How a completion is answered: whole, and as the chunks that add up to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from typing_extensions import TypedDict

from duopool.proto import inference_pb2 as pb
from duopool.router.ask import Prompt, TextPrompt
from duopool.router.generation import Stream
from duopool.router.http.call import Call
from duopool.router.http.usage import Usage, UsageCount
from duopool.router.tokenizer import Tokenizer


class CompletionLogprobs(TypedDict):
    """One entry per token in each list."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: str | None


class Completion(TypedDict):
    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None


class CompletionReply:
    """The answer is the sum of the chunks."""

    def __init__(
        self,
        call: Call,
        prompts: Sequence[Prompt],
        tokenizer: Tokenizer,
        *,
        has_logprobs: bool,
        echo: bool,
        is_silent: bool,
    ) -> None:
        self._prompts = prompts
        self._call = call
        self._tokenizer = tokenizer
        self._has_logprobs = has_logprobs
        self._echo = echo
        self._is_silent = is_silent
        """The prompt alone is wanted: the one token that was made is not shown."""
        self._choices: dict[int, CompletionChoice] = {}
        self._offsets: dict[int, int] = {}
        self._echoed: set[int] = set()

    def begin(self, stream: Stream) -> None:
        self._stream = stream
        self._usage = UsageCount(stream, num_choices=self._call.num_choices)

    def chunks(self, message: pb.GenerateResponse) -> Iterator[Mapping[str, Any]]:
        self._usage.take(message)
        choice = self._choice_of(message)
        if choice is not None:
            self._add(choice)
            yield self._chunk([choice], self._usage.so_far() if self._call.repeats_usage else None)

    def last_chunks(self) -> Iterator[Mapping[str, Any]]:
        if self._call.includes_usage:
            yield self._chunk([], self._shown_usage())

    def whole(self) -> Mapping[str, Any]:
        return self._chunk([self._choices[index] for index in sorted(self._choices)], self._shown_usage())

    def _choice_of(self, message: pb.GenerateResponse) -> CompletionChoice | None:
        match message.WhichOneof("event"):
            case "tokens":
                return self._tokens(message.tokens)
            case "finished":
                finished = message.finished
                return {
                    "index": finished.choice,
                    "text": "",
                    "logprobs": None,
                    "finish_reason": "length" if self._is_silent else finished.finish_reason,
                    "stop_reason": finished.stop_reason if finished.HasField("stop_reason") else None,
                }
            case _:
                return None

    def _tokens(self, chunk: pb.TokenChunk) -> CompletionChoice:
        text = "" if self._is_silent else chunk.text
        entries: list[pb.Logprob] = [] if self._is_silent else list(chunk.logprobs)
        if self._echo and chunk.choice not in self._echoed:
            self._echoed.add(chunk.choice)
            place = chunk.choice // self._call.num_choices
            prompt, token_ids = self._prompts[place], self._stream.prompts[place]
            text = (prompt.text if isinstance(prompt, TextPrompt) else self._tokenizer.decode(token_ids)) + text
            if self._has_logprobs:
                # Nothing predicts the first token of a prompt.
                first = pb.Logprob(token_id=token_ids[0], text=self._tokenizer.text_of(token_ids[0]))
                entries = [first, *chunk.prompt_logprobs, *entries]
                return self._text(chunk.choice, text, self._logprobs(chunk.choice, entries, num_unknown=1))
        wanted = self._has_logprobs
        return self._text(chunk.choice, text, self._logprobs(chunk.choice, entries) if wanted else None)

    def _text(self, index: int, text: str, logprobs: CompletionLogprobs | None) -> CompletionChoice:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None, "stop_reason": None}

    def _logprobs(self, index: int, entries: Sequence[pb.Logprob], num_unknown: int = 0) -> CompletionLogprobs:
        tokens = [entry.text for entry in entries]
        offsets = [self._offsets.setdefault(index, 0)]
        for token in tokens:
            offsets.append(offsets[-1] + len(token))
        self._offsets[index] = offsets.pop()
        known = entries[num_unknown:]
        unknown: list[None] = [None] * num_unknown
        return {
            "tokens": tokens,
            "token_logprobs": [*unknown, *(entry.logprob for entry in known)],
            "top_logprobs": [*unknown, *(_top(entry) for entry in known)],
            "text_offset": offsets,
        }

    def _add(self, choice: CompletionChoice) -> None:
        whole = self._choices.setdefault(choice["index"], self._text(choice["index"], "", None))
        whole["text"] += choice["text"]
        whole["finish_reason"] = choice["finish_reason"]
        whole["stop_reason"] = choice["stop_reason"]
        logprobs = choice["logprobs"]
        if logprobs is None:
            return
        sums = whole["logprobs"] or {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        whole["logprobs"] = sums
        sums["tokens"] += logprobs["tokens"]
        sums["token_logprobs"] += logprobs["token_logprobs"]
        sums["top_logprobs"] += logprobs["top_logprobs"]
        sums["text_offset"] += logprobs["text_offset"]

    def _shown_usage(self) -> Usage:
        usage = self._usage.so_far()
        if self._is_silent:
            usage["total_tokens"] -= usage["completion_tokens"]
            usage["completion_tokens"] = 0
        return usage

    def _chunk(self, choices: list[CompletionChoice], usage: Usage | None) -> Mapping[str, Any]:
        return {**self._call.header("text_completion"), "choices": choices, "usage": usage}


def _top(entry: pb.Logprob) -> dict[str, float]:
    """The alternatives, and the token itself if it is not among them."""
    top = {each.text: each.logprob for each in reversed(entry.top)}
    top.setdefault(entry.text, entry.logprob)
    return top
