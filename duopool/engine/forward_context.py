"""What the attention function must know about the current batch and cannot get through the model.

Some model families drop unknown keyword arguments on the way to their attention, so the batch travels beside the call.
One context per thread of control: two runners in one process do not see each other's batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from duopool.engine.kv_layout import LayerShape
from duopool.engine.kv_store import KVStore


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedContext:
    """A batch over a KV store. B requests, T tokens, M most blocks of a request."""

    store: KVStore
    slots_T: Tensor
    """int64: where each token's key and value go."""
    block_tables_BM: Tensor
    """int32"""
    query_starts: Tensor
    """int32 [B + 1]"""
    kv_lengths: Tensor
    """int32 [B], the tokens of this step included"""


@dataclass(slots=True)
class SeenAttention:
    """How one layer called the attention function."""

    shape: LayerShape
    dtype: torch.dtype
    window: int | None
    is_causal: bool


@dataclass(slots=True)
class RecordingContext:
    """Notes how the model calls attention, to size the store; the outputs of such a run mean nothing."""

    seen: list[tuple[int, SeenAttention]] = field(default_factory=list)
    """(layer index, call), in the order of the calls."""


_current: ContextVar[PagedContext | RecordingContext | None] = ContextVar("forward_context", default=None)


def current_context() -> PagedContext | RecordingContext:
    context = _current.get()
    if context is None:
        raise RuntimeError("the model ran outside a forward context")
    return context


@contextmanager
def forward_context(context: PagedContext | RecordingContext) -> Iterator[None]:
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)
