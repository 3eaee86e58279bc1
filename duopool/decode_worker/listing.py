"""Judges what another worker lists for a request: a listing that cannot be is refused before anything of it is read."""

from __future__ import annotations

from duopool.core.messages import BlocksReady, NackReason, Tokens
from duopool.decode_worker.decode_request import DecodeRequest
from duopool.engine.served_model import Refusal, ServedModel


def refusal(message: BlocksReady, request: DecodeRequest, *, model: ServedModel, num_wanted: int) -> Refusal | None:
    """Why the listing is not taken; None if it is.

    `num_wanted` blocks hold the prefix with the output that is listed. A request that moves here grows meanwhile: until
    its last listing more blocks may come than its output so far explains.
    """
    if not _can_be(message, request, model):
        return Refusal(NackReason.INTERNAL, "a block or a token that cannot be")
    num_listed = message.num_listed
    is_last = message.first_token is not None
    may_grow = request.slot is not None and request.slot.is_moving and not is_last
    if (num_listed > num_wanted and not may_grow) or (is_last and num_listed != num_wanted):
        return Refusal(NackReason.TRANSFER_FAILED, f"{num_listed} blocks for a prefix of {num_wanted}")
    return None


def _can_be(message: BlocksReady, request: DecodeRequest, model: ServedModel) -> bool:
    """Whether blocks and tokens are such as a worker lists for this request."""
    if message.first_token is None:
        firsts: tuple[Tokens, ...] = ()
    else:
        firsts = message.first_tokens if request.request.choices else (message.first_token,)
        if len(firsts) != request.num_sequences or any(len(first.token_ids) != 1 for first in firsts):
            return False
    told = (*message.output, *(token_id for first in firsts for token_id in first.token_ids))
    return message.first_block >= 0 and model.knows(told)
