"""POST /v1/chat/completions: what is asked, and how it is answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from duopool.core.errors import InvalidRequest
from duopool.router.ask import Ask, ChatPrompt
from duopool.router.generation import Generation
from duopool.router.guide import Guide
from duopool.router.http.answer import answer
from duopool.router.http.body import StrictRoute
from duopool.router.http.call import Call, responses
from duopool.router.http.chat_reply import ChatCompletion, ChatReply
from duopool.router.http.messages import ChatMessage, read_messages
from duopool.router.http.sampling_fields import SamplingFields
from duopool.router.http.tools import NamedTool, Tool, tool_guide, with_description
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
            priority=body.priority or 0,
            request_id=call.id,
            cache_salt=body.salt,
            traceparent=request.headers.get(TRACEPARENT, ""),
        )
        reply = ChatReply(call, has_logprobs=bool(body.logprobs), has_tools=bool(body.offered_tools))
        return await answer(request, generation, ask, reply, is_stream=bool(body.stream))

    return router
