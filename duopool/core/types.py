"""Ids and small values that every floor of Duopool shares.

Owns names only: nothing here decides, counts or talks to anyone.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, NewType

from msgspec import Meta

Count = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
"""A number of things, or an index among them, as it may come over the wire."""

Total = Annotated[int, Meta(ge=0, le=1 << 53)]
"""The same over a worker's whole life, or in bytes."""

Seconds = Annotated[float, Meta(ge=0.0, le=1e9)]

BlockId = NewType("BlockId", int)
"""Index of a page in one worker's KV store."""

BlockKey = NewType("BlockKey", bytes)
"""16-byte chained digest of a full block: it names the block's tokens and all tokens before it."""

RequestId = NewType("RequestId", str)
"""32 hex digits minted by the router; what a client sends as an id is only an alias."""

WorkerId = NewType("WorkerId", str)
"""A place in a pool, such as `prefill-0`; it outlives the process that fills it."""

LeaseId = NewType("LeaseId", int)
"""Random 64 bits: P's name for one promise to keep blocks readable."""

Incarnation = NewType("Incarnation", int)
"""Random 64 bits drawn at process start: tells a restarted worker from the one before it."""


class Role(StrEnum):
    """Which pool a worker belongs to."""

    PREFILL = "prefill"
    DECODE = "decode"


class FinishReason(StrEnum):
    """Why a request produced its last token, in the words of the OpenAI API."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a token that was emitted, with the most likely alternatives."""

    token_id: Count
    logprob: float
    rank: Count
    """1 for the most likely token."""
    top: tuple[tuple[Count, float], ...] = ()
    """(token id, log-probability), most likely first."""


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Copy page `source` onto page `target` before the step runs (copy-on-write)."""

    source: BlockId
    target: BlockId
