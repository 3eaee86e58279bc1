"""Channels to sources that are gone."""

from __future__ import annotations

import threading
from collections.abc import Callable

import grpc
import pytest

from duopool.core.messages import Validate, Verdict
from duopool.core.types import Incarnation, LeaseId
from duopool.engine.transfer.source_client import SourceClient


class Call:
    """A call that found nobody; its end comes on the channel's own thread."""

    def add_done_callback(self, ended: Callable[[Call], None]) -> None:
        self.ended = ended

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return "nobody"

    def cancel(self) -> None:
        pass


class Channel:
    """Like gRPC's: to close it is to wait for its thread."""

    def __init__(self) -> None:
        self.call, self.thread_is_free, self.closed = Call(), threading.Event(), threading.Event()

    def unary_unary(self, method: str) -> Channel:
        return self

    def future(self, *_: object, **__: object) -> Call:
        return self.call

    def close(self) -> None:
        if self.thread_is_free.wait(10):
            self.closed.set()


def test_a_channel_is_not_closed_on_its_own_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    channel = Channel()
    monkeypatch.setattr(grpc, "insecure_channel", lambda *_, **__: channel)
    client = SourceClient(confirm_timeout_s=1.0)
    verdicts: list[Verdict] = []
    question = Validate(lease_id=LeaseId(1), incarnation=Incarnation(1), attempt=1)
    client.validate("p:1", question, verdicts.append)
    channel.call.ended(channel.call)
    assert [verdict.ok for verdict in verdicts] == [False]
    channel.thread_is_free.set()
    assert channel.closed.wait(10)
    client.close()
