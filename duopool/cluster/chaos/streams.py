"""Streams that check themselves: each repeats requests whose answers are known, and counts what is not as it must be.

Owns the streams, their thread and the tally. Which requests are sent and what happens to the workers meanwhile is
others' business.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Self

import grpc

from duopool.proto import inference_pb2 as pb
from duopool.proto import inference_pb2_grpc
from duopool.proto.status import read_status

POLL_S = 0.02
_STUB: Any = inference_pb2_grpc.InferenceStub


@dataclass(slots=True, kw_only=True)
class Tally:
    """What the streams have seen so far."""

    requests: int = 0
    """That ended, well or not."""
    tokens: int = 0
    lost: int = 0
    """Requests that ended without their last message."""
    doubled: int = 0
    """Chunks that did not begin at the next index."""
    changed: int = 0
    """Requests whose tokens differ from those of the unfaulted run."""
    retried: int = 0
    """Requests that took more than one attempt."""
    longest_wait_s: float = 0.0
    """Longest time from a request to its first token, queues included."""
    longest_pause_s: float = 0.0
    """Longest time between two tokens of a stream."""
    complaints: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        return not (self.lost or self.doubled or self.changed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A request and the tokens it must give."""

    request: pb.GenerateRequest
    answer: tuple[int, ...]


class Streams:
    """`count` streams that ask without a break while the `with` block runs; at its end they finish what they ask."""

    def __init__(self, address: str, questions: Sequence[Question], *, count: int, seed: int) -> None:
        self.tally = Tally()
        self._address = address
        self._questions = questions
        self._count = count
        self._seed = seed
        self._is_over = threading.Event()
        self._begun_at: dict[int, float] = {}
        """When the request under way in each stream was sent."""
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="chaos streams")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def wait_until_none_is_older(self, than: float) -> None:
        """Until every request that was under way at this moment of the monotonic clock has ended."""
        while any(begun_at < than for begun_at in list(self._begun_at.values())):
            time.sleep(POLL_S)

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    async def _run(self) -> None:
        async with grpc.aio.insecure_channel(self._address) as channel:
            await asyncio.gather(*(self._stream(channel, at) for at in range(self._count)))

    async def _stream(self, channel: Any, at: int) -> None:
        random, turn = Random(f"{self._seed} {at}"), 0
        while not self._is_over.is_set():
            turn += 1
            question = random.choice(self._questions)
            request = pb.GenerateRequest()
            request.CopyFrom(question.request)
            # A salt of its own for most: a prompt that is cached on a decode worker would not be handed over.
            request.cache_salt = b"chaos %d %d" % (at, turn) if turn % 4 else b"chaos"
            self._begun_at[at] = time.monotonic()
            await self._ask(channel, Question(request=request, answer=question.answer))
        self._begun_at.pop(at, None)

    async def _ask(self, channel: Any, question: Question) -> None:
        tally, finished = self.tally, None
        received: list[int] = []
        heard_at = time.monotonic()
        try:
            async for response in _STUB(channel).Generate(question.request):
                match response.WhichOneof("event"):
                    case "tokens":
                        now = time.monotonic()
                        if received:
                            tally.longest_pause_s = max(tally.longest_pause_s, now - heard_at)
                        else:
                            tally.longest_wait_s = max(tally.longest_wait_s, now - heard_at)
                        heard_at = now
                        tally.doubled += response.tokens.index != len(received)
                        received += response.tokens.token_ids
                    case "finished":
                        finished = response.finished
        except grpc.RpcError as error:
            status = read_status(error)
            tally.complaints.append(f"{status.code.name} {status.reason}: {status.message}")
        tally.requests += 1
        tally.tokens += len(received)
        if finished is None:
            tally.lost += 1
        elif tuple(received) != question.answer:
            tally.changed += 1
            tally.complaints.append(f"{received} instead of {list(question.answer)}")
        else:
            tally.retried += finished.attempts > 1


async def answer_all(address: str, requests: Sequence[pb.GenerateRequest]) -> list[Question]:
    """The questions: what each request gives while nothing fails, all asked at once."""

    async def answer(stub: Any, request: pb.GenerateRequest) -> Question:
        tokens = [token_id async for response in stub.Generate(request) for token_id in response.tokens.token_ids]
        return Question(request=request, answer=tuple(tokens))

    async with grpc.aio.insecure_channel(address) as channel:
        return list(await asyncio.gather(*(answer(_STUB(channel), request) for request in requests)))
