"""Where one request's time went, as the router saw it and as workers told it.

Owns the moments and the sums; knows no clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from duopool.proto import inference_pb2 as pb


@dataclass(slots=True, kw_only=True)
class StageTimes:
    """Moments on the router's clock, and what workers measured themselves."""

    began_at: float
    routed_at: float | None = None
    reserved_at: float | None = None
    ready_at: float | None = None
    joined_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    worker_queue_s: float = 0.0
    prefill_s: float = 0.0
    transfer_s: float = 0.0
    num_pulled_blocks: int = 0
    num_pulled_bytes: int = 0
    num_tokens: int = 0

    def as_message(self, now: float) -> pb.StageTimes:
        return pb.StageTimes(
            queue_s=_between(self.began_at, self.routed_at) + self.worker_queue_s,
            prefill_s=self.prefill_s,
            transfer_s=self.transfer_s,
            transfer_bytes=self.num_pulled_bytes,
            transfer_blocks=self.num_pulled_blocks,
            handover_s=_between(self.ready_at, self.joined_at),
            time_to_first_token_s=_between(self.began_at, self.first_token_at),
            decode_s=_between(self.first_token_at, self.last_token_at),
            total_s=now - self.began_at,
        )


def _between(start: float | None, end: float | None) -> float:
    return 0.0 if start is None or end is None else max(0.0, end - start)
