"""The HTTP face: the same tokens as gRPC in OpenAI's form, errors that name the field, and nothing left behind."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import httpx
import pytest
from http_fakes import MAX_BODY_BYTES, client_of, events_of
from router_fakes import FakeCluster, FakeWorker, eventually, expected_output

from duopool.core.errors import WorkerLost
from duopool.core.handoff.request import Phase
from duopool.core.messages import Cancel, NackReason

PROMPT = "héllo"
IDS = list(PROMPT.encode())
CHAT = [{"role": "user", "content": "hi"}]
CHAT_IDS = [256, *b"user: hi", 257, 256, *b"assistant: "]


def said(prompt: list[int], num_tokens: int) -> str:
    return bytes(expected_output(prompt, num_tokens)).decode()


def ask(path: str, **body: Any) -> httpx.Response:
    return ask_all([(path, body)])[0]


def ask_all(calls: list[tuple[str, dict[str, Any]]], **settings: Any) -> list[httpx.Response]:
    async def run() -> list[httpx.Response]:
        async with FakeCluster(**settings) as cluster, client_of(cluster) as client:
            return [await client.post(path, json=body) for path, body in calls]

    return asyncio.run(run())


@pytest.mark.parametrize("prompt", [PROMPT, IDS, [PROMPT], [IDS]])
def test_a_prompt_may_come_in_four_forms(prompt: Any) -> None:
    answer = ask("/v1/completions", prompt=prompt, max_tokens=6).json()
    (choice,) = answer["choices"]
    assert choice["text"] == said(IDS, 6)
    assert (choice["finish_reason"], answer["object"], answer["model"]) == ("length", "text_completion", "tiny")
    assert answer["usage"] == {
        "prompt_tokens": len(IDS),
        "completion_tokens": 6,
        "total_tokens": len(IDS) + 6,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": [PROMPT, "x"], "n": 2, "logprobs": 2, "echo": True}),
        ("/v1/completions", {"prompt": PROMPT, "stop": ["zz"], "logprobs": 0}),
        ("/v1/chat/completions", {"messages": CHAT, "n": 3, "logprobs": True, "top_logprobs": 1}),
        ("/v1/chat/completions", {"messages": CHAT}),
    ],
)
def test_a_stream_adds_up_to_the_whole_answer(path: str, body: dict[str, Any]) -> None:
    body = {**body, "max_tokens": 5, "seed": 3}
    whole, stream = ask_all([(path, body), (path, {**body, "stream": True, "stream_options": {"include_usage": True}})])
    answer, (*events, last) = whole.json(), events_of(stream.text)
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert last["choices"] == []
    assert last["usage"] == answer["usage"]
    assert len({event["id"] for event in events}) == 1
    for choice in answer["choices"]:
        parts = [part for event in events for part in event["choices"] if part["index"] == choice["index"]]
        text = [part["text"] if "text" in part else part["delta"].get("content", "") for part in parts]
        assert "".join(text) == (choice["text"] if "text" in choice else choice["message"]["content"])
        assert parts[-1]["finish_reason"] == choice["finish_reason"] == "length"
        logprobs = [part["logprobs"] for part in parts if part["logprobs"] is not None]
        if choice["logprobs"] is not None:
            sums = {name: [entry for each in logprobs for entry in each[name]] for name in choice["logprobs"]}
            assert sums == choice["logprobs"]


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/completions", {"prompt": PROMPT, "n": 2}), ("/v1/chat/completions", {"messages": CHAT})]
)
def test_usage_comes_with_every_event_if_it_is_wanted(path: str, body: dict[str, Any]) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = ask_all([(path, {**body, "max_tokens": 6, "stream": True, "stream_options": options})])[0]
    *events, last = events_of(stream.text)
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert len(set(counts)) > 1
    assert counts[-1] == last["usage"]["completion_tokens"] == 6 * body.get("n", 1)
    assert {event["usage"]["prompt_tokens"] for event in events} == {last["usage"]["prompt_tokens"]}


def test_choices_of_several_prompts_are_numbered_through() -> None:
    answer = ask("/v1/completions", prompt=["a", "b"], n=2, max_tokens=4).json()
    texts = [choice["text"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert texts == [said([97], 4)] * 2 + [said([98], 4)] * 2
    assert answer["usage"]["prompt_tokens"] == 2
    assert answer["usage"]["completion_tokens"] == 16


def test_echo_shows_the_prompt_with_its_logprobs() -> None:
    answers = ask_all(
        [("/v1/completions", {"prompt": "abc", "echo": True, "logprobs": 1, "max_tokens": number}) for number in (2, 0)]
    )
    longer, silent = [answer.json() for answer in answers]
    (choice,) = longer["choices"]
    assert choice["text"] == "abc" + said([*b"abc"], 2)
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == list(choice["text"])
    assert logprobs["token_logprobs"] == [None, -0.25, -0.25, -0.25, -0.25]
    assert logprobs["top_logprobs"][0] is None
    assert all(token in top for token, top in list(zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True))[1:])
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4]
    (choice,) = silent["choices"]
    assert (choice["text"], choice["logprobs"]["tokens"]) == ("abc", ["a", "b", "c"])
    assert silent["usage"]["completion_tokens"] == 0


def test_chat_goes_through_the_template_and_takes_all_the_room_there_is() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]
    plain, limited, in_parts = ask_all(
        [
            ("/v1/chat/completions", {"messages": CHAT}),
            ("/v1/chat/completions", {"messages": CHAT, "max_completion_tokens": 7, "max_tokens": 9}),
            ("/v1/chat/completions", {"messages": parts, "max_tokens": 7}),
        ]
    )
    room = 512 - len(CHAT_IDS)
    assert plain.json()["usage"]["completion_tokens"] == room
    assert plain.json()["choices"][0]["message"]["content"] == said(CHAT_IDS, room)
    message = limited.json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": said(CHAT_IDS, 7), "refusal": None}
    assert in_parts.json()["choices"][0]["message"] == message


def test_tokenize_and_detokenize_are_inverse() -> None:
    tokens, text, chat = ask_all(
        [
            ("/tokenize", {"prompt": PROMPT, "return_token_strs": True}),
            ("/detokenize", {"tokens": IDS}),
            ("/tokenize", {"messages": CHAT}),
        ]
    )
    assert tokens.json()["tokens"] == IDS
    assert (tokens.json()["count"], tokens.json()["max_model_len"]) == (len(IDS), 512)
    assert text.json() == {"prompt": PROMPT}
    assert chat.json()["tokens"] == CHAT_IDS


WRONG = [
    ("/v1/completions", {"prompt": "a", "max_tokens": "5"}, "max_tokens"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 5.5}, "max_tokens"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 0}, "max_tokens"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 5000}, "max_tokens"),
    ("/v1/completions", {"prompt": "a", "temperature": "hot"}, "temperature"),
    ("/v1/completions", {"prompt": "a", "temperature": 1e308}, "temperature"),
    ("/v1/completions", {"prompt": "a", "stream": 1}, "stream"),
    ("/v1/completions", {"prompt": "a", "n": 17}, "n"),
    ("/v1/completions", {"prompt": "a", "seed": 2**70}, "seed"),
    *(
        ("/v1/completions", {"prompt": "a", field: value}, field)
        for field in ("n", "max_tokens", "min_tokens", "top_k", "seed", "priority", "logprobs", "temperature")
        for value in (2**64, 10**30, 10**400, -(10**400))
    ),
    ("/v1/completions", {"prompt": "a", "stop": ["a", 1]}, "stop"),
    ("/v1/completions", {"prompt": "a", "stop": [""]}, "stop[0]"),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"300": 1}}, "logit_bias[0]"),
    ("/v1/completions", {"prompt": "a", "suffix": "b"}, "suffix"),
    ("/v1/completions", {"prompt": "a", "model": "other"}, "model"),
    ("/v1/completions", {"prompt": "a", "stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
    ("/v1/completions", {"prompt": "a" * 600}, "prompt"),
    ("/v1/completions", {"prompt": ["a", ""]}, "prompt[1]"),
    ("/v1/completions", {"prompt": []}, "prompt"),
    ("/v1/completions", {"prompt": [1, 300]}, "prompt[1]"),
    ("/v1/completions", {"prompt": [[1], [2, -1]]}, "prompt[1][1]"),
    ("/v1/completions", {"prompt": None}, "prompt"),
    ("/v1/completions", {}, "prompt"),
    ("/v1/completions", {"prompt": ["a"] * 129}, "prompt"),
    ("/v1/chat/completions", {}, "messages"),
    ("/v1/chat/completions", {"messages": []}, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "king", "content": "a"}]}, "messages[0].role"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
    ("/v1/chat/completions", {"messages": CHAT, "top_logprobs": 2}, "top_logprobs"),
    ("/v1/chat/completions", {"messages": CHAT, "logprobs": True, "top_logprobs": 21}, "logprobs"),
    ("/tokenize", {"prompt": "a", "messages": CHAT}, "prompt"),
    ("/detokenize", {"tokens": [300]}, "tokens[0]"),
    ("/detokenize", {"tokens": [0, -1]}, "tokens[1]"),
    ("/v1/completions", {"prompt": "a", "stop_token_ids": [1, -(10**9)], "min_tokens": 2}, "stop_token_ids[1]"),
    ("/v1/completions", {"prompt": [1, 10**30]}, "prompt[1]"),
]


def test_what_is_wrong_gets_an_error_that_names_the_field() -> None:
    answers = ask_all([(path, body) for path, body, _ in WRONG])
    for (_, body, field), answer in zip(WRONG, answers, strict=True):
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (404 if field == "model" else 400, field), (body, error)
        assert error["type"] == "invalid_request_error"
        assert error["message"]


def test_unknown_fields_and_nulls_pass() -> None:
    unknown = {"store": True, "metadata": {"a": 1}, "user": "me", "priority": 3, "frob": [1], "temperature": None}
    assert ask("/v1/completions", prompt="a", max_tokens=1, **unknown).status_code == 200


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b'{"prompt": "\\ud800"}', 400),
        (b'{"prompt": "a", "temperature": NaN}', 400),
        (b'{"prompt": "\xff"}', 400),
        (b"[" * 50_000, 400),
        (b'{"prompt": "' + b"a" * MAX_BODY_BYTES + b'"}', 413),
    ],
)
def test_a_body_that_is_no_request_is_refused(body: bytes, status: int) -> None:
    async def run() -> httpx.Response:
        async with FakeCluster() as cluster, client_of(cluster) as client:
            return await client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})

    answer = asyncio.run(run())
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_overload_is_429_with_the_time_to_wait() -> None:
    (answer,) = ask_all([("/v1/completions", {"prompt": "a", "n": 3})], max_num_requests=2)
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["code"] == "overloaded"


def test_no_workers_is_503_and_not_ready() -> None:
    async def run() -> None:
        async with FakeCluster(workers=[]) as cluster, client_of(cluster) as client:
            answer = await client.post("/v1/completions", json={"prompt": "a"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
            assert (await client.get("/ready")).status_code == 503
            assert (await client.get("/health")).status_code == 200
            assert b"duopool:num_requests" in (await client.get("/metrics")).content
            assert (await client.get("/v1/models")).json()["data"][0]["max_model_len"] is None

    asyncio.run(run())


def test_what_fails_before_the_first_token_has_a_status_even_in_a_stream() -> None:
    async def run() -> None:
        workers = [FakeWorker("prefill-0", "prefill"), FakeWorker("decode-0", "decode")]
        async with FakeCluster(workers) as cluster, client_of(cluster) as client:
            for worker in workers:
                worker.refuse = NackReason.TOO_LARGE
            answer = await client.post("/v1/completions", json={"prompt": "a", "stream": True})
            assert answer.status_code == 400
            assert answer.json()["error"]["code"] == "context_length_exceeded"

    asyncio.run(run())


def test_a_stream_that_breaks_says_so_and_ends() -> None:
    async def run() -> None:
        workers = [FakeWorker("prefill-0", "prefill"), FakeWorker("decode-0", "decode", step_s=0.01)]
        async with FakeCluster(workers) as cluster, client_of(cluster) as client:
            call = asyncio.create_task(
                client.post("/v1/completions", json={"prompt": "a", "max_tokens": 500, "stream": True})
            )
            await eventually(lambda: workers[1].running)
            for life in list(cluster.router.pools._lives.values()):
                life.stop(Phase.FAILED, WorkerLost("decode-0 is gone"))
            events = events_of((await call).text)
            assert events[-1]["error"]["code"] == "worker_lost"

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_the_worker(stream: bool) -> None:
    """The application is driven by hand: the client says nothing more than that it is gone."""

    async def run() -> None:
        workers = [FakeWorker("prefill-0", "prefill"), FakeWorker("decode-0", "decode", step_s=0.01)]
        async with FakeCluster(workers) as cluster, client_of(cluster) as client:
            app = client._transport.app
            body = json.dumps({"prompt": "a", "max_tokens": 500, "stream": stream}).encode()
            is_gone = asyncio.Event()
            requests = [{"type": "http.request", "body": body, "more_body": False}]

            async def receive() -> dict[str, Any]:
                if requests:
                    return requests.pop()
                await is_gone.wait()
                return {"type": "http.disconnect"}

            async def send(message: dict[str, Any]) -> None:
                pass

            scope = {
                "type": "http",
                "method": "POST",
                "path": "/v1/completions",
                "raw_path": b"/v1/completions",
                "query_string": b"",
                "headers": [(b"content-type", b"application/json")],
                "http_version": "1.1",
                "scheme": "http",
                "client": None,
                "server": None,
            }
            call = asyncio.create_task(app(scope, receive, send))
            await eventually(lambda: workers[1].running)
            is_gone.set()
            await asyncio.wait_for(call, 5)
            await eventually(lambda: workers[1].received(Cancel))
            assert cluster.router.pools.num_requests == 0

    asyncio.run(run())


def test_the_router_listens_on_a_port_of_its_own() -> None:
    async def run() -> None:
        async with (
            FakeCluster(http_port=0) as cluster,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{cluster.router.http_port}") as client,
        ):
            answer = await client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 3})
            assert answer.json()["choices"][0]["text"] == said(IDS, 3)
            long = {"prompt": PROMPT, "max_tokens": 400, "stream": True}
            async with client.stream("POST", "/v1/completions", json=long) as stream:
                assert stream.status_code == 200
                await anext(stream.aiter_lines())
            await eventually(lambda: cluster.router.pools.num_requests == 0)

    asyncio.run(run())


@pytest.mark.parametrize("write_timeout_s", [0.2, 60.0])
def test_a_client_that_stops_reading_is_cut_off(monkeypatch: pytest.MonkeyPatch, write_timeout_s: float) -> None:
    """A real socket that is never read: by the time that a write takes, or by the tokens that wait behind it."""
    monkeypatch.setattr("duopool.router.generation.LINGER_S", 0.1)
    monkeypatch.setattr("duopool.router.outbox.STUCK_S", 0.1)
    monkeypatch.setattr("duopool.router.http.answer.LAST_WORD_S", 0.1)
    monkeypatch.setattr("duopool.router.http.answer.WRITE_TIMEOUT_S", write_timeout_s)

    async def run() -> None:
        workers = [FakeWorker("prefill-0", "prefill"), FakeWorker("decode-0", "decode", step_s=0.002)]
        async with FakeCluster(workers, http_port=0, max_unread_tokens=2) as cluster:
            body = json.dumps({"prompt": "a", "max_tokens": 500, "n": 16, "logprobs": 20, "stream": True}).encode()
            head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(client, ("127.0.0.1", cluster.router.http_port))
            await loop.sock_sendall(client, head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            await eventually(lambda: workers[1].running)
            await eventually(lambda: workers[1].received(Cancel), within_s=60)
            await eventually(lambda: cluster.router.pools.num_requests == 0)
            client.close()

    asyncio.run(run())
