"""A request is one span below its caller's, and its stages fill it without a gap."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from router_fakes import FakeCluster

from duopool.proto import inference_pb2 as pb
from duopool.router.traces import Traces, make_traces
from duopool.router.watch import Watches

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
REQUEST = pb.GenerateRequest(
    token_ids=pb.TokenIds(ids=range(40, 60)), sampling=pb.SamplingParams(max_tokens=4, ignore_eos=True)
)


def spans_of_a_request(metadata: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))

    async def run() -> None:
        async with FakeCluster() as cluster:
            cluster.router.generation._watch = Watches([Traces(provider)])
            async for _ in cluster.inference.Generate(REQUEST, metadata=metadata):
                pass

    asyncio.run(run())
    return {span.name: span for span in exporter.get_finished_spans()}


def test_a_request_is_a_child_of_its_caller_and_its_stages_fill_it() -> None:
    spans = spans_of_a_request((("traceparent", f"00-{TRACE}-{PARENT}-01"),))
    assert set(spans) == {"llm_request", "queue", "prefill", "handoff", "decode"}
    request = spans["llm_request"]
    assert f"{request.context.trace_id:032x}" == TRACE
    assert f"{request.parent.span_id:016x}" == PARENT
    assert request.attributes["gen_ai.usage.completion_tokens"] == 4
    assert request.attributes["duopool.decode_worker"] == "decode-0"
    stages = [spans[name] for name in ("queue", "prefill", "handoff", "decode")]
    for stage in stages:
        assert stage.parent.span_id == request.context.span_id
        assert request.start_time <= stage.start_time <= stage.end_time <= request.end_time + 1_000
    for before, after in pairwise(stages):
        assert after.start_time == pytest.approx(before.end_time, abs=1_000)


@pytest.mark.parametrize("given", ["", "nonsense", "00-0-0-00"])
def test_without_a_usable_parent_a_request_begins_a_trace(given: str) -> None:
    assert spans_of_a_request((("traceparent", given),) if given else ())["llm_request"].parent is None


def test_nothing_is_traced_without_an_endpoint() -> None:
    assert make_traces({}) is None
