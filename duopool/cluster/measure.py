"""Numbers from the records of a burst, and medians over runs. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from duopool.cluster.completions import Completion


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One burst. Times in milliseconds."""

    requests: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    ttft_p50_ms: float
    ttft_max_ms: float
    inter_token_p50_ms: float
    inter_token_p99_ms: float
    output_tokens_per_s: float
    """Output tokens of all requests over the time from the first send to the last token."""
    handover_p50_ms: float
    """From the end of the last prefill chunk until the request was in the decode batch; NaN without a handover."""
    handover_per_decode_step: float
    """Median handover over the median time between tokens."""
    transfer_mb: float


def measure(records: Sequence[Completion]) -> Measurement:
    """Raises ValueError if a request did not finish."""
    finished = [record.finished for record in records if record.finished is not None]
    if len(finished) < len(records):
        raise ValueError(f"{len(records) - len(finished)} of {len(records)} requests did not finish")
    gaps = [gap for record in records for gap in record.inter_token_s]
    handovers = [end.times.handover_s for end in finished if end.times.transfer_blocks > 0]
    handover_s = statistics.median(handovers) if handovers else math.nan
    duration_s = max(record.arrivals[-1] for record in records) - min(record.sent_at for record in records)
    num_tokens = sum(len(record.token_ids) for record in records)
    first_s = [record.time_to_first_token_s for record in records]
    step_s = percentile(gaps, 50)
    return Measurement(
        requests=len(records),
        prompt_tokens=sum(end.usage.prompt_tokens for end in finished),
        cached_tokens=sum(end.usage.cached_tokens for end in finished),
        output_tokens=num_tokens,
        ttft_p50_ms=1e3 * statistics.median(first_s),
        ttft_max_ms=1e3 * max(first_s),
        inter_token_p50_ms=1e3 * step_s,
        inter_token_p99_ms=1e3 * percentile(gaps, 99),
        output_tokens_per_s=num_tokens / duration_s,
        handover_p50_ms=1e3 * handover_s,
        handover_per_decode_step=handover_s / step_s,
        transfer_mb=sum(end.times.transfer_bytes for end in finished) / 1e6,
    )


def median_of(runs: Sequence[Measurement]) -> Measurement:
    """The median of each number."""
    rows = [asdict(run) for run in runs]
    return Measurement(**{name: statistics.median(row[name] for row in rows) for name in rows[0]})


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest rank; NaN without values."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]
