"""What a client may ask of the sampler, and the limits of each field.

Field names and meanings follow vLLM's SamplingParams. `check()` is called once, at the router; inside,
fields are trusted.
"""

from __future__ import annotations

from dataclasses import dataclass

from duopool.core.errors import InvalidRequest

MAX_CHOICES = 16
"""Outputs of one prompt."""
MAX_TOKENS_LIMIT = 1_000_000
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1_024
MAX_LOGPROBS = 20
MAX_TEMPERATURE = 100.0
MAX_GRAMMAR_CHARS = 1 << 16
_LARGEST = 2**63 - 1
"""Of the integers that workers and their kernels take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen and when the stream ends."""

    max_tokens: int = 16
    min_tokens: int = 0
    """Neither end-of-sequence nor a stop token may be sampled before this many tokens."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 (or -1) keeps the whole vocabulary."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    """The router draws one when the client names none, so that a stream can be continued elsewhere."""
    stop: tuple[str, ...] = ()
    """Stop strings, looked for by the router in the detokenised text."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    """Number of alternatives per emitted token; 0 gives the emitted token's alone."""
    prompt_logprobs: int | None = None
    grammar: str = ""
    """What the output must match, in llguidance's form; empty lets anything be output."""

    def check(self) -> None:
        """Raise InvalidRequest naming the first field that is outside its limits."""
        _within("max_tokens", self.max_tokens, 1, MAX_TOKENS_LIMIT)
        _within("min_tokens", self.min_tokens, 0, self.max_tokens)
        _within("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidRequest("top_p", f"must be above 0 and at most 1, got {self.top_p}")
        _within("top_k", self.top_k, -1, _LARGEST)
        _within("min_p", self.min_p, 0.0, 1.0)
        if not 0.0 < self.repetition_penalty <= 10.0:
            raise InvalidRequest("repetition_penalty", f"must be above 0 and at most 10, got {self.repetition_penalty}")
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _at_most("logit_bias", len(self.logit_bias), MAX_LOGIT_BIAS, "entries")
        for token_id, bias in self.logit_bias:
            _within(f"logit_bias[{token_id}]", bias, -100.0, 100.0)
        _within("seed", self.seed, -_LARGEST - 1, _LARGEST)
        _at_most("stop", len(self.stop), MAX_STOP_STRINGS, "strings")
        for position, text in enumerate(self.stop):
            if not text:
                raise InvalidRequest(f"stop[{position}]", "must not be empty")
            _at_most(f"stop[{position}]", len(text), MAX_STOP_STRING_CHARS, "characters")
        _at_most("stop_token_ids", len(self.stop_token_ids), MAX_STOP_TOKEN_IDS, "ids")
        if self.logprobs is not None:
            _within("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            _within("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        _at_most("grammar", len(self.grammar), MAX_GRAMMAR_CHARS, "characters")


def _within(field: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # NaN is not
        raise InvalidRequest(field, f"must be between {low} and {high}, got {value}")


def _at_most(field: str, count: int, limit: int, unit: str) -> None:
    if count > limit:
        raise InvalidRequest(field, f"at most {limit} {unit} are allowed, got {count}")
