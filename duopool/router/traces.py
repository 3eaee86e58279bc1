"""OpenTelemetry spans of requests and their stages, if the extra `otel` is installed and an exporter is configured.

Spans are made at the end of a request, from its record: nothing is traced on the way of a token. The exporter is
configured by OpenTelemetry's own variables (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER, ...).
Names of attributes: OpenTelemetry's semantic conventions for generative AI, and vLLM's for latencies.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from duopool.core.handoff.request import Phase
from duopool.router.watch import RequestRecord

TRACEPARENT = "traceparent"
"""Header and metadata key of the W3C trace context."""
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_NANOSECONDS = 1_000_000_000


def make_traces(environment: Mapping[str, str] = os.environ) -> Traces | None:
    """A watch that exports spans; None when no endpoint is configured or the packages are missing."""
    if not any(environment.get(name) for name in _ENDPOINTS):
        return None
    if (
        importlib.util.find_spec("opentelemetry.exporter") is None
        or importlib.util.find_spec("opentelemetry.sdk") is None
    ):
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({SERVICE_NAME: environment.get("OTEL_SERVICE_NAME", "duopool")})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Traces(provider)


class Traces:
    """A watch of requests that makes one span per request with one child per stage."""

    def __init__(self, provider: Any, *, wall_clock: Callable[[], float] = time.time) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("duopool")
        self._propagator = TraceContextTextMapPropagator()
        self._wall_clock = wall_clock

    def close(self) -> None:
        """Export what is left."""
        self._provider.shutdown()

    # ---- Watch ------------------------------------------------------------------------------------------------------

    def began(self) -> None:
        return None

    def shown(self, num_tokens: int, interval_s: float, *, is_first: bool) -> None:
        return None

    def ended(self, record: RequestRecord) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        end = self._wall_clock()
        start = end - record.times.total_s
        caller = self._propagator.extract({TRACEPARENT: record.traceparent}) if record.traceparent else None
        span = self._tracer.start_span(
            "llm_request",
            context=caller,
            kind=SpanKind.SERVER,
            start_time=_nanoseconds(start),
            attributes=dict(_attributes(record)),
        )
        inside = set_span_in_context(span)
        for name, begin_s, length_s, attributes in _stages(record):
            stage = self._tracer.start_span(
                name, context=inside, start_time=_nanoseconds(start + begin_s), attributes=attributes
            )
            stage.end(_nanoseconds(start + begin_s + length_s))
        if record.phase is Phase.FAILED:
            span.set_status(Status(StatusCode.ERROR, record.error))
        span.end(_nanoseconds(end))


def _nanoseconds(moment_s: float) -> int:
    return int(moment_s * _NANOSECONDS)


def _attributes(record: RequestRecord) -> Iterator[tuple[str, str | int | float]]:
    times = record.times
    yield "gen_ai.request.id", record.name
    yield "gen_ai.request.max_tokens", record.max_tokens
    yield "gen_ai.usage.prompt_tokens", record.num_prompt_tokens
    yield "gen_ai.usage.cached_tokens", record.num_cached_tokens
    yield "gen_ai.usage.completion_tokens", record.num_output_tokens
    yield "gen_ai.response.finish_reason", record.finish_reason
    yield "gen_ai.latency.e2e", times.total_s
    yield "gen_ai.latency.time_in_queue", times.queue_s
    yield "gen_ai.latency.time_to_first_token", times.time_to_first_token_s
    yield "duopool.attempts", record.attempts
    yield "duopool.prefill_worker", record.prefill_worker
    yield "duopool.decode_worker", record.decode_worker


def _stages(record: RequestRecord) -> Iterator[tuple[str, float, float, Mapping[str, str | int]]]:
    """Name, beginning behind the request's own, length and attributes of the stages that took place."""
    times = record.times
    first_token_s = times.time_to_first_token_s
    if not first_token_s:
        yield "queue", 0.0, times.total_s, {}
        return
    prefill_s = min(times.prefill_s, first_token_s)
    yield "queue", 0.0, first_token_s - prefill_s, {}
    yield "prefill", first_token_s - prefill_s, prefill_s, {"duopool.worker": record.prefill_worker}
    if times.transfer_blocks:
        sizes = {"duopool.transfer.blocks": times.transfer_blocks, "duopool.transfer.bytes": times.transfer_bytes}
        yield "handoff", first_token_s, times.handover_s, sizes
    yield (
        "decode",
        first_token_s + times.handover_s,
        max(0.0, times.decode_s - times.handover_s),
        {"duopool.worker": record.decode_worker},
    )
