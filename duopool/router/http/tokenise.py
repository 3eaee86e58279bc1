"""POST /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from duopool.core.errors import InvalidRequest
from duopool.router.ask import ChatPrompt, Prompt, TextPrompt
from duopool.router.generation import Generation
from duopool.router.http.body import StrictRoute
from duopool.router.http.call import responses
from duopool.router.http.messages import ChatMessage, read_messages


class TokenizeRequest(BaseModel):
    """A text, or messages for the chat template."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = Field(default=None, description="For a prompt; true when absent.")
    return_token_strs: bool | None = None

    def text_or_chat(self) -> Prompt:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("prompt", "one of prompt and messages must be set")
        if self.prompt is not None:
            return TextPrompt(text=self.prompt, field="prompt", add_special_tokens=self.add_special_tokens is not False)
        return ChatPrompt(messages=read_messages(self.messages or []), field="messages")


class Tokenized(TypedDict):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    model: str | None = None
    tokens: list[int]


class Detokenized(TypedDict):
    prompt: str


def routes(generation: Generation) -> APIRouter:
    router = APIRouter(route_class=StrictRoute, tags=["Tokens"])

    @router.post("/tokenize", responses=responses(Tokenized, is_stream=False))
    async def tokenize(body: TokenizeRequest) -> Tokenized:
        """Token ids of a text or of messages."""
        generation.check_model(body.model or "")
        token_ids = await generation.encode(body.text_or_chat())
        texts = [generation.tokenizer.text_of(token_id) for token_id in token_ids] if body.return_token_strs else None
        return {
            "count": len(token_ids),
            "max_model_len": generation.limits().max_model_len,
            "tokens": list(token_ids),
            "token_strs": texts,
        }

    @router.post("/detokenize", responses=responses(Detokenized, is_stream=False))
    async def detokenize(body: DetokenizeRequest) -> Detokenized:
        """Text of token ids."""
        generation.check_model(body.model or "")
        return {"prompt": await generation.decode(body.tokens, field="tokens")}

    return router
