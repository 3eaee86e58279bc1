"""The metrics page says what happened: every choice once, every token once, every worker as it stands."""

from __future__ import annotations

import asyncio
import subprocess
from shutil import which

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families
from router_fakes import NUM_BLOCKS, FakeCluster, FakeWorker, eventually

from duopool.core.messages import NackReason
from duopool.proto import inference_pb2 as pb
from duopool.router.metrics import FINISH_REASONS

PROMPT = list(range(40, 60))


def request(max_tokens: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=PROMPT), sampling=pb.SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    )


def sums(page: bytes, *labels: str) -> dict[str, float]:
    """Value of every sample by `name` or, with `labels`, by `name/label/…`; `duopool:` is taken off."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            parts = [
                sample.name.removeprefix("duopool:"),
                *(sample.labels[label] for label in labels if label in sample.labels),
            ]
            key = "/".join(parts)
            found[key] = found.get(key, 0.0) + sample.value
    return found


def test_every_choice_and_every_token_is_counted_once() -> None:
    async def run() -> bytes:
        async with FakeCluster() as cluster:
            for max_tokens in (3, 5):
                async for _ in cluster.inference.Generate(request(max_tokens)):
                    pass
            return cluster.router.metrics.page()

    page = asyncio.run(run())
    total, by_reason = sums(page), sums(page, "finished_reason")
    assert total["requests_received_total"] == 2
    assert {reason: by_reason[f"request_success_total/{reason}"] for reason in FINISH_REASONS} == {
        "stop": 0,
        "length": 2,
        "abort": 0,
        "error": 0,
    }
    assert total["generation_tokens_total"] == 3 + 5
    assert total["prompt_tokens_total"] == 2 * len(PROMPT) == total["prefix_cache_queries_total"]
    assert total["time_to_first_token_seconds_count"] == 2
    assert total["inter_token_latency_seconds_count"] == 2 + 4
    assert total["e2e_request_latency_seconds_count"] == total["request_decode_time_seconds_count"] == 2
    assert total["handoff_transfer_bytes_total"] == 2 * 3000
    assert total["request_retries_total"] == 0
    assert total["num_requests"] == 0


def test_aborts_and_failures_are_told_apart() -> None:
    async def run() -> bytes:
        slow = [FakeWorker("prefill-0", "prefill"), FakeWorker("decode-0", "decode", step_s=0.05)]
        async with FakeCluster(slow) as cluster:
            call = cluster.inference.Generate(request(400))
            for _ in range(3):
                await call.read()
            call.cancel()
            await eventually(lambda: cluster.router.pools.num_requests == 0)
            slow[0].refuse = NackReason.INTERNAL
            with pytest.raises(grpc.aio.AioRpcError):
                async for _ in cluster.inference.Generate(request(4)):
                    pass
            return cluster.router.metrics.page()

    page = asyncio.run(run())
    by_reason = sums(page, "finished_reason")
    assert by_reason["request_success_total/abort"] == 1
    assert by_reason["request_success_total/error"] == 1
    assert sum(value for name, value in sums(page, "error").items() if name.startswith("request_failure_total/")) == 1
    assert sums(page)["e2e_request_latency_seconds_count"] == 0


def test_workers_are_shown_as_they_stand_and_leave_no_series_behind() -> None:
    async def run() -> tuple[bytes, bytes]:
        workers = [
            FakeWorker("prefill-0", "prefill"),
            FakeWorker("decode-0", "decode"),
            FakeWorker("decode-1", "decode"),
        ]
        async with FakeCluster(workers) as cluster:
            await eventually(lambda: cluster.router.pools.num_ready("decode") == 2)
            before = cluster.router.metrics.page()
            gone = cluster.workers.pop()
            cluster.tell_members()
            after = cluster.router.metrics.page()
            await gone.stop()
            return before, after

    before, after = (sums(page, "worker") for page in asyncio.run(run()))
    assert before["worker_up/decode-1"] == 1
    assert before["kv_cache_blocks/decode-0"] == NUM_BLOCKS
    assert before["kv_cache_usage_perc/decode-0"] == 0
    assert not [name for name in after if "decode-1" in name]
    assert after["worker_up/decode-0"] == after["worker_up/prefill-0"] == 1


def test_a_prefix_of_your_own() -> None:
    async def run() -> bytes:
        async with FakeCluster(metrics_prefix="vllm") as cluster:
            return cluster.router.metrics.page()

    page = asyncio.run(run()).decode()
    names = {line.split("{")[0].split(" ")[0] for line in page.splitlines() if line and not line.startswith("#")}
    assert names
    assert all(name.startswith("vllm:") for name in names)


@pytest.mark.skipif(which("promtool") is None, reason="promtool (Debian: prometheus) is not installed")
def test_promtool_finds_nothing_to_complain_about() -> None:
    async def run() -> bytes:
        async with FakeCluster() as cluster:
            async for _ in cluster.inference.Generate(request(3)):
                pass
            return cluster.router.metrics.page()

    result = subprocess.run(
        ["promtool", "check", "metrics"], input=asyncio.run(run()), capture_output=True, timeout=60, check=False
    )
    complaints = [
        line
        for line in (result.stdout + result.stderr).decode().splitlines()
        # The stems are vLLM's: a colon, and abbreviations such as `perc`.
        if line.strip() and "metric names should not contain ':'" not in line and "abbreviated" not in line
    ]
    assert complaints == []
