"""Constrained output and tools at the HTTP face: what reaches the workers, and calls found in what they say."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from typing import Any

import grpc
import llguidance
import pytest
from http_fakes import client_of
from hypothesis import given
from hypothesis import strategies as st
from router_fakes import FakeCluster, byte_tokenizer

from duopool.client import generate_request
from duopool.core.messages import Prefill
from duopool.proto.status import read_status
from duopool.router.http.tools import Tool, ToolCallParser, tool_guide

CHAT = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


def grammar_of(path: str = "/v1/completions", **body: Any) -> str:
    """What the prefill worker gets for a request."""

    async def run() -> str:
        async with FakeCluster() as cluster, client_of(cluster) as client:
            answer = await client.post(path, json={"max_tokens": 1, **body})
            assert answer.status_code == 200, answer.text
            (command,) = cluster.workers[0].received(Prefill)
            return command.request.params.grammar

    return asyncio.run(run())


def matches(grammar: str, text: str) -> bool:
    tokenizer = llguidance.LLTokenizer(byte_tokenizer().to_str())
    matcher = llguidance.LLMatcher(tokenizer, grammar)
    return matcher.consume_tokens(list(text.encode())) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("asked", "right", "wrong"),
    [
        ({"response_format": {"type": "json_object"}}, '{"x": [1, null]}', "[1]"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}, '{"a": 1}', '{"a": "1"}'),
        ({"response_format": {"type": "regex", "regex": "[ab]+"}}, "abba", "c"),
        ({"response_format": {"type": "grammar", "grammar": 'start: "x" | "yz"'}}, "yz", "xy"),
        ({"structured_outputs": {"json": SCHEMA}}, '{\n  "a": 1\n}', "{}"),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, '{"a":1}', "{}"),
        ({"structured_outputs": {"choice": ["yes", 'no "never"']}}, 'no "never"', "maybe"),
        ({"structured_outputs": {"regex": "a|b"}}, "a", "ab"),
        ({"structured_outputs": {"grammar": "start: /[0-9]+/"}}, "42", "4x"),
    ],
)
def test_every_way_to_say_what_the_output_is_becomes_a_grammar(asked: dict[str, Any], right: str, wrong: str) -> None:
    grammar = grammar_of(prompt="a", **asked)
    assert matches(grammar, right)
    assert not matches(grammar, wrong)


async def generate(cluster: FakeCluster, **fields: Any) -> None:
    async for _ in cluster.inference.Generate(generate_request("hi", max_tokens=4, **fields)):
        pass


@pytest.mark.parametrize(
    ("asked", "same"),
    [
        ({"json_schema": SCHEMA}, {"type": "json_schema", "json_schema": {"schema": SCHEMA}}),
        ({"json_schema": json.dumps(SCHEMA)}, {"type": "json_schema", "json_schema": {"schema": SCHEMA}}),
        ({"json_object": True}, {"type": "json_object"}),
        ({"regex": "[ab]+"}, {"type": "regex", "regex": "[ab]+"}),
        ({"grammar": 'start: "x"'}, {"type": "grammar", "grammar": 'start: "x"'}),
    ],
)
def test_grpc_and_http_give_the_same_grammar_also_behind_a_resume(asked: dict[str, Any], same: dict[str, Any]) -> None:
    async def run() -> list[str]:
        async with FakeCluster() as cluster:
            await generate(cluster, **asked)
            await generate(cluster, **asked, resume_from=[ord("{")])
            await generate(cluster, **asked, n=2)
            return [command.request.params.grammar for command in cluster.workers[0].received(Prefill)]

    assert asyncio.run(run()) == [grammar_of(prompt="hi", response_format=same)] * 3


def test_a_guide_that_cannot_be_compiled_is_refused_by_its_field() -> None:
    async def run() -> None:
        async with FakeCluster() as cluster:
            for asked in ({"regex": "(a"}, {"grammar": "start: foo"}, {"json_schema": "{"}):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await generate(cluster, **asked)
                status = read_status(caught.value)
                assert (status.code, status.field) == (grpc.StatusCode.INVALID_ARGUMENT, f"guide.{next(iter(asked))}")

    asyncio.run(run())
    with pytest.raises(ValueError, match="at most one of"):
        generate_request("hi", regex="a", json_object=True)


def test_text_asks_for_nothing() -> None:
    assert grammar_of(prompt="a", response_format={"type": "text"}) == ""
    assert grammar_of("/v1/chat/completions", messages=CHAT, tools=[WEATHER], tool_choice="auto") == ""


WRONG = [
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": 7}}}, "response_format.json_schema.schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "strin"}}}},
        "response_format.json_schema.schema",
    ),
    ({"response_format": {"type": "regex", "regex": "(a"}}, "response_format.regex"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"structured_outputs": {"grammar": "start: foo"}}, "structured_outputs.grammar"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
    ({"structured_outputs": {"regex": "a" * 40_000}}, "structured_outputs.regex"),
    ({"tools": [WEATHER], "tool_choice": "always"}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"function": {"name": "x"}}}, "tool_choice.function.name"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [WEATHER] * 129}, "tools"),
    ({"tools": [WEATHER], "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
]


def test_what_cannot_be_compiled_is_refused_by_its_field() -> None:
    async def run() -> None:
        async with FakeCluster() as cluster, client_of(cluster) as client:
            for body, field in WRONG:
                answer = await client.post("/v1/chat/completions", json={"messages": CHAT, "max_tokens": 1, **body})
                assert (answer.status_code, answer.json()["error"]["param"]) == (400, field), answer.text

    asyncio.run(run())


def test_a_call_that_must_be_made_is_a_grammar() -> None:
    one = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
    two = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    tools = [WEATHER, CLOCK]
    required = grammar_of("/v1/chat/completions", messages=CHAT, tools=tools, tool_choice="required")
    assert matches(required, one)
    assert matches(required, one + two)
    assert not matches(required, "sure")
    named = {"type": "function", "function": {"name": "weather"}}
    forced = grammar_of("/v1/chat/completions", messages=CHAT, tools=tools, tool_choice=named)
    assert matches(forced, one)
    assert not matches(forced, two)
    assert not matches(forced, one + one)


def test_the_model_is_told_of_its_tools() -> None:
    async def run() -> None:
        async with FakeCluster() as cluster, client_of(cluster) as client:
            body = {"messages": CHAT, "tools": [WEATHER], "max_tokens": 1}
            for choice in ("auto", "none"):
                await client.post("/v1/chat/completions", json={**body, "tool_choice": choice})
            told, not_told = [bytes(id for id in c.request.prompt_token_ids if id < 256) for c in _prefills(cluster)]
            assert b'"name": "weather"' in told
            assert b"weather" not in not_told

    asyncio.run(run())


def _prefills(cluster: FakeCluster) -> list[Prefill]:
    return cluster.workers[0].received(Prefill)


SAID = (
    'Let me see.<tool_call>\n{"name": "a", "arguments": {"x": "é<"}}\n</tool_call>'
    ' <tool_call>[{"name": "b"}]</tool_call>'
)


@given(st.lists(st.integers(0, len(SAID)), max_size=8))
def test_calls_are_found_however_the_text_is_cut(cuts: list[int]) -> None:
    parser = ToolCallParser("call")
    places = [0, *sorted(cuts), len(SAID)]
    parts = [parser.push(SAID[start:end]) for start, end in pairwise(places)]
    parts.append(parser.finish())
    calls = [call for _, found in parts for call in found]
    assert "".join(content for content, _ in parts) == "Let me see. "
    assert [(call["index"], call["id"]) for call in calls] == [(0, "call-0"), (1, "call-1")]
    assert [call["function"]["name"] for call in calls] == ["a", "b"]
    assert [json.loads(call["function"]["arguments"]) for call in calls] == [{"x": "é<"}, {}]


@pytest.mark.parametrize("end", ["</tool_call>", ""])
def test_lists_in_lists_without_end_stay_content(end: str) -> None:
    text = "<tool_call>" + "[" * 100_000 + end
    parser = ToolCallParser("call")
    content, calls = parser.push(text)
    rest, more = parser.finish()
    assert (content + rest, [*calls, *more]) == (text, [])


@given(st.text(alphabet="<>tool_cal/{} ", max_size=40))
def test_what_is_no_call_stays_content(text: str) -> None:
    parser = ToolCallParser("call")
    content, calls = parser.push(text)
    rest, more = parser.finish()
    assert content + rest == text
    assert calls == more == []


def test_an_optional_call_has_no_grammar() -> None:
    tools = [Tool.model_validate(WEATHER)]
    for choice in (None, "auto", "none"):
        assert tool_guide(tools, choice, is_parallel=True) is None
