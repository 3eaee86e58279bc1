"""The requests that are sent while workers die: short, half greedy and half sampled, every one with a known answer."""

from __future__ import annotations

from random import Random

from duopool.proto import inference_pb2 as pb

FIRST_TOKEN, LAST_TOKEN = 100, 30_000
MAX_TOKENS = 8


def mixed_requests(count: int, random: Random) -> list[pb.GenerateRequest]:
    """`count` requests of 16 to 40 prompt tokens and 3 to 8 output tokens."""
    return [_request(at, random) for at in range(count)]


def _request(at: int, random: Random) -> pb.GenerateRequest:
    prompt = [random.randint(FIRST_TOKEN, LAST_TOKEN) for _ in range(random.randint(16, 40))]
    sampling = pb.SamplingParams(max_tokens=random.randint(3, MAX_TOKENS), temperature=0, ignore_eos=True)
    if at % 2:
        sampling.temperature, sampling.top_p, sampling.top_k = 0.9, 0.95, 100
        sampling.seed = random.randint(0, 2**32)
    if at % 4 == 3:
        sampling.repetition_penalty, sampling.frequency_penalty = 1.2, 0.3
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling)
