"""Chat messages as OpenAI has them, to messages as chat templates take them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from duopool.core.errors import InvalidRequest
from duopool.proto.public_codec import CHAT_ROLES

_SAME_ROLE = {"developer": "system"}


class ContentPart(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    type: str
    text: str | None = None


class FunctionCall(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    name: str
    arguments: str


class ToolCall(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    id: str | None = None
    type: str = "function"
    function: FunctionCall


class ChatMessage(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


def read_messages(messages: Sequence[ChatMessage]) -> tuple[dict[str, Any], ...]:
    """Plain dictionaries with text contents. InvalidRequest names the message that no template can take."""
    if not messages:
        raise InvalidRequest("messages", "must not be empty")
    return tuple(_read(message, f"messages[{place}]") for place, message in enumerate(messages))


def _read(message: ChatMessage, field: str) -> dict[str, Any]:
    role = _SAME_ROLE.get(message.role, message.role)
    if role not in CHAT_ROLES:
        known = ", ".join((*CHAT_ROLES, *_SAME_ROLE))
        raise InvalidRequest(f"{field}.role", f"must be one of {known}, got {message.role[:64]!r}")
    read: dict[str, Any] = {"role": role, "content": _text(message, field)}
    if message.name is not None:
        read["name"] = message.name
    if message.tool_call_id is not None:
        read["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        read["tool_calls"] = [_tool_call(call) for call in message.tool_calls]
    return read


def _tool_call(call: ToolCall) -> dict[str, Any]:
    """Templates write the arguments as JSON themselves, so they get an object where it is one."""
    try:
        arguments = json.loads(call.function.arguments)
    except ValueError:
        arguments = call.function.arguments
    return {"id": call.id, "type": call.type, "function": {"name": call.function.name, "arguments": arguments}}


def _text(message: ChatMessage, field: str) -> str:
    if message.content is None or isinstance(message.content, str):
        return message.content or ""
    for place, part in enumerate(message.content):
        if part.type != "text" or part.text is None:
            raise InvalidRequest(f"{field}.content[{place}]", f"only parts of type text are taken, got {part.type!r}")
    return "".join(part.text or "" for part in message.content)
