"""Sends requests and aborts each at a random moment of its life: cancelled, past its deadline, cut off.

Owns how and when one request ends; what is left behind is looked at by `aborts.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import Any

import grpc
from relay import Relay

from duopool.proto import inference_pb2 as pb
from duopool.proto import inference_pb2_grpc

CONNECTION_SIZE = 8
"""Requests that share one connection which is cut."""
CALL_TIMEOUT_S = 60.0
NUM_SHARED_PREFIXES = 4


@dataclass(slots=True)
class Tally:
    """How requests ended, and where they were when they were aborted."""

    ends: Counter[str] = field(default_factory=Counter)
    phases: Counter[str] = field(default_factory=Counter)

    @property
    def num_aborted(self) -> int:
        return sum(count for end, count in self.ends.items() if end not in ("finished", "refused"))


class Storm:
    """Requests against one router."""

    def __init__(self, address: str, random: Random, *, max_prompt: int, max_tokens: int) -> None:
        self.tally = Tally()
        self._address = address
        self._random = random
        self._max_prompt = max_prompt
        self._max_tokens = max_tokens
        self._typical_s = 1.0

    async def learn(self, num_requests: int) -> float:
        """Let some finish; what one takes, in seconds, sets the range of the random moments."""
        async with grpc.aio.insecure_channel(self._address) as channel:
            begin = time.monotonic()
            tally = Tally()
            await asyncio.gather(*(self._run(channel, "finished", tally) for _ in range(num_requests)))
            assert tally.ends["finished"] == num_requests, tally.ends
            self._typical_s = time.monotonic() - begin
            return self._typical_s

    async def abort(self, num_requests: int, *, concurrency: int) -> None:
        """Until so many were aborted, never more than `concurrency` at once."""
        async with grpc.aio.insecure_channel(self._address) as channel, asyncio.TaskGroup() as tasks:
            for _ in range(max(1, concurrency // CONNECTION_SIZE)):
                tasks.create_task(self._abort_in_turn(channel, num_requests))

    async def hold(self, num_requests: int) -> None:
        """Requests that end when the router does; or finish."""
        async with grpc.aio.insecure_channel(self._address) as channel:
            await asyncio.gather(*(self._run(channel, "router killed", self.tally) for _ in range(num_requests)))

    async def _abort_in_turn(self, channel: Any, num_requests: int) -> None:
        while self.tally.num_aborted < num_requests:
            how = self._random.choice(("cancelled", "cancelled", "deadline", "cut off"))
            if how == "cut off":
                await self._cut_off()
            else:
                await asyncio.gather(*(self._run(channel, how, self.tally) for _ in range(CONNECTION_SIZE)))

    async def _cut_off(self) -> None:
        """A connection with some requests breaks at a random moment."""
        async with Relay(self._address) as relay, grpc.aio.insecure_channel(relay.address) as channel:
            requests = asyncio.gather(
                *(self._run(channel, "cut off", self.tally) for _ in range(self._random.randint(1, CONNECTION_SIZE)))
            )
            await asyncio.sleep(self._random.uniform(0, self._typical_s))
            relay.sever()
            await requests

    async def _run(self, channel: Any, how: str, tally: Tally) -> None:
        random = self._random
        timeout_s = random.uniform(0.001, self._typical_s) if how == "deadline" else CALL_TIMEOUT_S
        request = self._request()
        call = inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=timeout_s)  # type: ignore[no-untyped-call]
        moment = random.choice(("sent", "started", "token")) if how == "cancelled" else ""
        at_token = random.randint(1, request.sampling.max_tokens)
        if moment == "sent":
            self._cancel_soon(call)
        phase, num_tokens = "before it started", 0
        try:
            async for response in call:
                event = response.WhichOneof("event")
                if event == "started":
                    phase = "prefilling"
                elif event == "tokens":
                    phase, num_tokens = "decoding", num_tokens + len(response.tokens.token_ids)
                if (moment == "started" and event == "started") or (moment == "token" and num_tokens >= at_token):
                    moment = ""
                    self._cancel_soon(call)
            tally.ends["finished"] += 1
            return
        except asyncio.CancelledError:
            if not call.cancelled():
                raise
            end = "cancelled"
        except grpc.RpcError as error:
            end = _end_of(error, how)
        tally.ends[end] += 1
        tally.phases[phase] += 1

    def _cancel_soon(self, call: Any) -> None:
        delay_s = self._random.choice((0.0, self._random.uniform(0, self._typical_s / 10)))
        asyncio.get_running_loop().call_later(delay_s, call.cancel)

    def _request(self) -> pb.GenerateRequest:
        random = self._random
        prompt = [random.randrange(3, 1000) for _ in range(random.randint(1, self._max_prompt))]
        shared = random.randrange(2 * NUM_SHARED_PREFIXES)
        if shared < NUM_SHARED_PREFIXES:
            num_shared = random.randint(0, len(prompt))
            prompt[:num_shared] = [3 + shared] * num_shared
        sampling = pb.SamplingParams(max_tokens=random.randint(1, self._max_tokens), temperature=0, ignore_eos=True)
        return pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling)


def _end_of(error: grpc.RpcError, how: str) -> str:
    """The name of an end that was meant; anything else is raised."""
    code = error.code()
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and how == "deadline":
        return how
    if code is grpc.StatusCode.UNAVAILABLE and how in ("cut off", "router killed"):
        return how
    if code is grpc.StatusCode.CANCELLED and how == "cancelled":
        return how
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return "refused"
    raise error
