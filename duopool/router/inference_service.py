"""The `Inference` service: what a client asks becomes one life per choice, and their messages one stream.

Owns the order of checks (cheap ones first, tokenising last), and the writer. Handlers are called through `rpc.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from random import Random
from typing import Any, TypeVar

from duopool.core.config import RouterConfig
from duopool.core.errors import DeadlineMissed, InvalidRequest, ModelNotFound, Unavailable
from duopool.core.handoff.request import Phase, RequestState
from duopool.core.messages import GenerationRequest
from duopool.core.sampling_params import SamplingParams
from duopool.core.types import RequestId
from duopool.proto import inference_pb2 as pb
from duopool.proto.public_codec import chat_messages, num_choices, sampling_params
from duopool.router import admission
from duopool.router.detokenizer import Detokenizer
from duopool.router.outbox import Outbox
from duopool.router.pools import Pools
from duopool.router.request_life import ROUTE_WAIT_S, Origin, RequestLife
from duopool.router.text_stream import TextStream
from duopool.router.tokenizer import Tokenizer

Result = TypeVar("Result")

MAX_SEED = 2**63 - 1
LINGER_S = 5.0
"""A client that reads too slowly has this long to take what gRPC holds already, before its stream is cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A request that passed all checks."""

    prompt_token_ids: tuple[int, ...]
    resume_from: tuple[int, ...]
    params: SamplingParams
    num_choices: int


class InferenceService:
    def __init__(
        self,
        config: RouterConfig,
        *,
        model_id: str,
        tokenizer: Tokenizer,
        pools: Pools,
        executor: Executor,
        random: Random,
        clock: Callable[[], float] = time.monotonic,
        route_wait_s: float = ROUTE_WAIT_S,
    ) -> None:
        self._config = config
        self._model_id = model_id
        self._tokenizer = tokenizer
        self._pools = pools
        self._executor = executor
        self._random = random
        self._clock = clock
        self._route_wait_s = route_wait_s
        self._admission = admission.Admission(config.max_num_requests)

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:
        time_left_s = context.time_remaining()
        deadline = None if time_left_s is None else self._clock() + time_left_s
        self._check_model(request.model)
        count = num_choices(request.sampling)
        admission.check_choices(count)
        with self._admission.admit(count):
            asked = await self._read(request)
            await self._serve(request, asked, context, deadline)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        self._check_model(request.model)
        special = request.add_special_tokens if request.HasField("add_special_tokens") else True
        limits = self._limits()
        token_ids = await self._encode(request, limits, add_special_tokens=special)
        return pb.TokenizeResponse(token_ids=token_ids, max_model_len=limits.max_model_len)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:
        self._check_model(request.model)
        token_ids = list(request.token_ids)
        admission.check_token_ids("token_ids", token_ids, self._limits())
        return pb.DetokenizeResponse(text=await self._off_loop(self._tokenizer.decode, token_ids))

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        if not self._pools.members:
            return pb.ListModelsResponse(models=[pb.Model(id=self._model_id)])
        limits = self._limits()
        model = pb.Model(id=self._model_id, max_model_len=limits.max_model_len, vocab_size=limits.vocab_size)
        return pb.ListModelsResponse(models=[model])

    # ---- reading a request ------------------------------------------------------------------------------------------

    async def _read(self, request: pb.GenerateRequest) -> _Asked:
        params = sampling_params(request.sampling, seed=self._random.randint(0, MAX_SEED))
        params.check()
        admission.check_names(cache_salt=request.cache_salt, request_id=request.request_id)
        limits = self._limits()
        admission.check_bias(params, limits)
        count = num_choices(request.sampling)
        resume_from = tuple(request.resume_from.ids)
        if resume_from and count > 1:
            raise InvalidRequest("resume_from", f"works with n = 1 only, got n = {count}")
        if len(resume_from) > params.max_tokens:
            raise InvalidRequest("resume_from", f"has {len(resume_from)} tokens, max_tokens is {params.max_tokens}")
        admission.check_token_ids("resume_from", resume_from, limits)
        field = request.WhichOneof("prompt")
        if field is None:
            raise InvalidRequest("prompt", "one of text, chat and token_ids must be set")
        if field == "token_ids":
            token_ids = tuple(request.token_ids.ids)
            admission.check_length(field, len(token_ids), params, limits)
            admission.check_token_ids(field, token_ids, limits)
        else:
            token_ids = tuple(await self._encode(request, limits, add_special_tokens=True))
            admission.check_length(field, len(token_ids), params, limits)
        return _Asked(prompt_token_ids=token_ids, resume_from=resume_from, params=params, num_choices=count)

    async def _encode(
        self, request: pb.GenerateRequest | pb.TokenizeRequest, limits: admission.Limits, *, add_special_tokens: bool
    ) -> list[int]:
        """Ids of a prompt in text or messages, made off the event loop."""
        tokenizer = self._tokenizer
        most = tokenizer.max_token_chars
        match request.WhichOneof("prompt"):
            case "text":
                text = request.text
                admission.check_text("text", len(text), limits, max_token_chars=most)
                return await self._off_loop(lambda: tokenizer.encode(text, add_special_tokens=add_special_tokens))
            case "chat":
                messages = chat_messages(request.chat)
                num_chars = sum(len(message["content"]) for message in messages)
                admission.check_text("chat.messages", num_chars, limits, max_token_chars=most)
                return await self._off_loop(tokenizer.encode_chat, messages)
            case _:
                raise InvalidRequest("prompt", "one of text and chat must be set")

    def _check_model(self, name: str) -> None:
        if name and name != self._model_id:
            raise ModelNotFound(f"model {name[:128]!r} is not served; {self._model_id!r} is")

    def _limits(self) -> admission.Limits:
        members = self._pools.members
        if not members:
            raise Unavailable("no worker has joined yet")
        return admission.Limits.of(members)

    async def _off_loop(self, work: Callable[..., Result], *arguments: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work, *arguments)

    # ---- serving it -------------------------------------------------------------------------------------------------

    async def _serve(self, request: pb.GenerateRequest, asked: _Asked, context: Any, deadline: float | None) -> None:
        outbox = Outbox(self._config.max_unread_tokens, num_choices=asked.num_choices)
        lives = [self._life(request, asked, outbox, choice, deadline) for choice in range(asked.num_choices)]
        loop = asyncio.get_running_loop()
        timers = []
        if deadline is not None:
            timers.append(loop.call_later(max(0.0, deadline - self._clock()), _miss_deadline, lives))
        outbox.on_overflow = _cut_after(LINGER_S, timers)
        try:
            for life in lives:
                life.start()
            while (item := await outbox.take()) is not None:
                message, num_tokens = item
                await context.write(message)
                outbox.written(num_tokens)
        except asyncio.CancelledError:
            if outbox.error is None:
                raise
            raise outbox.error from None  # cut off in a write
        finally:
            for timer in timers:
                timer.cancel()
            for life in lives:
                life.stop(Phase.CANCELLED)

    def _life(
        self, request: pb.GenerateRequest, asked: _Asked, outbox: Outbox, choice: int, deadline: float | None
    ) -> RequestLife:
        tokenizer = self._tokenizer
        request_id = RequestId(f"{self._random.getrandbits(128):032x}")
        params = replace(asked.params, seed=_seed_of(asked.params.seed, choice))
        detokenizer = Detokenizer(
            tokenizer.decode, special_ids=tokenizer.special_ids, prompt_token_ids=asked.prompt_token_ids
        )
        generation = GenerationRequest(
            request_id=request_id,
            prompt_token_ids=asked.prompt_token_ids,
            output_token_ids=asked.resume_from,
            params=params,
            cache_salt=request.cache_salt,
        )
        return RequestLife(
            RequestState(request=generation, output=asked.resume_from, retries_left=self._config.handoff.max_retries),
            Origin(
                name=request.request_id or request_id,
                choice=choice,
                deadline=deadline,
                route_wait_s=self._route_wait_s,
            ),
            text=TextStream(detokenizer, params),
            tokenizer=tokenizer,
            pools=self._pools,
            outbox=outbox,
            clock=self._clock,
        )


def _seed_of(seed: int, choice: int) -> int:
    """`seed + choice`, kept within 64 bits."""
    return (seed + choice + 2**63) % 2**64 - 2**63


def _miss_deadline(lives: Sequence[RequestLife]) -> None:
    for life in lives:
        life.stop(Phase.FAILED, DeadlineMissed("the deadline passed before the request finished"))


def _cut_after(linger_s: float, timers: list[asyncio.TimerHandle]) -> Callable[[], None]:
    """End the calling task if the client still does not read: a write that gRPC cannot place would wait for ever."""
    task = asyncio.current_task()

    def cut() -> None:
        if task is not None:
            timers.append(asyncio.get_running_loop().call_later(linger_s, task.cancel))

    return cut
