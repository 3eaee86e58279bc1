"""What whoever watches the router is told of requests: metrics, the live page, traces.

Owns the values and the interface. A request tells its watch three things: that it began, every time it showed tokens,
and, exactly once, its whole record at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from duopool.core.handoff.request import Phase
from duopool.core.types import RequestId
from duopool.proto import inference_pb2 as pb


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """One choice of one call, as it stood at one moment; of an ended one, its whole story."""

    request_id: RequestId
    name: str
    """The request's id as the client sees it."""
    traceparent: str
    """W3C trace context of the caller; empty if it gave none."""
    at: float
    """The moment, on the router's clock; of an ended one, its end."""
    phase: Phase
    finish_reason: str
    """`stop` or `length` of a request that is done, else `abort` or `error`; empty before the end."""
    error: str
    """Name of the error's type; empty when there was none."""
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    """Without those of an earlier stream that was resumed."""
    max_tokens: int
    attempts: int
    prefill_worker: str
    decode_worker: str
    times: pb.StageTimes


class Watch(Protocol):
    """Called on the router's event loop; must not wait and must not raise."""

    def began(self) -> None: ...

    def shown(self, num_tokens: int, interval_s: float, *, is_first: bool) -> None:
        """Tokens went to the client, `interval_s` after the ones before (after the beginning, if first)."""
        ...

    def ended(self, record: RequestRecord) -> None: ...


class Watches:
    """Several watches as one."""

    def __init__(self, watches: Sequence[Watch] = ()) -> None:
        self._watches = tuple(watches)

    def began(self) -> None:
        for watch in self._watches:
            watch.began()

    def shown(self, num_tokens: int, interval_s: float, *, is_first: bool) -> None:
        for watch in self._watches:
            watch.shown(num_tokens, interval_s, is_first=is_first)

    def ended(self, record: RequestRecord) -> None:
        for watch in self._watches:
            watch.ended(record)


NOBODY = Watches()
