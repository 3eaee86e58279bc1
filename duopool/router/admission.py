"""Which requests may begin: how many live at once, and whether one can ever fit.

Owns the count and the limits; the limits come from the workers that are members. Raises the error that the client gets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from duopool.core.errors import InvalidRequest, Overloaded, PromptTooLong
from duopool.core.messages import WorkerInfo
from duopool.core.sampling_params import MAX_CHOICES, SamplingParams

MAX_PROMPTS = 128
MAX_CACHE_SALT_BYTES = 256
MAX_REQUEST_ID_CHARS = 256
MAX_PRIORITY = 2**31 - 1
RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the model and the smallest pool can hold."""

    max_model_len: int
    vocab_size: int
    pool_tokens: int
    """Longest sequence that the smallest pool can bring forth; its last token needs no KV."""

    @property
    def longest(self) -> int:
        """Prompt and output together."""
        return min(self.max_model_len, self.pool_tokens)

    @classmethod
    def of(cls, members: Sequence[WorkerInfo]) -> Limits:
        return cls(
            max_model_len=min(info.max_model_len for info in members),
            vocab_size=min(info.vocab_size for info in members),
            pool_tokens=min(info.num_blocks * info.block_size for info in members) + 1,
        )


class Admission:
    """Counts the choices that are alive."""

    def __init__(self, max_num_requests: int) -> None:
        self._max_num_requests = max_num_requests
        self.num_alive = 0

    @contextmanager
    def admit(self, num_choices: int) -> Iterator[None]:
        """Take room for a request's choices while the block runs; Overloaded at once if there is none."""
        if self.num_alive + num_choices > self._max_num_requests:
            limit = self._max_num_requests
            raise Overloaded(f"{self.num_alive} requests are alive, the limit is {limit}", retry_after_s=RETRY_AFTER_S)
        self.num_alive += num_choices
        try:
            yield
        finally:
            self.num_alive -= num_choices


def check_prompts(num_prompts: int) -> None:
    if not 1 <= num_prompts <= MAX_PROMPTS:
        raise InvalidRequest("prompt", f"between 1 and {MAX_PROMPTS} prompts are allowed, got {num_prompts}")


def check_choices(num_choices: int) -> None:
    if not 1 <= num_choices <= MAX_CHOICES:
        raise InvalidRequest("n", f"must be between 1 and {MAX_CHOICES}, got {num_choices}")


def check_priority(priority: int) -> None:
    if not -MAX_PRIORITY - 1 <= priority <= MAX_PRIORITY:
        raise InvalidRequest("priority", f"must be between {-MAX_PRIORITY - 1} and {MAX_PRIORITY}, got {priority}")


def check_names(*, cache_salt: bytes, request_id: str) -> None:
    if len(cache_salt) > MAX_CACHE_SALT_BYTES:
        raise InvalidRequest("cache_salt", f"at most {MAX_CACHE_SALT_BYTES} bytes are allowed, got {len(cache_salt)}")
    if len(request_id) > MAX_REQUEST_ID_CHARS:
        raise InvalidRequest(
            "request_id", f"at most {MAX_REQUEST_ID_CHARS} characters are allowed, got {len(request_id)}"
        )


def check_text(field: str, num_chars: int, limits: Limits, *, max_token_chars: int) -> None:
    """Refuse a text that has too many tokens whatever they are, before the work of making them."""
    least = -(-num_chars // max_token_chars)
    if least > limits.max_model_len:
        raise PromptTooLong(
            field, f"{num_chars} characters are at least {least} tokens, the model takes {limits.max_model_len}"
        )


def check_token_ids(field: str, token_ids: Sequence[int], limits: Limits) -> None:
    smallest, largest = min(token_ids, default=0), max(token_ids, default=0)
    if largest >= limits.vocab_size:
        place = token_ids.index(largest)
        raise InvalidRequest(f"{field}[{place}]", f"must be below {limits.vocab_size}, got {largest}")
    if smallest < 0:
        raise InvalidRequest(f"{field}[{token_ids.index(smallest)}]", f"must not be negative, got {smallest}")


def check_count(field: str, count: int, limits: Limits) -> None:
    """Refuse more parts, each of which is at least a token, than the model takes, before the work on them."""
    if count > limits.max_model_len:
        raise PromptTooLong(field, f"has {count} entries, the model takes {limits.max_model_len} tokens")


def check_length(field: str, num_prompt_tokens: int, params: SamplingParams, limits: Limits) -> None:
    """Prompt and output together must fit the model and a pool."""
    if num_prompt_tokens == 0:
        raise InvalidRequest(field, "must not be empty: at least 1 token is needed")
    if num_prompt_tokens >= limits.max_model_len:
        raise PromptTooLong(
            field, f"has {num_prompt_tokens} tokens, the model takes at most {limits.max_model_len - 1} and one output"
        )
    if num_prompt_tokens >= limits.pool_tokens:
        raise PromptTooLong(field, f"has {num_prompt_tokens} tokens, the smallest pool holds {limits.pool_tokens - 1}")
    total = num_prompt_tokens + params.max_tokens
    most, what = min((limits.max_model_len, "the model takes"), (limits.pool_tokens, "the smallest pool holds"))
    if total > most:
        raise PromptTooLong(
            "max_tokens",
            f"{num_prompt_tokens} prompt tokens and {params.max_tokens} output tokens are {total}, {what} {most}",
        )


def check_bias(params: SamplingParams, limits: Limits) -> None:
    """Token ids inside the sampling parameters must exist."""
    check_token_ids("stop_token_ids", params.stop_token_ids, limits)
    check_token_ids("logit_bias", [token_id for token_id, _ in params.logit_bias], limits)
