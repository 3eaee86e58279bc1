"""POST /v1/completions: what is asked, and how it is answered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from duopool.core.errors import InvalidRequest
from duopool.router.ask import Ask, Prompt, TextPrompt, TokenPrompt
from duopool.router.generation import Generation
from duopool.router.http.answer import answer
from duopool.router.http.body import StrictRoute
from duopool.router.http.call import Call, responses
from duopool.router.http.completion_reply import Completion, CompletionReply
from duopool.router.http.sampling_fields import SamplingFields
from duopool.router.traces import TRACEPARENT


class CompletionRequest(SamplingFields):
    """Continue prompts."""

    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        description="A text, token ids, or a list of one of them."
    )
    echo: bool | None = Field(default=None, description="Give the prompt back before the output.")
    logprobs: int | None = Field(default=None, description="Alternatives per token; with `echo` for the prompt too.")
    add_special_tokens: bool | None = None
    suffix: str | None = Field(default=None, description="Not supported.")

    def prompts(self) -> tuple[Prompt, ...]:
        """Every prompt by itself."""
        given = self.prompt
        if isinstance(given, str):
            return (self._text(given, "prompt"),)
        if not given:
            raise InvalidRequest("prompt", "must not be empty")
        if isinstance(given[0], int):
            return (_tokens(given, "prompt"),)
        return tuple(
            self._text(each, f"prompt[{place}]") if isinstance(each, str) else _tokens(each, f"prompt[{place}]")
            for place, each in enumerate(given)
        )

    def _text(self, text: str, field: str) -> TextPrompt:
        return TextPrompt(text=text, field=field, add_special_tokens=self.add_special_tokens is not False)


def routes(generation: Generation) -> APIRouter:
    router = APIRouter(route_class=StrictRoute)

    @router.post("/v1/completions", responses=responses(Completion), tags=["OpenAI"])
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue one or more prompts; `stream` makes it server-sent events."""
        if body.suffix:
            raise InvalidRequest("suffix", "is not supported")
        is_silent = body.max_tokens == 0 and bool(body.echo)
        more: dict[str, Any] = {"max_tokens": 1} if is_silent else {}
        if body.echo and body.logprobs is not None:
            more["prompt_logprobs"] = body.logprobs
        call = Call.of(request, body, generation, prefix="cmpl")
        ask = Ask(
            tenant=request.state.tenant,
            model=body.model or "",
            prompts=body.prompts(),
            params=body.sampling(seed=generation.draw_seed(), logprobs=body.logprobs, **more),
            guide=body.guide,
            num_choices=body.num_choices,
            priority=body.priority or 0,
            request_id=call.id,
            cache_salt=body.salt,
            traceparent=request.headers.get(TRACEPARENT, ""),
        )
        reply = CompletionReply(
            call,
            ask.prompts,
            generation.tokenizer,
            has_logprobs=body.logprobs is not None,
            echo=bool(body.echo),
            is_silent=is_silent,
        )
        return await answer(request, generation, ask, reply, is_stream=bool(body.stream))

    return router


def _tokens(token_ids: Sequence[Any], field: str) -> TokenPrompt:
    return TokenPrompt(token_ids=tuple(token_ids), field=field)
