"""Counts what a call used, over all its prompts and choices."""

from __future__ import annotations

from typing_extensions import TypedDict

from duopool.proto import inference_pb2 as pb
from duopool.router.generation import Stream


class PromptTokensDetails(TypedDict):
    cached_tokens: int
    """Prompt tokens whose KV was there already."""


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class UsageCount:
    """A prompt counts once, however many choices it has."""

    def __init__(self, stream: Stream, *, num_choices: int) -> None:
        self._num_prompt_tokens = sum(map(len, stream.prompts))
        self._num_choices = num_choices
        self._num_output_tokens: dict[int, int] = {}
        self._num_cached_tokens: dict[int, int] = {}

    def take(self, message: pb.GenerateResponse) -> None:
        match message.WhichOneof("event"):
            case "started":
                self._num_cached_tokens[0] = message.started.cached_tokens
            case "tokens":
                chunk = message.tokens
                self._num_output_tokens[chunk.choice] = chunk.index + len(chunk.token_ids)
            case "finished":
                usage, choice = message.finished.usage, message.finished.choice
                self._num_output_tokens[choice] = usage.completion_tokens
                if choice % self._num_choices == 0:
                    self._num_cached_tokens[choice // self._num_choices] = usage.cached_tokens
            case _:
                pass

    def so_far(self) -> Usage:
        num_output_tokens = sum(self._num_output_tokens.values())
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": num_output_tokens,
            "total_tokens": self._num_prompt_tokens + num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._num_cached_tokens.values())},
        }
