"""Two workers over stores with mirrors, each a process of its own, hand prompts over as workers without would.

All is real but Ray and the router: the nursery's fork, the model, sessions over gRPC, the read out of shared memory.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_page_mirror import DEVICES, greedy
from tiny_models import FAMILIES, VOCAB_SIZE, make

from duopool.core.config import CacheConfig, DeviceName, HandoffConfig, InternalConfig, ModelConfig, WorkerConfig
from duopool.core.messages import (
    BlocksReady,
    CommandBatch,
    GenerationRequest,
    Joined,
    Nack,
    Prefill,
    Reserve,
    Tokens,
    WorkerInfo,
)
from duopool.core.sampling_params import SamplingParams
from duopool.core.types import RequestId, Role
from duopool.engine.nursed_process import NursedProcess
from duopool.proto.internal_access import InternalAccess
from duopool.router.connection import Connection, connector

NUM_TOKENS = 12
PATIENCE_S = 240.0
"""The first step on a device compiles its kernels."""


class Workers:
    """One of each role."""

    def __init__(self, folder: Path, device: DeviceName) -> None:
        self.processes = [NursedProcess(_config(folder, device, role), "mirrored_worker") for role in Role]
        self.prefill, self.decode = (process.start() for process in self.processes)

    def generate(self, prompts: list[list[int]]) -> list[list[int]]:
        """Greedy tokens behind each prompt; all are handed over at once."""
        return asyncio.run(asyncio.wait_for(self._generate(prompts), PATIENCE_S))

    async def _generate(self, prompts: list[list[int]]) -> list[list[int]]:
        connect = connector(InternalAccess.load(InternalConfig()))
        output: dict[RequestId, list[int]] = {}
        async with (
            connect(self.prefill.address, self.prefill.incarnation) as to_prefill,
            connect(self.decode.address, self.decode.incarnation) as to_decode,
        ):
            for prompt in prompts:
                request = GenerationRequest(
                    request_id=RequestId(str(prompt)),
                    prompt_token_ids=tuple(prompt),
                    params=SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True),
                )
                output[request.request_id] = []
                await to_decode.write(CommandBatch(commands=(Reserve(request=request, attempt=1),)))
                await to_prefill.write(CommandBatch(commands=(Prefill(request=request, attempt=1),)))
            await asyncio.gather(_pass_on(to_prefill, to_decode, output), _collect(to_decode, output))
        return list(output.values())


async def _pass_on(to_prefill: Connection, to_decode: Connection, output: dict[RequestId, list[int]]) -> None:
    """Blocks to the decode worker, first tokens into the output."""
    num_left = len(output)
    while num_left:
        for event in (await to_prefill.read()).events:
            assert not isinstance(event, Nack), event
            if isinstance(event, BlocksReady):
                await to_decode.write(CommandBatch(commands=(event,)))
                if event.first_token is not None:
                    output[event.request_id][:0] = event.first_token.token_ids
                    num_left -= 1


async def _collect(to_decode: Connection, output: dict[RequestId, list[int]]) -> None:
    num_left = len(output)
    while num_left:
        for event in (await to_decode.read()).events:
            assert not isinstance(event, Nack), event
            if isinstance(event, Joined):
                assert event.num_pulled_blocks > 0
            if isinstance(event, Tokens):
                output[event.request_id] += event.token_ids
                num_left -= event.finish_reason is not None


def _config(folder: Path, device: DeviceName, role: Role) -> WorkerConfig:
    return WorkerConfig(
        role=role,
        worker_id=f"{role}-0",
        model=ModelConfig(model=str(folder), dtype="float32"),
        cache=CacheConfig(num_blocks=64, block_size=4, gpu_share=0.5),
        handoff=HandoffConfig(transport="shared_memory", orphan_ttl_s=PATIENCE_S, lease_ttl_s=PATIENCE_S),
        device=device,
        num_threads=1,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make(FAMILIES["llama"](), dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def workers(device: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workers]:
    here = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH")))))
    # `auto` on the CPU: a worker that finds no CUDA loads its model behind the fork too.
    workers = Workers(folder, "cuda" if device == "cuda" else "auto")
    yield workers
    for process in workers.processes:
        process.stop()


@pytest.mark.timeout(600)
def test_prompts_are_handed_over_and_a_successor_does_as_well(workers: Workers, device: str) -> None:
    prompts = [[(31 * at + 7 * length) % VOCAB_SIZE for at in range(length)] for length in (1, 4, 23, 60)]
    assert workers.generate(prompts) == [greedy(prompt, NUM_TOKENS, device) for prompt in prompts]
    for process in workers.processes:
        process.check()
    place = "on " if device == "cuda" else "torch finds no CUDA device"
    assert any(note.startswith(place) for note in workers.decode.notes)
    first: WorkerInfo = workers.prefill
    os.kill(first.pid, signal.SIGKILL)
    workers.prefill = workers.processes[0].start()
    assert workers.prefill.pid != first.pid
    others = [[(token + 1) % VOCAB_SIZE for token in prompt] for prompt in prompts]
    assert workers.generate(others) == [greedy(prompt, NUM_TOKENS, device) for prompt in others]
