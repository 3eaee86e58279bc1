"""Processes that die or stop while streams run, each stream compared token for token with its unfaulted run.

One system with two workers of each role and two routers serves all tests.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import grpc
import pytest
from calls import has_workers, is_at_rest, scale, state, wait_for
from remains import Remains

from duopool.client import AsyncClient, Client, generate_request
from duopool.cluster.admin_access import routers_beside
from duopool.cluster.audit_command import audit_of
from duopool.cluster.chaos.command import chaos_config, run
from duopool.cluster.chaos.requests import FIRST_TOKEN, LAST_TOKEN
from duopool.cluster.system import System
from duopool.core.config import HandoffConfig
from duopool.core.types import Role
from duopool.engine.failpoints import FOLDER_VARIABLE
from duopool.proto import inference_pb2, inference_pb2_grpc

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

NUM_STREAMS = 16
EVERYONE = {"prefill-0", "prefill-1", "decode-0", "decode-1"}
SLACK_S = 1.0
"""What a busy machine may add to a time limit."""


@pytest.fixture(scope="module")
def failpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("failpoints")
    os.environ[FOLDER_VARIABLE] = str(folder)
    yield folder
    del os.environ[FOLDER_VARIABLE]


@pytest.fixture(scope="module")
def system(failpoints: Path, nothing_remains: Remains) -> Iterator[System]:
    with System.start(chaos_config("smollm2", workers=2, routers=2)) as running:
        for address in running.addresses:
            nothing_remains.watch(address)
        yield running


@pytest.fixture(autouse=True)
def _every_block_comes_back(system: System) -> Iterator[None]:
    yield
    for address in system.addresses:
        until(lambda address=address: answers(address))
        wait_for(address, has_workers(EVERYONE))
    wait_for(system.address, is_at_rest)
    system.check()


def test_no_token_is_lost_doubled_or_changed_when_workers_are_killed(system: System, failpoints: Path) -> None:
    tally, deaths, freezes = run(
        system,
        failpoints,
        [Role.PREFILL, Role.DECODE] * 10,
        frozen=[Role.DECODE],
        stop_s=4.0,
        streams=NUM_STREAMS,
        seed=1,
    )
    assert tally.complaints == []
    assert (tally.lost, tally.doubled, tally.changed) == (0, 0, 0)
    assert tally.retried > 0
    assert Counter(kill.role for kill in deaths) == {Role.PREFILL: 10, Role.DECODE: 10}
    assert freezes[0].noticed_after_s < HandoffConfig().progress_watchdog_s + SLACK_S


def test_clients_of_a_killed_router_go_on_at_the_other(system: System) -> None:
    prompts = [prompt_of(at) for at in range(8)]
    whole = asyncio.run(complete(system.addresses, prompts))
    killed = kill_first_router(system)
    broken = asyncio.run(complete(system.addresses, prompts, when_halfway=killed))
    assert broken == whole
    with Client(system.addresses) as client:
        tokens = [
            token_id
            for event in client.generate(token_ids=prompts[0], max_tokens=48, temperature=0, ignore_eos=True)
            for token_id in getattr(event, "token_ids", ())
        ]
    assert tokens == whole[0]


def test_no_choice_notices_that_its_decode_worker_or_its_router_is_killed(system: System) -> None:
    prompts = [prompt_of(20), prompt_of(21)]
    whole = asyncio.run(complete(system.addresses, prompts, choices=4))
    assert len(whole) == 8
    (victim,) = [worker.pid for worker in state(system.address).workers if worker.worker_id == "decode-0"]
    for kill in (lambda: os.kill(victim, signal.SIGKILL), kill_first_router(system)):
        assert asyncio.run(complete(system.addresses, prompts, choices=4, when_halfway=kill)) == whole
        until(lambda: answers(system.addresses[0]))
        wait_for(system.addresses[0], has_workers(EVERYONE))


def test_a_raw_client_goes_on_with_the_tokens_that_it_has(system: System) -> None:
    prompt = prompt_of(3)
    (whole,) = asyncio.run(complete(system.addresses, [prompt]))
    (rest,) = asyncio.run(complete(system.addresses[1:], [prompt], resume_from=whole[:20]))
    assert rest == whole[20:]


def test_running_requests_do_not_notice_that_the_control_plane_dies(system: System) -> None:
    prompts = [prompt_of(at) for at in range(8)]
    whole = asyncio.run(complete(system.addresses, prompts))
    victim = system.control_plane_pid
    attempts = asyncio.run(complete(system.addresses, prompts, when_halfway=lambda: os.kill(victim, signal.SIGKILL)))
    assert attempts == whole
    until(lambda: system.control_plane_pid != victim)
    # A new actor needs the control plane.
    scale(system.address, decode=3)
    wait_for(system.address, has_workers(EVERYONE | {"decode-2"}))
    scale(system.address, decode=2)
    wait_for(system.address, has_workers(EVERYONE))


def test_requests_of_a_killed_router_stop_on_every_worker(system: System) -> None:
    until(lambda: answers(system.addresses[0]))
    wait_for(system.addresses[0], has_workers(EVERYONE))
    killed = kill_first_router(system)
    with grpc.insecure_channel(system.addresses[0]) as channel:
        streams = [
            inference_pb2_grpc.InferenceStub(channel).Generate(
                generate_request(token_ids=prompt_of(9), max_tokens=1500, temperature=0, ignore_eos=True, seed=at)
            )
            for at in range(4)
        ]
        for stream in streams:
            for _ in range(5):
                next(stream)
        killed()
        died_at = time.monotonic()
        for stream in streams:
            with pytest.raises(grpc.RpcError):
                list(stream)
    wait_for(system.addresses[1], is_at_rest)
    assert time.monotonic() - died_at < HandoffConfig().orphan_ttl_s + SLACK_S


def test_an_audit_asks_every_router(system: System) -> None:
    first, second = system.addresses
    assert (routers_beside(first), routers_beside(second)) == ([second], [first])
    audited = audit_of([first, second], at_rest=True)
    assert not audited.findings
    names = [process.name for process in audited.processes if process.role == "router"]
    assert names == [f"router {first}", f"router {second}"]
    assert len(audited.processes) == 2 + len(EVERYONE)


@pytest.mark.parametrize("metadata", [(), (("authorization", "Bearer " + "0" * 64),)])
def test_a_peer_of_rays_without_the_token_is_refused(system: System, metadata: tuple[tuple[str, str], ...]) -> None:
    """Whoever could join Ray could run code on every node."""
    import ray

    with grpc.insecure_channel(ray.get_runtime_context().gcs_address) as channel:
        nodes = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetAllNodeInfo")
        with pytest.raises(grpc.RpcError) as refused:
            nodes(b"", metadata=metadata, timeout=30)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        token = (("authorization", f"Bearer {os.environ['RAY_AUTH_TOKEN']}"),)
        assert nodes(b"", metadata=token, timeout=30)


def prompt_of(seed: int) -> list[int]:
    random = Random(seed)
    return [random.randint(FIRST_TOKEN, LAST_TOKEN) for _ in range(30)]


async def complete(
    addresses: list[str],
    prompts: list[list[int]],
    *,
    max_tokens: int = 48,
    choices: int = 1,
    resume_from: list[int] | None = None,
    when_halfway: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """Tokens of each choice of each prompt through the client library, greedy and sampled in turn."""
    seen = [0]

    async def one(client: AsyncClient, at: int, prompt: list[int]) -> list[list[int]]:
        outputs: list[list[int]] = [[] for _ in range(choices)]
        sampling = {"temperature": 0.8, "seed": at} if at % 2 else {"temperature": 0}
        stream = client.generate(
            token_ids=prompt, max_tokens=max_tokens, n=choices, ignore_eos=True, resume_from=resume_from, **sampling
        )
        async for event in stream:
            if isinstance(event, inference_pb2.TokenChunk):
                assert event.index == len(resume_from or ()) + len(outputs[event.choice])
                outputs[event.choice] += event.token_ids
            seen[0] += 1
            if seen[0] == 5 * choices * len(prompts):
                when_halfway()
        return outputs

    async with AsyncClient(addresses) as client:
        every = await asyncio.gather(*(one(client, at, prompt) for at, prompt in enumerate(prompts)))
    return [output for outputs in every for output in outputs]


def kill_first_router(system: System) -> Callable[[], None]:
    victim = system.routers[0].pid
    return lambda: os.kill(victim, signal.SIGKILL)


def answers(address: str) -> bool:
    try:
        state(address)
    except grpc.RpcError:
        return False
    return True


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.1)
