"""How much of a decode step is Python: a real decode worker over the real model, its streams running, without Ray.

    python benchmarks/python_share.py [--batch 8] [--context 256] [--steps 200] [--quantization int8]

A step is what the worker's step thread does from one to the next: plan, lay out, run, sample, commit. `native` is the
wall time inside calls of the compiled kernels; all the rest counts as Python, torch's operators included. Telling (one
message a step and session, encoded on the event loop's thread while the kernels run) is listed beside it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from threading import Thread
from typing import Any, cast

# As workers have them.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from duopool.core.config import CacheConfig, ModelConfig, WorkerConfig
from duopool.core.kv_manager import KVCacheManager
from duopool.core.messages import GenerationRequest, Nack, Reserve, StepReport, Tokens
from duopool.core.sampling_params import SamplingParams
from duopool.core.types import Incarnation, LeaseId, RequestId, Role, WorkerId
from duopool.core.worker import SessionId
from duopool.decode_worker.worker import DecodeWorker
from duopool.engine.leases import SourceIdentity
from duopool.engine.runner import ModelRunner
from duopool.engine.served_model import ServedModel
from duopool.engine.surroundings import Surroundings
from duopool.engine.transfer.transport import BlockReader
from duopool.kernels.cpu_library import library
from duopool.proto import codec

SESSION = SessionId(1)
STEP_CALLS = ("duopool_decoder_stack", "duopool_sample_tokens", "duopool_token_logprobs")


class NativeTime:
    """Seconds inside the kernels' calls since it was last read."""

    def __init__(self) -> None:
        self._seconds = 0.0
        cpu = library()
        if cpu is None:
            raise SystemExit("the compiled kernels are not there")
        for name in STEP_CALLS:
            setattr(cpu.calls, name, self._timed(getattr(cpu.calls, name)))

    def take(self) -> float:
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            begin = time.perf_counter()
            try:
                return call(*arguments)
            finally:
                self._seconds += time.perf_counter() - begin

        return timed


def make_worker(arguments: argparse.Namespace) -> DecodeWorker:
    model = ModelConfig(model=arguments.model, dtype="bfloat16", quantization=arguments.quantization)
    num_blocks = arguments.batch * (-(-(arguments.context + arguments.steps + 64) // 16) + 1)
    cache = CacheConfig(num_blocks=num_blocks)
    runner = ModelRunner.load(model, cache)
    runner.warm_up()
    config = WorkerConfig(role=Role.DECODE, worker_id="decode-0", model=model, cache=cache, shares_cores=False)
    identity = SourceIdentity(worker_id=WorkerId("decode-0"), incarnation=Incarnation(1), source_address="nowhere")
    return DecodeWorker(
        config=config,
        model=ServedModel(vocab_size=runner.vocab_size, max_model_len=runner.max_model_len),
        manager=KVCacheManager(num_blocks=runner.num_blocks, block_size=16),
        runner=runner,
        reader=cast("BlockReader", None),  # every prompt is computed here
        identity=identity,
        surroundings=Surroundings(
            seal=lambda block_ids, generations: (), new_lease_id=lambda: LeaseId(1), clock=time.monotonic
        ),
    )


def start_streams(worker: DecodeWorker, arguments: argparse.Namespace, params: SamplingParams, name: str) -> None:
    """Returns when every stream has its first token."""
    for row in range(arguments.batch):
        prompt = tuple((31 * i + 7 * row) % 1000 for i in range(arguments.context))
        request = GenerationRequest(request_id=RequestId(f"{name}-{row}"), prompt_token_ids=prompt, params=params)
        worker.handle(Reserve(request=request, attempt=1, local_prefill=True), SESSION, now=time.monotonic())
    begun: set[str] = set()
    while len(begun) < arguments.batch:
        worker.step(now=time.monotonic())
        events = [one.event for one in worker.take_events()]
        if any(isinstance(event, Nack) for event in events):
            raise SystemExit(f"a stream was refused: {events}")
        begun |= {str(event.request_id) for event in events if isinstance(event, Tokens)}


def measure(worker: DecodeWorker, native: NativeTime, steps: int) -> None:
    shares, walls, natives, tellings = [], [], [], []
    for _ in range(steps):
        native.take()
        begin = time.perf_counter()
        worker.step(now=time.monotonic())
        end = time.perf_counter()
        events = tuple(one.event for one in worker.take_events())
        codec.encode(StepReport(events=events))
        tellings.append(time.perf_counter() - end)
        walls.append(end - begin)
        natives.append(native.take())
        shares.append(1 - natives[-1] / walls[-1])
    wall, inside, telling = (statistics.median(each) * 1e3 for each in (walls, natives, tellings))
    print(f"step {wall:6.2f} ms, native {inside:6.2f} ms, Python {wall - inside:5.2f} ms: ", end="")
    print(f"{statistics.median(shares):.1%} of the step; telling beside it {telling:.2f} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--quantization", choices=("int8", "int4"))
    arguments = parser.parse_args()
    # Like a worker's: memory that a thread gives back goes other ways than the main thread's.
    thread = Thread(target=run, args=(arguments,))
    thread.start()
    thread.join()


def run(arguments: argparse.Namespace) -> None:
    native = NativeTime()
    worker = make_worker(arguments)
    worker.open_session(SESSION, now=time.monotonic())
    max_tokens = arguments.steps + 32
    greedy = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    for name, params in (
        ("greedy", greedy),
        ("sampled", replace(greedy, temperature=0.8, top_p=0.95, seed=1)),
        ("logprobs", replace(greedy, logprobs=5)),
        ("penalty", replace(greedy, repetition_penalty=1.1)),
    ):
        start_streams(worker, arguments, params, name)
        print(f"batch {arguments.batch}, context {arguments.context}, {name:8s}: ", end="")
        measure(worker, native, arguments.steps)
        while not worker.is_idle:
            worker.step(now=time.monotonic())
            worker.take_events()
    worker.check()


if __name__ == "__main__":
    main()
