"""Reads a `GenerateRequest` of the VllmEngine protocol; what cannot be served is refused by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from duopool.core.errors import InvalidRequest, PromptTooLong
from duopool.core.sampling_params import SamplingParams
from duopool.engine.served_model import ServedModel

PROMPT_FIELD = "tokenized.input_ids"
_NOT_SERVED = ("mm_inputs", "media_refs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request, checked."""

    alias: str
    """The gateway's id; never a key inside."""
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    has_seed: bool
    is_stream: bool
    transfer_json: str
    """`kv_transfer_params_json`; empty without one."""


def read_asked(request: Any, model: ServedModel, *, seed: int) -> Asked:
    """The request with vLLM's defaults; `seed` is taken if it names none. Raises InvalidRequest."""
    prompt = _prompt(request, model)
    params = _sampling(request.sampling_params, seed=seed, num_free_tokens=model.max_model_len - len(prompt))
    params.check()
    ids = (*params.stop_token_ids, *(token_id for token_id, _ in params.logit_bias))
    if not model.knows(ids):
        raise InvalidRequest("sampling_params", f"names a token outside the vocabulary of {model.vocab_size}")
    return Asked(
        alias=request.request_id,
        prompt_token_ids=prompt,
        params=params,
        has_seed=request.sampling_params.HasField("seed"),
        is_stream=request.stream,
        transfer_json=request.kv_transfer_params_json,
    )


def _prompt(request: Any, model: ServedModel) -> tuple[int, ...]:
    for name in _NOT_SERVED:
        if request.HasField(name):
            raise InvalidRequest(name, "only text is served")
    if request.WhichOneof("input") != "tokenized":
        raise InvalidRequest("text", "the gateway tokenises: send tokenized.input_ids")
    prompt = tuple(request.tokenized.input_ids)
    if not prompt:
        raise InvalidRequest(PROMPT_FIELD, "must not be empty")
    if len(prompt) >= model.max_model_len:
        raise PromptTooLong(PROMPT_FIELD, f"{len(prompt)} tokens leave no room in a context of {model.max_model_len}")
    if not model.knows(prompt):
        raise InvalidRequest(PROMPT_FIELD, f"has a token outside the vocabulary of {model.vocab_size}")
    return prompt


def _sampling(wire: Any, *, seed: int, num_free_tokens: int) -> SamplingParams:
    constraint = wire.WhichOneof("constraint")
    if constraint is not None:
        raise InvalidRequest(f"sampling_params.{constraint}", "structured output is served by Duopool's own router")
    if wire.n > 1:
        raise InvalidRequest("sampling_params.n", f"must be 1, got {wire.n}")
    if wire.HasField("truncate_prompt_tokens"):
        raise InvalidRequest("sampling_params.truncate_prompt_tokens", "prompts are not truncated here")
    return SamplingParams(
        max_tokens=wire.max_tokens if wire.HasField("max_tokens") else num_free_tokens,
        min_tokens=wire.min_tokens,
        temperature=wire.temperature if wire.HasField("temperature") else 1.0,
        # 0 stands for absent in these.
        top_p=wire.top_p or 1.0,
        top_k=wire.top_k,
        min_p=wire.min_p,
        repetition_penalty=wire.repetition_penalty or 1.0,
        presence_penalty=wire.presence_penalty,
        frequency_penalty=wire.frequency_penalty,
        logit_bias=tuple(sorted(wire.logit_bias.items())),
        seed=wire.seed if wire.HasField("seed") else seed,
        # Stop strings are looked for by the gateway, which has the text.
        stop_token_ids=tuple(wire.stop_token_ids),
        ignore_eos=wire.ignore_eos,
        logprobs=wire.logprobs if wire.HasField("logprobs") else None,
        prompt_logprobs=wire.prompt_logprobs if wire.HasField("prompt_logprobs") else None,
    )
