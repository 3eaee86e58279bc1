"""The real model through router, prefill and decode worker gives token for token what transformers gives alone."""

from __future__ import annotations

import math
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from calls import Load, complete, greedy_request, has_workers, is_at_rest, scale, state, wait_for
from moving_streams import make_round, requests_of, scale_decode
from reference import MAX_TOKENS, Reference
from remains import Remains

from duopool.client import Client
from duopool.cluster.config import ClusterConfig
from duopool.cluster.system import System
from duopool.core.config import CacheConfig, HandoffConfig, ModelConfig, SchedulerConfig, TransportName
from duopool.engine.transfer.factory import available_transports
from duopool.proto import inference_pb2 as pb

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(290)]

BLOCK = 16
NETWORK: TransportName = "nixl" if "nixl" in available_transports() else "grpc"
"""Hosts of their own are read this way (and over gRPC in test_multi_node.py); one host, by default, out of memory."""
CHUNKS: dict[TransportName, int] = {NETWORK: 128, "auto": 512}
"""Token budget of a step under each transport."""


@pytest.fixture(scope="module", params=[NETWORK, "auto"])
def system(request: pytest.FixtureRequest, nothing_remains: Remains) -> Iterator[System]:
    transport: TransportName = request.param
    config = ClusterConfig(
        port=0,
        model=ModelConfig(dtype="float32"),
        cache=CacheConfig(block_size=BLOCK, num_blocks=1200),
        scheduler=SchedulerConfig(max_num_batched_tokens=CHUNKS[transport]),
        handoff=HandoffConfig(transport=transport),
    )
    with System.start(config) as running:
        nothing_remains.watch(running.address)
        yield running


@pytest.fixture(autouse=True)
def _every_block_comes_back(system: System) -> Iterator[None]:
    yield
    wait_for(system.address, is_at_rest)
    system.check()


def test_all_at_once_cold_and_then_from_cached_prefixes(system: System, reference: Reference) -> None:
    prompts = reference.prompts()
    requests = [greedy_request(prompt, max_tokens=MAX_TOKENS) for prompt in prompts]
    cold = complete(system.address, requests)
    assert [tuple(record.token_ids) for record in cold] == [reference.greedy(prompt) for prompt in prompts]
    pulled = [r.finished.times.transfer_blocks for r in cold if r.finished is not None]
    assert max(pulled) == math.ceil(max(len(prompt) for prompt in prompts) / BLOCK)

    cached = complete(system.address, requests)
    assert [record.token_ids for record in cached] == [record.token_ids for record in cold]
    for prompt, record in zip(prompts, cached, strict=True):
        assert record.finished is not None
        # The last token is always computed, since its logits are needed. A short prompt may have been prefilled on the
        # decode worker at first, so that the prefill worker sees it for the first time now.
        wanted = {(len(prompt) - 1) // BLOCK * BLOCK}
        if len(prompt) <= HandoffConfig().local_prefill_max_tokens:
            wanted.add(0)
        assert record.finished.usage.cached_tokens in wanted


def test_a_running_system_keeps_no_dead_processes(system: System) -> None:
    assert [one for one in psutil.Process().children(recursive=True) if one.status() == psutil.STATUS_ZOMBIE] == []


def test_pages_travel_as_was_asked(system: System, reference: Reference) -> None:
    complete(system.address, [greedy_request(reference.words(5, 150), max_tokens=2)])
    (decode,) = [worker.pid for worker in state(system.address).workers if worker.role == "decode"]
    mapped = [
        line.split()[1] for line in Path(f"/proc/{decode}/maps").read_text().splitlines() if "memfd:duopool" in line
    ]
    is_shared = system.transport == "auto" and "shared_memory" in available_transports()
    assert ("r--s" in mapped) is is_shared, mapped


def test_one_after_another_cold_and_then_cached(system: System, reference: Reference) -> None:
    for prompt in reference.prompts()[4::6]:
        request = greedy_request(prompt, max_tokens=MAX_TOKENS, salt=b"alone")
        for _ in range(2):
            (record,) = complete(system.address, [request])
            assert tuple(record.token_ids) == reference.greedy(prompt)


def test_a_shared_prefix_is_neither_computed_nor_pulled_again(system: System, reference: Reference) -> None:
    shared = reference.words(900, 20 * BLOCK)
    first, second = shared + reference.words(40, 90), shared + reference.words(400, 90)
    complete(system.address, [greedy_request(first, max_tokens=MAX_TOKENS, salt=b"prefix")])
    before = {worker.role: worker for worker in wait_for(system.address, is_at_rest).workers}
    (record,) = complete(system.address, [greedy_request(second, max_tokens=MAX_TOKENS, salt=b"prefix")])
    after = {worker.role: worker for worker in wait_for(system.address, is_at_rest).workers}
    assert tuple(record.token_ids) == reference.greedy(second)
    assert record.finished is not None
    assert record.finished.prefill_worker == "prefill-0"
    assert record.finished.usage.cached_tokens == len(shared)
    assert after["prefill"].computed_tokens - before["prefill"].computed_tokens == len(second) - len(shared)
    missing = math.ceil(len(second) / BLOCK) - len(shared) // BLOCK
    assert after["decode"].pulled_blocks - before["decode"].pulled_blocks == missing
    assert record.finished.times.transfer_blocks == missing
    # Of the output, all but the first token were computed on D, and of the prompt none.
    assert after["decode"].computed_tokens - before["decode"].computed_tokens == MAX_TOKENS - 1


def test_choices_are_computed_and_handed_over_once_and_each_is_as_if_alone(
    system: System, reference: Reference
) -> None:
    prompt = reference.words(600, 5 * BLOCK + 7)

    def outputs(salt: bytes, **sampling: float) -> list[list[int]]:
        found: dict[int, list[int]] = {}
        with Client(system.address) as client:
            for event in client.generate(token_ids=prompt, cache_salt=salt, ignore_eos=True, **sampling):
                if isinstance(event, pb.TokenChunk):
                    found.setdefault(event.choice, []).extend(event.token_ids)
        return [found[choice] for choice in sorted(found)]

    before = {worker.role: worker for worker in wait_for(system.address, is_at_rest).workers}
    drawn = outputs(b"choices", n=5, max_tokens=10, temperature=1, seed=70)
    after = {worker.role: worker for worker in wait_for(system.address, is_at_rest).workers}
    assert after["prefill"].computed_tokens - before["prefill"].computed_tokens == len(prompt)
    assert after["decode"].computed_tokens - before["decode"].computed_tokens == 5 * 9
    assert after["decode"].pulled_blocks - before["decode"].pulled_blocks == math.ceil(len(prompt) / BLOCK)
    assert len(set(map(tuple, drawn))) == 5
    assert drawn == [outputs(b"", max_tokens=10, temperature=1, seed=70 + choice)[0] for choice in range(5)]
    assert outputs(b"", n=3, max_tokens=MAX_TOKENS, temperature=0) == [list(reference.greedy(prompt))] * 3


def test_a_guided_output_goes_on_exactly_behind_a_resume(system: System, reference: Reference) -> None:
    asked = {"max_tokens": 24, "seed": 5, "regex": "[a-f]{3}-[0-9]{12}\\."}

    def tokens(**more: object) -> list[int]:
        with Client(system.address) as client:
            events = list(client.generate("The code is", **asked, **more))
        return [token for event in events if isinstance(event, pb.TokenChunk) for token in event.token_ids]

    whole = tokens()
    assert re.fullmatch(asked["regex"], reference.tokenizer.decode(whole, skip_special_tokens=True))
    for length in (1, 4, len(whole) - 2):
        assert tokens(resume_from=whole[:length]) == whole[length:]


def test_tokens_come_one_by_one(system: System, reference: Reference) -> None:
    (record,) = complete(system.address, [greedy_request(reference.words(33, 100), max_tokens=32, salt=b"steps")])
    assert len(record.token_ids) == 32
    assert len(set(record.arrivals)) > 24, "most tokens come in messages of their own"


def test_a_seeded_sample_is_the_same_alone_and_in_a_batch(system: System, reference: Reference) -> None:
    def request(at: int) -> pb.GenerateRequest:
        sampling = pb.SamplingParams(max_tokens=12, temperature=1.0, top_p=0.95, top_k=200, seed=at, ignore_eos=True)
        prompt = reference.words(31 * at, 70 + 9 * at)
        return pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling, cache_salt=b"sampled")

    together = complete(system.address, [request(at) for at in range(6)])
    alone = [complete(system.address, [request(at)])[0] for at in (0, 3, 5)]
    assert [record.token_ids for record in alone] == [together[at].token_ids for at in (0, 3, 5)]
    assert len({tuple(record.token_ids) for record in together}) == 6


def test_pools_grow_lose_workers_and_shrink_under_load(system: System, reference: Reference) -> None:
    if system.transport != "auto":
        pytest.skip("once is enough")
    prompts = [reference.words(50 * at, 66 + 20 * at) for at in range(4)]
    expected = [reference.greedy(prompt) for prompt in prompts]
    everyone = {"prefill-0", "prefill-1", "decode-0", "decode-1"}
    with Load(system.address, prompts, expected) as load:
        scale(system.address, prefill=2, decode=2)
        grown = wait_for(system.address, has_workers(everyone))
        load.wait_until_served_by(everyone)
        # One after the other: a request that loses worker after worker is given up as poison.
        for worker_id in ("decode-0", "prefill-0"):
            (victim,) = [worker.pid for worker in grown.workers if worker.worker_id == worker_id]
            os.kill(victim, signal.SIGKILL)
            wait_for(system.address, lambda now, pid=victim: pid not in {worker.pid for worker in now.workers})
            wait_for(system.address, has_workers(everyone))
        scale(system.address, prefill=1, decode=1)
        wait_for(system.address, has_workers({"prefill-0", "decode-0"}))
    assert load.wrong == []


def test_running_streams_move_with_their_kv_when_their_worker_goes(system: System) -> None:
    if system.transport != "auto":
        pytest.skip("once is enough")
    scale_decode(system.address, 2)
    requests = requests_of(8, prompt_tokens=200, max_tokens=72, seed=3)
    moved = make_round(system.address, requests)
    undisturbed = make_round(system.address, requests)
    assert [record.error for record in moved.records] == [None] * len(requests)
    assert [record.token_ids for record in moved.records] == [record.token_ids for record in undisturbed.records]
    assert moved.moves, "nobody was on the worker that went"
    assert moved.num_computed_prompts == 0
    wait_for(system.address, has_workers({"prefill-0", "decode-0"}))


def test_a_killed_router_comes_back_at_its_port(system: System, reference: Reference) -> None:
    if system.transport != "auto":
        pytest.skip("once is enough")
    victim = system.routers[0].pid
    os.kill(victim, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while system.routers[0].pid in (0, victim) and time.monotonic() < deadline:
        time.sleep(0.05)
    prompt = reference.words(11, 77)
    while True:
        try:
            wait_for(system.address, has_workers({"prefill-0", "decode-0"}))
            break
        except Exception:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    (record,) = complete(system.address, [greedy_request(prompt, max_tokens=MAX_TOKENS)])
    assert tuple(record.token_ids) == reference.greedy(prompt)
