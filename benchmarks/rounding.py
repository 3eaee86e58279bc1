"""What rounding alone does to streams: the requests of drain.py on the engine, without workers and without a drain.

    python benchmarks/rounding.py [--dtype bfloat16 float32] [--rounds 3]

Every stream is computed three times: its prompt in one piece; its prompt cut where a cached prefix would end; and in
batches of another size. Counts the streams that differ and says of greedy ones how near the two best logits were.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from moving_streams import requests_of
from torch import Tensor

from duopool.core.config import CacheConfig, ModelConfig
from duopool.core.sampling_params import SamplingParams
from duopool.core.step import Chunk, SampleSpec, StepPlan
from duopool.core.types import BlockId, RequestId
from duopool.engine.forward_batch import ForwardBatch
from duopool.engine.runner import ModelRunner
from duopool.kernels.sample_tokens.draw import Draw, Drawn
from duopool.proto import inference_pb2 as pb

NUM_STREAMS, PROMPT_TOKENS, NEW_TOKENS, BLOCK_SIZE = 16, 256, 160, 16
BLOCKS_OF_EACH = -(-(PROMPT_TOKENS + NEW_TOKENS) // BLOCK_SIZE)
CUT_AT = PROMPT_TOKENS - BLOCK_SIZE
"""What a cache has of such a prompt: all blocks but the last, whose logits are wanted."""


@dataclass
class Stream:
    """One request's tokens, and how far the two best logits were apart before each."""

    request: pb.GenerateRequest
    block_ids: list[BlockId]
    tokens: list[int] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    def chunk(self, start: int, end: int) -> Chunk:
        known = [*self.request.token_ids.ids, *self.tokens]
        wanted = self.request.sampling
        params = SamplingParams(
            temperature=wanted.temperature, top_p=wanted.top_p, seed=wanted.seed, max_tokens=NEW_TOKENS, ignore_eos=True
        )
        spec = SampleSpec(params=params, prompt_token_ids=known[:PROMPT_TOKENS], output_token_ids=tuple(self.tokens))
        return Chunk(
            request_id=RequestId(str(self.block_ids[0])),
            token_ids=known[start:end],
            start=start,
            block_ids=self.block_ids,
            samples=(spec,) if end == len(known) else (),
        )


class WatchedRunner(ModelRunner):
    """Keeps the logits of its last step."""

    def _forward(self, batch: ForwardBatch, draws: Sequence[Draw]) -> tuple[Tensor, Drawn]:
        self.logits, drawn = super()._forward(batch, draws)
        return self.logits, drawn


def generate(runner: WatchedRunner, seed: int, *, cuts: tuple[int, ...] = (), batch: int = NUM_STREAMS) -> list[Stream]:
    """All streams of a round, with prompts computed one by one and cut there, and decoded in batches of this size."""
    requests = requests_of(NUM_STREAMS, prompt_tokens=PROMPT_TOKENS, max_tokens=NEW_TOKENS, seed=seed)
    streams = [
        Stream(request, [BlockId(row * BLOCKS_OF_EACH + index) for index in range(BLOCKS_OF_EACH)])
        for row, request in enumerate(requests)
    ]

    def step(some: Sequence[Stream], start: int, end: int) -> None:
        result = runner.execute(StepPlan(chunks=tuple(one.chunk(start, end) for one in some)))
        for one, (token,) in zip(some, result.tokens.values(), strict=bool(result.tokens)):
            best = runner.logits[some.index(one)].float().topk(2).values
            one.tokens.append(token.token_id)
            one.gaps.append(float(best[0] - best[1]))

    for one in streams:
        for start, end in zip((0, *cuts), (*cuts, PROMPT_TOKENS), strict=True):
            step([one], start, end)
    for position in range(PROMPT_TOKENS, PROMPT_TOKENS + NEW_TOKENS - 1):
        for first in range(0, NUM_STREAMS, batch):
            step(streams[first : first + batch], position, position + 1)
    return streams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for dtype in options.dtype:
        cache = CacheConfig(num_blocks=NUM_STREAMS * BLOCKS_OF_EACH, block_size=BLOCK_SIZE)
        runner = WatchedRunner.load(ModelConfig(dtype=dtype), cache)
        assert isinstance(runner, WatchedRunner)
        by_cut = by_batch = 0
        for seed in range(options.rounds):
            whole = generate(runner, seed)
            cut = generate(runner, seed, cuts=(CUT_AT,))
            by_batch += sum(
                one.tokens != other.tokens for one, other in zip(whole, generate(runner, seed, batch=5), strict=True)
            )
            for one, other in zip(whole, cut, strict=True):
                at = next((at for at in range(NEW_TOKENS) if one.tokens[at] != other.tokens[at]), None)
                by_cut += at is not None
                if at is not None and not one.request.sampling.temperature:
                    typical = torch.tensor(one.gaps).median().item()
                    gaps = f"{one.gaps[at]:.3f} and {other.gaps[at]:.3f}, in this stream mostly {typical:.3f}"
                    print(f"  a greedy stream differs from token {at} on; the best logits are apart by {gaps}")
        num = options.rounds * NUM_STREAMS
        print(
            f"{dtype}: of {num} streams {by_cut} differ when the prompt is cut at {CUT_AT}, {by_batch} in other batches"
        )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
