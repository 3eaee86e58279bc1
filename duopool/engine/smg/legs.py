"""What a `Generate` call does on a worker of each role, in the commands that our own router would send.

`PrefillLeg` answers with a handle and keeps its lease; `DecodeLeg` takes a handle over, or computes the prompt itself.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from msgspec import structs

from duopool.core.errors import DeadlineMissed, DuopoolError, InvalidRequest, Overloaded, PromptTooLong, Unavailable
from duopool.core.messages import BlocksReady, GenerationRequest, Nack, NackReason, Prefill, Reserve, Reserved, Tokens
from duopool.core.sampling_params import SamplingParams
from duopool.engine.served_model import ServedModel
from duopool.engine.smg.asked import PROMPT_FIELD, Asked
from duopool.engine.smg.exchange import Exchange, Line
from duopool.engine.smg.handle import Handle, HandleSeal
from duopool.engine.smg.reply import Reply

CACHE_SALT = b"smg"
"""The gateway's requests share cached prefixes with each other, and with no tenant of our router."""
WORTHLESS_HANDLE = (NackReason.LEASE_LOST, NackReason.TRANSFER_FAILED)

Write = Callable[[Any], Awaitable[None]]
Leg = Callable[[Asked, float | None, Write], Awaitable[None]]
"""Serves a request that has so many seconds left and writes its messages. Raises DuopoolError."""


class _HandleLost(Exception):
    """The blocks of a handle could not be had any more; nothing is held for it."""


class PrefillLeg:
    """`Generate` on a prefill worker."""

    def __init__(self, exchange: Exchange, seal: HandleSeal) -> None:
        self._exchange = exchange
        self._seal = seal

    async def __call__(self, asked: Asked, deadline_s: float | None, write: Write) -> None:
        if asked.params.max_tokens != 1:
            limit = f"must be 1 on a prefill worker, got {asked.params.max_tokens}"
            raise InvalidRequest("sampling_params.max_tokens", limit)
        # Whether the first token is also the last is judged by the decode worker, which knows what the client wants.
        params = replace(asked.params, max_tokens=2, min_tokens=0, ignore_eos=True, stop_token_ids=())
        with self._exchange.open(asked.alias) as line:
            request = _request(asked, params, line)
            line.send((Prefill(request=request, attempt=1, deadline_s=deadline_s),))
            handle = await self._handle(line, asked)
            self._exchange.hold(handle.lease.lease_id)
            line.is_over = True
        reply = Reply(prompt_token_ids=asked.prompt_token_ids, num_cached_tokens=handle.num_cached_tokens)
        await write(reply.prefilled(handle.first_token, self._seal.to_json(handle)))

    async def _handle(self, line: Line, asked: Asked) -> Handle:
        blocks: list[Any] = []
        while True:
            match await line.next():
                case Nack() as nack:
                    raise _error_of(nack)
                case BlocksReady() as ready:
                    blocks += ready.blocks
                    if ready.first_token is not None:
                        return Handle(
                            prompt_digest=self._seal.digest_of(asked.prompt_token_ids),
                            lease=ready.lease,
                            blocks=tuple(blocks),
                            first_token=ready.first_token,
                            seed=asked.params.seed,
                            num_cached_tokens=ready.num_cached_tokens,
                        )


class DecodeLeg:
    """`Generate` on a decode worker."""

    def __init__(self, exchange: Exchange, seal: HandleSeal, model: ServedModel) -> None:
        self._exchange = exchange
        self._seal = seal
        self._model = model

    async def __call__(self, asked: Asked, deadline_s: float | None, write: Write) -> None:
        handle = self._seal.from_json(asked.transfer_json, asked.prompt_token_ids) if asked.transfer_json else None
        params = asked.params if handle is None or asked.has_seed else replace(asked.params, seed=handle.seed)
        reply = Reply(prompt_token_ids=asked.prompt_token_ids, is_stream=asked.is_stream)
        first = None if handle is None else self._first_token(handle, params, asked)
        if handle is not None and first is not None:
            reply.num_cached_tokens = handle.num_cached_tokens
            for message in reply.take(first):
                await write(message)
            if first.finish_reason is not None:
                return
        with self._exchange.open(asked.alias) as line:
            if handle is not None and first is not None:
                line.send(
                    (
                        Reserve(request=_request(asked, params, line), attempt=1, deadline_s=deadline_s),
                        BlocksReady(
                            request_id=line.request_id,
                            attempt=1,
                            lease=handle.lease,
                            first_block=0,
                            blocks=handle.blocks,
                            first_token=structs.replace(first, request_id=line.request_id, attempt=1),
                        ),
                    )
                )
                try:
                    await self._stream(line, 1, reply, write)
                    return
                except _HandleLost:
                    pass
            request = _request(asked, params, line, output=tuple(reply.token_ids))
            line.send((Reserve(request=request, attempt=2, local_prefill=True, deadline_s=deadline_s),))
            await self._stream(line, 2, reply, write)

    def _first_token(self, handle: Handle, params: SamplingParams, asked: Asked) -> Tokens | None:
        """The prefill worker's token, judged by what the client wants; None if the client forbids it at this place."""
        (token_id,) = handle.first_token.token_ids
        if params.min_tokens > 0 and token_id in (*self._model.eos_token_ids, *params.stop_token_ids):
            return None
        ending = self._model.ending(
            params,
            token_id,
            num_output_tokens=1,
            num_tokens=len(asked.prompt_token_ids) + 1,
            max_tokens=self._model.max_model_len,
        )
        return structs.replace(
            handle.first_token,
            finish_reason=None if ending is None else ending.reason,
            stop_token_id=None if ending is None else ending.stop_token_id,
        )

    async def _stream(self, line: Line, attempt: int, reply: Reply, write: Write) -> None:
        """Write what the worker says of this attempt until the request's end."""
        while True:
            event = await line.next()
            match event:
                case Nack() if event.attempt == attempt:
                    if attempt == 1 and event.reason in WORTHLESS_HANDLE:
                        raise _HandleLost
                    raise _error_of(event)
                case Reserved() if event.attempt == attempt and not reply.token_ids:
                    reply.num_cached_tokens = event.num_cached_tokens
                case Tokens() if event.attempt == attempt and event.index == len(reply.token_ids):
                    line.is_over = event.finish_reason is not None
                    for message in reply.take(event):
                        await write(message)
                    if line.is_over:
                        return


def _request(asked: Asked, params: SamplingParams, line: Line, output: tuple[int, ...] = ()) -> GenerationRequest:
    return GenerationRequest(
        request_id=line.request_id,
        prompt_token_ids=asked.prompt_token_ids,
        output_token_ids=output,
        params=params,
        cache_salt=CACHE_SALT,
    )


def _error_of(nack: Nack) -> DuopoolError:
    match nack.reason:
        case NackReason.BUSY:
            return Overloaded(nack.detail, retry_after_s=nack.retry_after_s)
        case NackReason.TOO_LARGE:
            return PromptTooLong(PROMPT_FIELD, nack.detail)
        case NackReason.DEADLINE:
            return DeadlineMissed(nack.detail)
        case NackReason.INTERNAL:
            return DuopoolError(nack.detail)
        case _:
            return Unavailable(f"{nack.reason}: {nack.detail}")
