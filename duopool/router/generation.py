"""What every face of the router does for its callers: checks, tokenising, and one life per choice of a call.

gRPC and HTTP make an `Ask` of what came in, and write out the messages of a `Stream` in their own form. Owns the order
of checks (cheap ones first, tokenising last) and the end of a call whose client went away or reads too slowly.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from random import Random
from typing import TypeVar

import msgspec

from duopool.core.config import RouterConfig
from duopool.core.errors import DeadlineMissed, InvalidRequest, ModelNotFound, Unavailable
from duopool.core.handoff.request import Phase, RequestState
from duopool.core.messages import Choice, GenerationRequest
from duopool.core.sampling_params import SamplingParams
from duopool.core.types import RequestId
from duopool.router import admission
from duopool.router.ask import Ask, ChatPrompt, Prompt, TextPrompt, TokenPrompt
from duopool.router.choices import carrier_of
from duopool.router.delivery import Delivery
from duopool.router.detokenizer import Detokenizer
from duopool.router.guide import GuideCompiler
from duopool.router.outbox import Outbox
from duopool.router.pools import Pools
from duopool.router.request_life import ROUTE_WAIT_S, Audience, RequestLife
from duopool.router.text_stream import TextStream
from duopool.router.tokenizer import Tokenizer
from duopool.router.waiting_room import Place, WaitingRoom
from duopool.router.watch import NOBODY, Watch

Result = TypeVar("Result")

MAX_SEED = 2**63 - 1
LINGER_S = 5.0
"""A client that reads too slowly has this long to take what the transport holds already, before its stream is cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """A call under way: take messages from `outbox` until it gives None, and tell it what was written."""

    outbox: Outbox
    prompts: tuple[tuple[int, ...], ...]
    """Token ids of each prompt. Choice `c` of prompt `p` has the number `p * num_choices + c`."""


class Generation:
    """One served model behind its two pools."""

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
        watch: Watch = NOBODY,
    ) -> None:
        self.model_id = model_id
        self.tokenizer = tokenizer
        self.pools = pools
        self._config = config
        self._executor = executor
        self._random = random
        self._clock = clock
        self._route_wait_s = route_wait_s
        self._watch = watch
        self._admission = admission.Admission(config.max_num_requests)
        self._room = WaitingRoom(
            max_num_tokens=config.max_num_waiting_tokens, max_wait_s=config.max_wait_s, clock=clock
        )
        self._guides = GuideCompiler(tokenizer)

    @asynccontextmanager
    async def open(self, ask: Ask, *, time_left_s: float | None = None) -> AsyncIterator[Stream]:
        """Check the call and start its lives; they are stopped when the block is left.

        Raises the error that the client is to get: before the block for what was asked, and out of the block when the
        calling task was cancelled because the client left too many tokens unread.
        """
        deadline = None if time_left_s is None else self._clock() + time_left_s
        self.check_model(ask.model)
        admission.check_prompts(len(ask.prompts))
        admission.check_choices(ask.num_choices)
        num_lives = len(ask.prompts) * ask.num_choices
        admission.check_priority(ask.priority)
        self.check_room(ask.params.max_tokens, time_left_s=time_left_s, priority=ask.priority)
        with self._admission.admit(num_lives):
            params = ask.params
            if ask.takes_all_room:
                params = replace(params, max_tokens=max(1, params.min_tokens))
            prompts = await self._read(ask, params)
            if ask.guide is not None:
                grammar = await self._off_loop(self._guides.compile, ask.guide)
                ask = replace(ask, params=replace(ask.params, grammar=grammar))
            outbox = Outbox(self._config.max_unread_tokens, num_choices=num_lives, clock=self._clock)
            # The choices of a prompt wait for it together.
            sizes = [len(prompt) * (choice == 0) for prompt in prompts for choice in range(ask.num_choices)]
            with self._room.enter(
                sizes, max_tokens=ask.params.max_tokens, time_left_s=time_left_s, priority=ask.priority
            ) as places:
                lives: list[RequestLife] = []
                for place, prompt in enumerate(prompts):
                    first = place * ask.num_choices
                    numbered = dict(enumerate(places[first : first + ask.num_choices], first))
                    lives += self._lives(ask, prompt, outbox, numbered, deadline=deadline)
                async with self._running(lives, outbox, deadline):
                    yield Stream(outbox=outbox, prompts=prompts)

    async def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt, made off the event loop; refuses a text that can never fit before making them."""
        tokenizer, limits = self.tokenizer, self.limits()
        most = tokenizer.max_token_chars
        match prompt:
            case TokenPrompt(token_ids=token_ids):
                admission.check_token_ids(prompt.field, token_ids, limits)
                return token_ids
            case TextPrompt(text=text, add_special_tokens=special):
                admission.check_text(prompt.field, len(text), limits, max_token_chars=most)
                return tuple(await self._off_loop(lambda: tokenizer.encode(text, add_special_tokens=special)))
            case ChatPrompt():
                admission.check_count(prompt.field, len(prompt.messages), limits)
                admission.check_text(prompt.field, prompt.num_chars, limits, max_token_chars=most)
                return tuple(
                    await self._off_loop(
                        lambda: tokenizer.encode_chat(prompt.messages, tools=prompt.tools, field=prompt.field)
                    )
                )

    async def decode(self, token_ids: Sequence[int], *, field: str) -> str:
        limits = self.limits()
        admission.check_count(field, len(token_ids), limits)
        admission.check_token_ids(field, token_ids, limits)
        return await self._off_loop(self.tokenizer.decode, token_ids)

    def check_model(self, name: str) -> None:
        """ModelNotFound unless `name` is empty or the model that is served."""
        if name and name != self.model_id:
            raise ModelNotFound(f"model {name[:128]!r} is not served; {self.model_id!r} is")

    def check_room(self, max_tokens: int, *, time_left_s: float | None, priority: int) -> None:
        """Overloaded if a prompt of any length would be refused now: faces may ask before they read what came in."""
        self._room.check(max_tokens=max_tokens, time_left_s=time_left_s, priority=priority)

    def limits(self) -> admission.Limits:
        """Unavailable as long as nobody can tell."""
        members = self.pools.members
        if not members:
            raise Unavailable("no worker has joined yet")
        return admission.Limits.of(members)

    def draw_seed(self) -> int:
        return self._random.randint(0, MAX_SEED)

    def draw_id(self) -> str:
        return f"{self._random.getrandbits(128):032x}"

    # ---- reading a request ------------------------------------------------------------------------------------------

    async def _read(self, ask: Ask, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """Token ids of each prompt, all checks passed."""
        params.check()
        admission.check_names(cache_salt=ask.cache_salt, request_id=ask.request_id)
        limits = self.limits()
        admission.check_bias(params, limits)
        for place, token_ids in enumerate(ask.resume_from):
            field = "resume_from" if ask.num_choices == 1 else f"resume_choices[{place}]"
            if len(token_ids) > params.max_tokens:
                raise InvalidRequest(field, f"has {len(token_ids)} tokens, max_tokens is {params.max_tokens}")
            admission.check_token_ids(field, token_ids, limits)
        return tuple([await self._read_prompt(prompt, params, limits) for prompt in ask.prompts])

    async def _read_prompt(self, prompt: Prompt, params: SamplingParams, limits: admission.Limits) -> tuple[int, ...]:
        if isinstance(prompt, TokenPrompt):
            admission.check_length(prompt.field, len(prompt.token_ids), params, limits)
            return await self.encode(prompt)
        token_ids = await self.encode(prompt)
        admission.check_length(prompt.field, len(token_ids), params, limits)
        return token_ids

    async def _off_loop(self, work: Callable[..., Result], *arguments: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work, *arguments)

    # ---- serving it -------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _running(
        self, lives: Sequence[RequestLife], outbox: Outbox, deadline: float | None
    ) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        timers = []
        if deadline is not None:
            timers.append(loop.call_later(max(0.0, deadline - self._clock()), _miss_deadline, lives))
        outbox.on_overflow = _cut_after(LINGER_S, timers)
        try:
            for life in lives:
                life.start()
            yield
        except asyncio.CancelledError:
            if outbox.error is None:
                raise
            raise outbox.error from None  # cut off in a write
        finally:
            for timer in timers:
                timer.cancel()
            for life in lives:
                life.stop(Phase.CANCELLED)

    def _lives(
        self,
        ask: Ask,
        prompt_token_ids: tuple[int, ...],
        outbox: Outbox,
        places: Mapping[int, Place],
        *,
        deadline: float | None,
    ) -> list[RequestLife]:
        """The choices of one prompt, by their numbers in the call; several have a carrier, which comes last."""
        params = ask.params
        if ask.takes_all_room:
            params = replace(params, max_tokens=self.limits().longest - len(prompt_token_ids))
        carrier = GenerationRequest(
            request_id=RequestId(self.draw_id()),
            prompt_token_ids=prompt_token_ids,
            params=params,
            cache_salt=ask.tenant.salt(ask.cache_salt),
            priority=ask.priority,
            choices=tuple(
                Choice(RequestId(self.draw_id()), _seed_of(params.seed, number)) for number in range(len(places))
            ),
        )
        # Outputs that were resumed have parted already.
        is_alone = len(places) == 1 or bool(ask.resume_from)
        lives = [
            self._life(
                ask,
                msgspec.structs.replace(request, output_token_ids=resumed),
                outbox,
                place,
                choice=choice,
                deadline=deadline,
                phase=Phase.ADMITTED if is_alone else Phase.CARRIED,
            )
            for request, resumed, (choice, place) in zip(
                carrier.outputs, ask.resume_from or ((),) * len(places), places.items(), strict=True
            )
        ]
        if is_alone:
            return lives
        return [*lives, carrier_of(lives, lambda audience: self._shell(carrier, audience, deadline=deadline))]

    def _life(
        self,
        ask: Ask,
        request: GenerationRequest,
        outbox: Outbox,
        place: Place,
        *,
        choice: int,
        deadline: float | None,
        phase: Phase,
    ) -> RequestLife:
        tokenizer = self.tokenizer
        detokenizer = Detokenizer(
            tokenizer.decode, special_ids=tokenizer.special_ids, prompt_token_ids=request.prompt_token_ids
        )
        delivery = Delivery(
            request,
            name=ask.request_id or request.request_id,
            choice=choice,
            text=TextStream(detokenizer, request.params),
            tokenizer=tokenizer,
            outbox=outbox,
            place=place,
            watch=self._watch,
            traceparent=ask.traceparent,
            clock=self._clock,
        )
        return self._shell(request, delivery, deadline=deadline, phase=phase)

    def _shell(
        self,
        request: GenerationRequest,
        audience: Audience,
        *,
        deadline: float | None,
        phase: Phase = Phase.ADMITTED,
    ) -> RequestLife:
        return RequestLife(
            RequestState(
                request=request,
                phase=phase,
                output=request.output_token_ids,
                retries_left=self._config.handoff.max_retries,
            ),
            audience,
            pools=self.pools,
            deadline=deadline,
            route_wait_s=self._route_wait_s,
            clock=self._clock,
        )


def _seed_of(seed: int, choice: int) -> int:
    """`seed + choice`, kept within 64 bits."""
    return (seed + choice + 2**63) % 2**64 - 2**63


def _miss_deadline(lives: Sequence[RequestLife]) -> None:
    for life in lives:
        life.stop(Phase.FAILED, DeadlineMissed("the deadline passed before the request finished"))


def _cut_after(linger_s: float, timers: list[asyncio.TimerHandle]) -> Callable[[], None]:
    """End the calling task if the client still does not read: a write that finds no room would wait for ever."""
    task = asyncio.current_task()

    def cut() -> None:
        if task is not None:
            timers.append(asyncio.get_running_loop().call_later(linger_s, task.cancel))

    return cut
