"""`top` draws what the router says, and `chat` keeps exactly what was answered."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from rich.console import Console

from duopool.client import ServerUnavailable
from duopool.cluster import top_command
from duopool.cluster.chat_command import Conversation
from duopool.cluster.top_view import SORTS, Look, picture, tokens_per_s, usage
from duopool.proto import inference_pb2 as pb
from duopool.proto.status import StatusDetails


def worker(name: str, role: str, **fields: Any) -> pb.WorkerState:
    return pb.WorkerState(worker_id=name, role=role, state="ready", blocks=100, **fields)


def look(at: float, *workers: pb.WorkerState) -> Look:
    pools = [pb.PoolState(role=role, wanted=2, ready=1) for role in ("prefill", "decode")]
    return Look(state=pb.ClusterStateResponse(model="tiny", version="1", pools=pools, workers=workers), at=at)


def drawn(renderable: Any) -> str:
    console = Console(width=120, color_system=None)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_every_worker_is_drawn_in_its_pool_and_in_the_order_asked_for() -> None:
    workers = [
        worker("decode-0", "decode", running=1, free_blocks=90, cached_blocks=10),
        worker("decode-1", "decode", running=7, free_blocks=20, cached_blocks=30),
        worker("prefill-0", "prefill", waiting=3, free_blocks=100),
    ]
    now = look(1.0, *workers)
    text = drawn(picture(None, now))
    assert text.index("prefill-0") < text.index("decode-0") < text.index("decode-1")
    assert "50 %" in text
    text = drawn(picture(None, now, sort="running"))
    assert text.index("decode-1") < text.index("decode-0")
    assert usage(workers[1]) == 0.5
    assert usage(pb.WorkerState()) == 0
    assert all(drawn(picture(now, now, sort=sort)) for sort in SORTS)


def test_a_worker_that_started_anew_does_not_count_backwards() -> None:
    before = look(
        10.0, worker("p", "prefill", pid=1, computed_tokens=500), worker("d", "decode", pid=2, computed_tokens=9)
    )
    now = look(
        12.0, worker("p", "prefill", pid=3, computed_tokens=40), worker("d", "decode", pid=2, computed_tokens=29)
    )
    assert tokens_per_s(before, now) == 10.0
    assert tokens_per_s(None, now) == 0


def test_the_app_draws_and_answers_its_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    textual_app = pytest.importorskip("textual.app", reason="the extra `top` is not installed")
    looks = [0]

    def count() -> Look:
        looks[0] += 1
        return look(float(looks[0]), worker("decode-0", "decode", running=looks[0]))

    def run(app: Any) -> None:
        async def drive() -> None:
            async with app.run_test() as pilot:
                while app.now is None:
                    await pilot.pause(0.01)
                await pilot.press("s")
                assert SORTS[app.sort] == SORTS[1]
                await pilot.press("space")
                assert app.is_paused
                await pilot.press("q")

        asyncio.run(drive())

    monkeypatch.setattr(textual_app.App, "run", run)
    top_command._run_app(count, 0.05)
    assert looks[0] > 0


def answers(*texts: str) -> tuple[list[list[dict[str, str]]], Any]:
    asked: list[list[dict[str, str]]] = []

    def generate(messages: list[dict[str, str]]) -> Iterator[Any]:
        asked.append(messages)
        text = texts[len(asked) - 1]
        if text == "fail":
            raise ServerUnavailable(StatusDetails(code=grpc.StatusCode.UNAVAILABLE, message="nobody is there"))
        yield pb.Started()
        for character in text:
            yield pb.TokenChunk(text=character)

    return asked, generate


def test_the_conversation_is_what_was_asked_and_answered() -> None:
    asked, generate = answers("one", "fail", "two", "three")
    shown: list[str] = []
    conversation = Conversation(generate, system="be brief", write=shown.append)
    for line in ("first", "", "lost", "second", "/undo", "third"):
        assert conversation.say(line)
    assert "".join(shown) == "one\n\ntwo\nthree\n"
    assert [message["content"] for message in conversation.messages] == ["be brief", "first", "one", "third", "three"]
    assert [message["content"] for message in asked[2]] == ["be brief", "first", "one", "second"]
    assert conversation.has_failed
    assert conversation.say("/clear")
    assert [message["content"] for message in conversation.messages] == ["be brief"]
    assert conversation.say("/undo")
    assert len(conversation.messages) == 1
    assert not conversation.say("/quit")
