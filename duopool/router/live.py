"""What the live page shows: the pools, transfers under way, recent requests and the prefix tree, as plain JSON values.

Owns a short memory of what has happened. Prompts and outputs never come here, nor do the names that clients gave.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from duopool import __version__
from duopool.core.handoff.request import Phase
from duopool.core.messages import WorkerInfo, WorkerLoad
from duopool.router.prefix_index import PrefixRun
from duopool.router.watch import RequestRecord

NUM_RECENT = 60
NUM_RUNS = 40
WINDOW_S = 10.0
"""Rates and percentiles are over this long."""
MAX_INTERVALS = 20_000


class Living(Protocol):
    @property
    def is_carrier(self) -> bool: ...

    def record(self) -> RequestRecord: ...


class Scene(Protocol):
    """The pools, as far as the page needs them."""

    @property
    def lives(self) -> Sequence[Living]: ...

    def worker_states(self) -> list[tuple[WorkerInfo, str, WorkerLoad]]: ...

    def prefix_runs(self) -> list[PrefixRun]: ...


class LiveView:
    """A watch of requests that can draw up the whole scene at any moment."""

    def __init__(self, scene: Scene, *, model_id: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._scene = scene
        self._model_id = model_id
        self._clock = clock
        self._recent: deque[RequestRecord] = deque(maxlen=NUM_RECENT)
        self._shown: deque[tuple[float, int, float, bool]] = deque(maxlen=MAX_INTERVALS)
        """Moment, tokens, interval, whether these were the first."""

    # ---- Watch ------------------------------------------------------------------------------------------------------

    def began(self) -> None:
        return None

    def shown(self, num_tokens: int, interval_s: float, *, is_first: bool) -> None:
        self._shown.append((self._clock(), num_tokens, interval_s, is_first))

    def ended(self, record: RequestRecord) -> None:
        self._recent.append(record)

    # ---- the scene --------------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """Everything at this moment. Times are seconds before now, so that no clock need agree with another."""
        lives = self._scene.lives
        alive = [life.record() for life in lives if not life.is_carrier]
        now = self._clock()
        return {
            "model": self._model_id,
            "version": __version__,
            "rates": self._rates(now, len(alive)),
            "workers": [_worker(*state) for state in self._scene.worker_states()],
            "transfers": _transfers([life.record() for life in lives]),
            "requests": [_request(record, now) for record in [*self._recent, *alive][-NUM_RECENT:]],
            "prefixes": _prefixes(self._scene.prefix_runs()),
        }

    def _rates(self, now: float, num_alive: int) -> dict[str, Any]:
        while self._shown and self._shown[0][0] < now - WINDOW_S:
            self._shown.popleft()
        first = sorted(interval for _, _, interval, is_first in self._shown if is_first)
        later = sorted(interval for _, _, interval, is_first in self._shown if not is_first)
        ended = [record for record in self._recent if record.at >= now - WINDOW_S]
        num_prompt_tokens = sum(record.num_prompt_tokens for record in ended)
        return {
            "alive": num_alive,
            "tokens_per_s": sum(tokens for _, tokens, _, _ in self._shown) / WINDOW_S,
            "first_token_p50_s": _quantile(first, 0.5),
            "between_tokens_p50_s": _quantile(later, 0.5),
            "between_tokens_p99_s": _quantile(later, 0.99),
            "cache_hit_rate": (
                sum(record.num_cached_tokens for record in ended) / num_prompt_tokens if num_prompt_tokens else None
            ),
        }


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


def _worker(info: WorkerInfo, state: str, load: WorkerLoad) -> dict[str, Any]:
    return {
        "id": info.worker_id,
        "role": info.role,
        "state": state,
        "blocks": load.num_blocks or info.num_blocks,
        "free": load.num_free_blocks,
        "cached": load.num_cached_blocks,
        "running": load.num_running,
        "waiting": load.num_waiting,
        "pending_tokens": load.num_pending_tokens,
        "leases": load.num_leases,
        "step_s": load.step_s,
    }


def _transfers(alive: Sequence[RequestRecord]) -> list[dict[str, Any]]:
    """Blocks on their way, by edge between two workers."""
    edges = Counter(
        (record.prefill_worker, record.decode_worker)
        for record in alive
        if record.phase in (Phase.PREFILLING, Phase.LEASED, Phase.READING) and record.prefill_worker
    )
    return [{"from": source, "to": target, "requests": number} for (source, target), number in edges.items()]


def _request(record: RequestRecord, now: float) -> dict[str, Any]:
    times = record.times
    return {
        "id": record.request_id[:8],
        "phase": record.phase.value,
        "end": record.finish_reason,
        "error": record.error,
        "began_s_ago": now - record.at + times.total_s,
        "total_s": times.total_s,
        "queue_s": times.queue_s,
        "prefill_s": times.prefill_s,
        "first_token_s": times.time_to_first_token_s,
        "transfer_s": times.transfer_s,
        "handover_s": times.handover_s,
        "decode_s": times.decode_s,
        "prompt_tokens": record.num_prompt_tokens,
        "cached_tokens": record.num_cached_tokens,
        "output_tokens": record.num_output_tokens,
        "attempts": record.attempts,
        "prefill_worker": record.prefill_worker,
        "decode_worker": record.decode_worker,
    }


def _prefixes(runs: Sequence[PrefixRun]) -> dict[str, Any]:
    """The tree's most used runs with all that lead to them, in the tree's order, and what is left out."""
    by_key = {run.key: run for run in runs}
    kept: set[bytes] = set()
    for run in sorted(runs, key=lambda run: (run.num_hits, run.num_blocks), reverse=True):
        path = []
        step: PrefixRun | None = run
        while step is not None and step.key not in kept:
            path.append(step.key)
            step = by_key.get(step.parent) if step.parent is not None else None
        if len(kept) + len(path) > NUM_RUNS:
            break
        kept.update(path)
    depth: dict[bytes, int] = {}
    rows = []
    for run in runs:
        if run.key in kept:
            depth[run.key] = depth[run.parent] + 1 if run.parent is not None else 0
            rows.append(
                {
                    "depth": depth[run.key],
                    "blocks": run.num_blocks,
                    "hits": run.num_hits,
                    "holders": list(run.holders),
                }
            )
    return {"runs": rows, "left_out": len(runs) - len(rows), "blocks": sum(run.num_blocks for run in runs)}
