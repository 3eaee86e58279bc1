"""Times single steps of the engine: decode at several batch sizes over a context, and one prefill chunk.

    python benchmarks/engine.py [--model smollm2] [--dtype bfloat16 float32] [--quantization int8] [--context 256]

Memory comes in huge pages as in a worker, unless THP_MEM_ALLOC_ENABLE=0 says otherwise. Prints best, median and
processor time of a step. Requests' pages hold zeros: a step costs the same whatever they hold.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch

from duopool.core.config import CacheConfig, ModelConfig
from duopool.core.sampling_params import SamplingParams
from duopool.core.step import Chunk, SampleSpec, StepPlan
from duopool.core.types import BlockId, RequestId
from duopool.engine.runner import ModelRunner


def plan_of(batch: int, context: int, new_tokens: int, block_size: int, params: SamplingParams) -> StepPlan:
    """`batch` requests, each with `context` tokens stored and `new_tokens` to compute."""
    per_request = -(-(context + new_tokens) // block_size)
    return StepPlan(
        chunks=tuple(
            Chunk(
                request_id=RequestId(str(row)),
                token_ids=[(31 * i + row) % 1000 for i in range(new_tokens)],
                start=context,
                block_ids=[BlockId(row * per_request + i) for i in range(per_request)],
                samples=(SampleSpec(params=params, prompt_token_ids=[1], output_token_ids=[]),),
            )
            for row in range(batch)
        )
    )


def step_times(runner: ModelRunner, plan: StepPlan, steps: int) -> str:
    """Best, median, and the processor time that all threads took, of a step in milliseconds."""
    for _ in range(3):
        runner.execute(plan)
    times, busy = [], []
    for _ in range(steps):
        begin, busy_before = time.perf_counter(), time.process_time()
        runner.execute(plan)
        times.append(time.perf_counter() - begin)
        busy.append(time.process_time() - busy_before)
    return f"{min(times) * 1e3:8.2f} {statistics.median(times) * 1e3:8.2f} {statistics.median(busy) * 1e3:8.2f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--quantization", choices=("int8", "int4"), help="of the weights")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=15)
    arguments = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")
    greedy, random = SamplingParams(temperature=0), SamplingParams(temperature=0.8, top_p=0.95, seed=1)
    for dtype in arguments.dtype:
        begin = time.perf_counter()
        config = ModelConfig(model=arguments.model, dtype=dtype, quantization=arguments.quantization)
        runner = ModelRunner.load(config, CacheConfig(num_blocks=1024))
        runner.warm_up()
        print(f"{dtype}: load {time.perf_counter() - begin:.1f} s")
        for batch in arguments.batch:
            for name, params in (("greedy", greedy), ("sampled", random)):
                plan = plan_of(batch, arguments.context, 1, 16, params)
                print(f"  decode batch {batch:3d} {name:8s} {step_times(runner, plan, arguments.steps)}")
        plan = plan_of(1, 0, arguments.prefill, 16, greedy)
        print(f"  prefill {arguments.prefill:5d} tokens    {step_times(runner, plan, 5)}")


if __name__ == "__main__":
    main()
