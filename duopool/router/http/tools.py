"""Tools: what a model is told of them, the grammar when it must call one, and calls found in its text.

Calls are written as Hermes-style models write them: JSON with `name` and `arguments` between `<tool_call>` tags.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired

from pydantic import BaseModel, ConfigDict
from typing_extensions import TypedDict

from duopool.core.errors import InvalidRequest
from duopool.router.guide import Guide, GuideKind

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MAX_TOOLS = 128


class Function(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    type: str = "function"
    function: Function


class NamedFunction(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    name: str


class NamedTool(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    type: str = "function"
    function: NamedFunction


class CalledFunction(TypedDict):
    name: str
    arguments: str
    """JSON."""


class ToolCallPart(TypedDict):
    index: NotRequired[int]
    """In a stream: which call of the message this is."""
    id: str
    type: str
    function: CalledFunction


def tool_guide(tools: Sequence[Tool], choice: str | NamedTool | None, *, is_parallel: bool) -> Guide | None:
    """The grammar of an output that must be a call; None when the model decides. InvalidRequest for a bad choice."""
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest("tools", f"at most {MAX_TOOLS} tools are allowed, got {len(tools)}")
    for place, tool in enumerate(tools):
        if tool.type != "function":
            raise InvalidRequest(f"tools[{place}].type", f"must be function, got {tool.type[:64]!r}")
    if choice in (None, "auto", "none"):
        return None
    if not tools:
        raise InvalidRequest("tool_choice", "needs tools")
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
        if not tools:
            raise InvalidRequest("tool_choice.function.name", f"no tool has the name {choice.function.name[:64]!r}")
        is_parallel = False
    elif choice != "required":
        raise InvalidRequest("tool_choice", f"must be none, auto, required or a function, got {str(choice)[:64]!r}")
    schema = json.dumps({"anyOf": [_call_schema(tool.function) for tool in tools]})
    source = (
        f"start: call{'+' if is_parallel else ''}\n"
        f"call: {json.dumps(OPEN)} /\\n?/ body /\\n?/ {json.dumps(CLOSE)}\n"
        f"body: %json {schema}\n"
    )
    return Guide(kind=GuideKind.LARK, source=source, field="tools")


def describe(tools: Sequence[Tool]) -> str:
    """For a model whose chat template has no place for tools: what the system message says of them."""
    listed = "\n".join(json.dumps(tool.model_dump(exclude_none=True)) for tool in tools)
    return (
        f"You may call these functions:\n<tools>\n{listed}\n</tools>\nTo call one, write "
        f'{OPEN}{{"name": <name>, "arguments": <object>}}{CLOSE}'
    )


def with_description(messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The conversation for a template without tools: they stand in the system message, calls in the contents."""
    told = [{**message, "content": message["content"] + _calls_as_text(message)} for message in messages]
    if told[0]["role"] == "system":
        told[0]["content"] += "\n\n" + describe(tools)
    else:
        told.insert(0, {"role": "system", "content": describe(tools)})
    return told


class ToolCallParser:
    """Splits an output that comes in pieces into content and calls. What looks like a call and is none is content."""

    def __init__(self, call_id_prefix: str) -> None:
        self._prefix = call_id_prefix
        self._held = ""
        self.num_calls = 0

    def push(self, text: str) -> tuple[str, list[ToolCallPart]]:
        """The content and the calls that are certain now."""
        self._held += text
        content = ""
        calls: list[ToolCallPart] = []
        while True:
            before, opened, rest = self._held.partition(OPEN)
            if not opened:
                num_held = _num_undecided(before)
                self._held = before[len(before) - num_held :]
                return content + before[: len(before) - num_held], calls
            body, closed, after = rest.partition(CLOSE)
            content += before
            if not closed:
                self._held = OPEN + rest
                return content, calls
            found = self._calls(body)
            if found is None:
                content += OPEN + body + CLOSE
            calls += found or []
            self._held = after

    def finish(self) -> tuple[str, list[ToolCallPart]]:
        """What is left when the output has ended; the last call may lack its end tag."""
        held, self._held = self._held, ""
        found = self._calls(held.removeprefix(OPEN)) if held.startswith(OPEN) else None
        return (held, []) if found is None else ("", found)

    def _calls(self, body: str) -> list[ToolCallPart] | None:
        try:
            read = json.loads(body)
        except (ValueError, RecursionError):
            return None
        calls = read if isinstance(read, list) else [read]
        if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
            return None
        return [self._part(call) for call in calls]

    def _part(self, call: Mapping[str, Any]) -> ToolCallPart:
        index, self.num_calls = self.num_calls, self.num_calls + 1
        arguments = json.dumps(call.get("arguments", call.get("parameters", {})), ensure_ascii=False)
        return {
            "index": index,
            "id": f"{self._prefix}-{index}",
            "type": "function",
            "function": {"name": call["name"], "arguments": arguments},
        }


def _call_schema(function: Function) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": function.name}, "arguments": function.parameters or {"type": "object"}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _calls_as_text(message: Mapping[str, Any]) -> str:
    calls = [call["function"] for call in message.get("tool_calls", ())]
    return "".join(f"{OPEN}{json.dumps(call)}{CLOSE}" for call in calls)


def _num_undecided(text: str) -> int:
    """Length of the longest end of `text` that begins the open tag."""
    return next((size for size in range(min(len(OPEN), len(text)), 0, -1) if OPEN.startswith(text[-size:])), 0)
