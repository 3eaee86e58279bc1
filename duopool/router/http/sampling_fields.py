"""The fields that completions and chat share, and how sampling parameters come out of them.

Names and meanings are OpenAI's and, for what OpenAI does not have, vLLM's. Types are strict: a number in quotes is an
error. Ranges are checked by `SamplingParams.check` and admission; fields that nobody knows are let pass.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from duopool.core.errors import InvalidRequest
from duopool.core.sampling_params import SamplingParams
from duopool.router.guide import Guide
from duopool.router.http.guides import ResponseFormat, StructuredOutputs, read_guide


class StreamOptions(BaseModel):
    """What a stream says besides its text."""

    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = Field(default=None, description="Send a last chunk with the usage of the whole call.")
    continuous_usage_stats: bool | None = Field(default=None, description="Send the usage so far with every chunk.")


class SamplingFields(BaseModel):
    """How tokens are chosen, and when an output ends."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model: str | None = Field(default=None, description="The model that is served, or nothing.")
    max_tokens: int | None = None
    min_tokens: int | None = Field(default=None, description="No end of the output before this many tokens.")
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = Field(default=None, description="Token id to bias, -100 to 100.")
    n: int | None = Field(default=None, description="Outputs per prompt.")
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    user: str | None = Field(default=None, description="Taken and not used.")
    priority: int | None = Field(default=None, description="Lower values go first wherever requests wait; 0 if absent.")
    cache_salt: str | None = Field(default=None, description="Only requests with the same salt share cached prefixes.")

    def sampling(self, *, seed: int, logprobs: int | None, **more: Any) -> SamplingParams:
        """Sampling parameters with vLLM's defaults for what is absent; `seed` is taken when none is named."""
        names = (
            *("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
            *("presence_penalty", "frequency_penalty", "ignore_eos", "include_stop_str_in_output"),
        )
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            **{
                **given,
                "seed": seed if self.seed is None else self.seed,
                "logit_bias": _bias(self.logit_bias or {}),
                "stop": tuple(stop),
                "stop_token_ids": tuple(self.stop_token_ids or ()),
                "logprobs": logprobs,
                **more,
            }
        )

    @property
    def guide(self) -> Guide | None:
        """What the outputs must look like."""
        return read_guide(self.response_format, self.structured_outputs)

    @property
    def num_choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def salt(self) -> bytes:
        return (self.cache_salt or "").encode()


def _bias(given: dict[str, float]) -> tuple[tuple[int, float], ...]:
    for name in given:
        if not (name.isascii() and name.isdigit() and len(name) < 20):
            raise InvalidRequest("logit_bias", f"keys must be token ids, got {name[:64]!r}")
    return tuple(sorted((int(name), value) for name, value in given.items()))
