"""A client that wants its tokens: it goes on with a broken stream at the next router and takes every token once."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from functools import lru_cache

import grpc
import tokenizers

from duopool.core.types import FinishReason, RequestId
from duopool.proto import inference_pb2 as pb
from duopool.router.tokenizer import Tokenizer

from .laws import Laws
from .model import EOS, VOCAB_SIZE, expected_output
from .network import End, Message, Network, Stream
from .scenario import Ask
from .virtual_time import Process

GENERATE = "/duopool.v1.Inference/Generate"
KEEPALIVE_S = 1.0
"""A stream that says nothing for so long is looked at: gRPC's keepalive would have found out whether it stands."""
TRY_AGAIN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
MAX_BACKOFF_S = 1.0


@dataclass(slots=True)
class Output:
    """One choice, over all calls."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""


@dataclass(slots=True)
class Client:
    """One request of one client, over as many calls as it takes."""

    ask: Ask
    process: Process
    network: Network
    routers: tuple[str, ...]
    laws: Laws
    outputs: list[Output] = field(init=False)
    endings: list[str] = field(default_factory=list)
    """Every terminal event; there must be one."""
    details: str = ""
    """What the last failed call said."""
    num_calls: int = 0
    router_id: RequestId | None = None
    """What the router of this call named its first choice: it tells when the client sends no name of its own."""
    _finished: set[int] = field(default_factory=set)
    """Choices whose last message has come in this call."""
    _task: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self.outputs = [Output() for _ in range(self.ask.num_choices)]

    @property
    def num_tokens(self) -> int:
        return sum(len(output.tokens) for output in self.outputs)

    def start(self) -> None:
        self._task = self.process.loop.create_task(self.run())

    def abandon(self) -> None:
        """Want it no more."""
        if not self.endings and self._task is not None:
            self._end("cancelled")
            self._task.cancel()

    async def run(self) -> None:
        await asyncio.sleep(self.ask.at)
        try:
            async with asyncio.timeout(self.ask.cancel_after_s):
                await self._insist()
        except TimeoutError:
            if not self.endings:
                self._end("cancelled")

    async def _insist(self) -> None:
        """Call until there is an ending."""
        began_at, backoff_s = self.process.clock(), 0.1
        while not self.endings:
            left_s = None
            if self.ask.timeout_s is not None:
                left_s = self.ask.timeout_s - (self.process.clock() - began_at)
                if left_s <= 0:
                    self._end("failed: DEADLINE_EXCEEDED")
                    return
            code = await self._call(left_s)
            if self.endings:
                return
            if code in TRY_AGAIN:
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
            elif code is not None:
                self._end(f"failed: {code.name}")

    async def _call(self, left_s: float | None) -> grpc.StatusCode | None:
        """One call; its error, or None after an ending."""
        router = self.routers[self.num_calls % len(self.routers)]
        self.num_calls += 1
        self._finished.clear()
        metadata = {} if left_s is None else {"timeout_s": str(left_s)}
        stream = self.network.open(self.process, f"{router}:1", router, GENERATE, metadata)
        stream.to_server.send(Message(self._request()))
        try:
            async with asyncio.timeout(left_s):
                return await self._listen(stream)
        except TimeoutError:
            return grpc.StatusCode.DEADLINE_EXCEEDED
        finally:
            stream.cancel()

    async def _listen(self, stream: Stream) -> grpc.StatusCode | None:
        while True:
            try:
                async with asyncio.timeout(KEEPALIVE_S):
                    item = await stream.to_client.receive()
            except TimeoutError:
                if stream.server is None or not stream.server.is_alive:
                    return grpc.StatusCode.UNAVAILABLE
                continue
            if isinstance(item, End):
                if item.code is grpc.StatusCode.OK:
                    if not self._has_finished:
                        self._breach("its stream ended well without a last message")
                        self._end("nothing")
                    return None
                self.details = item.details
                return None if self._has_finished else item.code
            if self._has_finished:
                self._breach("a message came behind the last one")
            self._take(pb.GenerateResponse.FromString(item.data))
            if self.ask.cancel_after_tokens is not None and self.num_tokens >= self.ask.cancel_after_tokens:
                if not self.endings:
                    self._end("cancelled")
                return None

    def _request(self) -> bytes:
        ask = self.ask
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=ask.prompt),
            sampling=pb.SamplingParams(
                max_tokens=ask.params.max_tokens,
                seed=ask.params.seed,
                temperature=ask.params.temperature,
                ignore_eos=ask.params.ignore_eos,
                n=ask.num_choices,
            ),
            cache_salt=ask.salt,
            priority=ask.priority,
        )
        outputs = [pb.TokenIds(ids=output.tokens) for output in self.outputs]
        if self.num_tokens and len(outputs) == 1:
            request.resume_from.CopyFrom(outputs[0])
        elif self.num_tokens:
            request.resume_choices.extend(outputs)
        return request.SerializeToString()

    @property
    def _has_finished(self) -> bool:
        """The last message of the call has come."""
        return len(self._finished) == len(self.outputs)

    def _take(self, response: pb.GenerateResponse) -> None:
        match response.WhichOneof("event"):
            case "started":
                self.router_id = RequestId(response.started.request_id)
            case "tokens":
                self._take_tokens(response.tokens)
            case "finished":
                self._take_end(response.finished)
            case _:
                pass

    def _take_tokens(self, chunk: pb.TokenChunk) -> None:
        output, expected = self.outputs[chunk.choice], self._expected(chunk.choice)[0]
        if self.router_id is not None and chunk.choice == 0:
            self.laws.fence.client_hears(self.router_id, chunk.index)
        if chunk.index != len(output.tokens):
            self._breach(f"index {chunk.index} of choice {chunk.choice} came when {len(output.tokens)} was next")
        output.tokens += chunk.token_ids
        output.text += chunk.text
        if tuple(output.tokens) != expected[: len(output.tokens)]:
            self._breach(f"tokens of choice {chunk.choice} are {output.tokens}, not {list(expected)}")

    def _take_end(self, finished: pb.Finished) -> None:
        output, (expected, reason) = self.outputs[finished.choice], self._expected(finished.choice)
        if finished.choice in self._finished:
            self._breach(f"choice {finished.choice} ended twice in one call")
        self._finished.add(finished.choice)
        if tuple(output.tokens) != expected or finished.finish_reason != reason.value:
            self._breach(
                f"choice {finished.choice} ended with {len(output.tokens)} of {len(expected)} tokens "
                f"and {finished.finish_reason!r}, not {reason.value!r}"
            )
        if output.text != "".join(map(text_of, output.tokens)):
            self._breach(f"the text of choice {finished.choice} is {output.text!r}")
        if self._has_finished:
            self._end("finished")

    def _expected(self, choice: int) -> tuple[tuple[int, ...], FinishReason]:
        return expected_output(self.ask.prompt, self.ask.of_choice(choice))

    def _end(self, ending: str) -> None:
        self.endings.append(ending)
        self.laws.ended_at[self.ask.params.seed] = self.network.time.now
        self.network.history.note("client", f"request {self.ask.params.seed}: {ending}, {self.num_tokens} tokens")
        if len(self.endings) > 1:
            self._breach(f"has more than one ending: {', '.join(self.endings)}")

    def _breach(self, what: str) -> None:
        self.laws.breach(f"request {self.ask.params.seed}: {what}")


def text_of(token_id: int) -> str:
    return chr(0x4E00 + token_id)


@lru_cache(maxsize=1)
def character_tokenizer() -> Tokenizer:
    """The router's tokenizer over one character for every token."""
    vocabulary = {text_of(token_id): token_id for token_id in range(VOCAB_SIZE)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=text_of(0)))
    backend.decoder = tokenizers.decoders.Fuse()
    return Tokenizer(backend, eos_token_ids=frozenset({EOS}))
