"""A client that does not read loses its stream; one whose tokens we were slow to send does not."""

from __future__ import annotations

import asyncio

import pytest

from duopool.core.errors import SlowReader
from duopool.proto import inference_pb2 as pb
from duopool.router.outbox import MOST_FACTOR, STUCK_S, Outbox

LIMIT = 8


class Clock:
    def __init__(self) -> None:
        self.now = 5.0

    def __call__(self) -> float:
        return self.now


def outbox_of(num_choices: int = 1) -> tuple[Outbox, Clock]:
    clock = Clock()
    return Outbox(LIMIT, num_choices=num_choices, clock=clock), clock


def put(outbox: Outbox, num_tokens: int) -> bool:
    return outbox.put(pb.GenerateResponse(), num_tokens=num_tokens)


def test_tokens_behind_a_write_that_is_stuck_are_limited() -> None:
    async def run() -> None:
        outbox, clock = outbox_of()
        assert put(outbox, LIMIT)
        await outbox.take()
        clock.now += STUCK_S
        assert not put(outbox, 1)
        with pytest.raises(SlowReader, match="more than 8 tokens"):
            await outbox.take()

    asyncio.run(run())


def test_a_burst_that_the_writer_had_no_time_for_is_kept() -> None:
    async def run() -> None:
        outbox, clock = outbox_of()
        assert put(outbox, 1)
        _, num_tokens = await outbox.take() or (None, 0)
        outbox.written(num_tokens)
        clock.now += 100 * STUCK_S
        assert all(put(outbox, 1) for _ in range(3 * LIMIT))
        for _ in range(3 * LIMIT):
            _, num_tokens = await outbox.take() or (None, 0)
            outbox.written(num_tokens)
        assert outbox.num_unread_tokens == 0

    asyncio.run(run())


def test_memory_is_bounded_whoever_is_slow() -> None:
    outbox, _ = outbox_of(num_choices=2)
    assert put(outbox, 2 * LIMIT * MOST_FACTOR)
    assert not put(outbox, 1)
    assert isinstance(outbox.error, SlowReader)
