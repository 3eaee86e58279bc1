"""The router's Prometheus metrics: its requests, the handoff, and every worker's state, from one place.

Names have vLLM's stems behind a prefix of ours, so that boards made for vLLM need only that prefix changed. Workers
send their load with every step, so one scrape of the router shows the whole system.
Source of the stems: vLLM's documentation, "Production metrics".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from duopool import __version__
from duopool.core.handoff.request import Phase
from duopool.core.messages import WorkerInfo, WorkerLoad
from duopool.router.watch import RequestRecord

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FINE_S = (0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008, 0.01, 0.012, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075)
_COARSE_S = (0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 20.0, 40.0)
STAGE_BUCKETS_S = (*_FINE_S, *_COARSE_S, 80.0, 160.0, 640.0)
INTERVAL_BUCKETS_S = (*_FINE_S, *_COARSE_S)
TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000)
BYTE_BUCKETS = tuple(float(1 << shift) for shift in range(14, 34, 2))
FINISH_REASONS = ("stop", "length", "abort", "error")


class Workers(Protocol):
    """The pools, as far as metrics need them."""

    def worker_states(self) -> list[tuple[WorkerInfo, str, WorkerLoad]]:
        """Every member with its state (connecting, ready, draining, lost) and its last load."""
        ...

    @property
    def num_requests(self) -> int: ...


class Metrics:
    """A watch of requests, and a page for Prometheus."""

    def __init__(self, workers: Workers, *, model_id: str, prefix: str = "duopool") -> None:
        self._registry = CollectorRegistry()
        self._name = f"{prefix}:{{}}".format
        self._labels = {"model_name": model_id}
        self._registry.register(_PoolCollector(workers, self._name, model_id))
        self._began = self._counter("requests_received", "Choices of calls that passed admission.")
        self._success = Counter(
            self._name("request_success"),
            "Ended choices by reason.",
            ("model_name", "finished_reason"),
            registry=self._registry,
        )
        self._failed = Counter(
            self._name("request_failure"), "Failed choices by error.", ("model_name", "error"), registry=self._registry
        )
        for reason in FINISH_REASONS:
            self._success.labels(**self._labels, finished_reason=reason)
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of ended choices.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens shown to clients.")
        self._cache_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self._cache_hits = self._counter("prefix_cache_hits", "Prompt tokens that had KV already.")
        self._retries = self._counter("request_retries", "Attempts after the first.")
        self._transferred_bytes = self._counter("handoff_transfer_bytes", "KV bytes pulled by decode workers.")
        self._transferred_blocks = self._counter("handoff_transfer_blocks", "KV blocks pulled by decode workers.")

        seconds, tokens = STAGE_BUCKETS_S, TOKEN_BUCKETS
        self._first_token = self._histogram("time_to_first_token_seconds", "Admission to first token.", seconds)
        self._interval = self._histogram(
            "inter_token_latency_seconds", "Between two messages with tokens of one choice.", INTERVAL_BUCKETS_S
        )
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean time between the tokens of a choice.", INTERVAL_BUCKETS_S
        )
        self._stages: tuple[tuple[Histogram, Callable[[RequestRecord], float]], ...] = (
            (self._histogram("e2e_request_latency_seconds", "Whole life.", seconds), lambda r: r.times.total_s),
            (self._histogram("request_queue_time_seconds", "Waiting.", seconds), lambda r: r.times.queue_s),
            (self._histogram("request_prefill_time_seconds", "Prefill.", seconds), lambda r: r.times.prefill_s),
            (self._histogram("request_decode_time_seconds", "Decode.", seconds), lambda r: r.times.decode_s),
            (
                self._histogram("request_inference_time_seconds", "Prefill and decode.", seconds),
                lambda r: r.times.prefill_s + r.times.decode_s,
            ),
            (self._histogram("request_prompt_tokens", "Prompt tokens.", tokens), lambda r: r.num_prompt_tokens),
            (self._histogram("request_generation_tokens", "Output tokens.", tokens), lambda r: r.num_output_tokens),
            (self._histogram("request_params_max_tokens", "max_tokens asked for.", tokens), lambda r: r.max_tokens),
        )
        self._handoffs: tuple[tuple[Histogram, Callable[[RequestRecord], float]], ...] = (
            (
                self._histogram("handoff_transfer_time_seconds", "At least one read under way.", seconds),
                lambda r: r.times.transfer_s,
            ),
            (
                self._histogram("handoff_handover_time_seconds", "First token to join of the batch.", seconds),
                lambda r: r.times.handover_s,
            ),
            (
                self._histogram("handoff_request_bytes", "KV bytes pulled for a choice.", BYTE_BUCKETS),
                lambda r: r.times.transfer_bytes,
            ),
        )

    def page(self) -> bytes:
        """All metrics in Prometheus' text format (`CONTENT_TYPE`)."""
        return generate_latest(self._registry)

    # ---- Watch ------------------------------------------------------------------------------------------------------

    def began(self) -> None:
        self._began.inc()

    def shown(self, num_tokens: int, interval_s: float, *, is_first: bool) -> None:
        self._generation_tokens.inc(num_tokens)
        (self._first_token if is_first else self._interval).observe(interval_s)

    def ended(self, record: RequestRecord) -> None:
        self._success.labels(**self._labels, finished_reason=record.finish_reason).inc()
        if record.phase is Phase.FAILED:
            self._failed.labels(**self._labels, error=record.error or "WorkerLost").inc()
        self._prompt_tokens.inc(record.num_prompt_tokens)
        self._cache_queries.inc(record.num_prompt_tokens)
        self._cache_hits.inc(record.num_cached_tokens)
        self._retries.inc(max(0, record.attempts - 1))
        if record.phase is not Phase.DONE:
            return
        for histogram, value in self._stages:
            histogram.observe(value(record))
        if record.num_output_tokens > 1:
            self._per_token.observe(record.times.decode_s / (record.num_output_tokens - 1))
        if record.times.transfer_blocks:
            self._transferred_bytes.inc(record.times.transfer_bytes)
            self._transferred_blocks.inc(record.times.transfer_blocks)
            for histogram, value in self._handoffs:
                histogram.observe(value(record))

    def _counter(self, name: str, text: str) -> Counter:
        counter = Counter(self._name(name), text, tuple(self._labels), registry=self._registry)
        return counter.labels(**self._labels)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(self._name(name), text, tuple(self._labels), buckets=buckets, registry=self._registry)
        return histogram.labels(**self._labels)


class _PoolCollector(Collector):
    """Reads the pools at the moment of the scrape, so that a worker that left leaves no series behind."""

    GAUGES: tuple[tuple[str, str, Callable[[WorkerLoad], float]], ...] = (
        ("num_requests_running", "Requests in a worker's batch.", lambda load: load.num_running),
        ("num_requests_waiting", "Requests that a worker has not begun.", lambda load: load.num_waiting),
        ("num_pending_prefill_tokens", "Tokens still to be prefilled.", lambda load: load.num_pending_tokens),
        (
            "kv_cache_usage_perc",
            "Share of KV blocks that requests hold (1 is all).",
            lambda load: (
                1 - (load.num_free_blocks + load.num_cached_blocks) / load.num_blocks if load.num_blocks else 0
            ),
        ),
        ("kv_cache_blocks", "KV blocks of a worker.", lambda load: load.num_blocks),
        ("kv_cache_free_blocks", "KV blocks that hold nothing.", lambda load: load.num_free_blocks),
        ("kv_cache_cached_blocks", "KV blocks that hold reusable prefixes only.", lambda load: load.num_cached_blocks),
        ("handoff_leases", "Leases that a worker holds for others.", lambda load: load.num_leases),
        ("step_time_seconds", "Duration of a worker's last step.", lambda load: load.step_s),
    )
    COUNTERS: tuple[tuple[str, str, Callable[[WorkerLoad], float]], ...] = (
        ("worker_steps", "Steps since the worker started.", lambda load: load.num_steps),
        ("worker_computed_tokens", "Tokens whose KV was computed there.", lambda load: load.num_computed_tokens),
        ("worker_pulled_blocks", "Blocks pulled from other workers.", lambda load: load.num_pulled_blocks),
        ("num_preemptions", "Requests put back for want of blocks.", lambda load: load.num_preemptions),
    )

    def __init__(self, workers: Workers, name: Callable[[str], str], model_id: str) -> None:
        self._workers = workers
        self._name = name
        self._model_id = model_id

    def describe(self) -> list[Metric]:
        """Nothing ahead of time: what there is depends on the members."""
        return []

    def collect(self) -> Iterator[Metric]:
        states = self._workers.worker_states()
        labels = ("model_name", "role", "worker")
        for gauge_name, text, value in self.GAUGES:
            gauge = GaugeMetricFamily(self._name(gauge_name), text, labels=labels)
            for info, _, load in states:
                gauge.add_metric((self._model_id, info.role, info.worker_id), value(load))
            yield gauge
        for counter_name, text, value in self.COUNTERS:
            counter = CounterMetricFamily(self._name(counter_name), text, labels=labels)
            for info, _, load in states:
                counter.add_metric((self._model_id, info.role, info.worker_id), value(load))
            yield counter
        up = GaugeMetricFamily(
            self._name("worker_up"), "1 if the router can use the worker.", labels=(*labels, "state")
        )
        config = GaugeMetricFamily(
            self._name("cache_config_info"), "Always 1.", labels=(*labels, "block_size", "num_blocks", "max_model_len")
        )
        for info, state, _ in states:
            key = (self._model_id, info.role, info.worker_id)
            up.add_metric((*key, state), float(state in ("ready", "draining")))
            sizes = (info.block_size, info.num_blocks, info.max_model_len)
            config.add_metric((*key, *map(str, sizes)), 1)
        yield up
        yield config
        live = GaugeMetricFamily(self._name("num_requests"), "Choices alive at the router.", labels=("model_name",))
        live.add_metric((self._model_id,), self._workers.num_requests)
        yield live
        build = GaugeMetricFamily(self._name("build_info"), "Always 1.", labels=("version",))
        build.add_metric((__version__,), 1)
        yield build
