"""What rounding costs: perplexity and agreement per kind of weights, and bf16 beside transformers' own bf16.

    python benchmarks/quality.py [--model smollm2] [--prompts 64] [--skip-transformers] [--checkpoints FOLDER ...]

Text: Python's own reference as its `pydoc` carries it, fixed by Python's version, in windows of 512 tokens. `agreement`
is the share of positions whose likeliest next token is that of bf16. Beside transformers, which follows our greedy
output of 64 tokens: how many outputs it would have changed, and how far it held our token behind its own there, in
logits (bf16 has steps of 0.06 to 0.125 from 8 to 32). `--checkpoints` adds the model's weights out of other folders, as
`--decode.model` takes them.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from random import Random

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from duopool.core.config import CacheConfig, ModelConfig
from duopool.core.sampling_params import SamplingParams
from duopool.core.step import Chunk, SampleSpec, StepPlan
from duopool.core.types import BlockId, RequestId, TokenLogprob
from duopool.engine.model_source import resolve_model
from duopool.engine.runner import ModelRunner

WINDOW, NEW_TOKENS, BLOCK = 512, 64, 16
TEXT_CHARACTERS = 100_000
"""More than all windows take."""

ROUNDINGS = (None, "int8", "int4")


def load(config: ModelConfig, num_blocks: int) -> ModelRunner:
    return ModelRunner.load(config, CacheConfig(num_blocks=num_blocks))


def score(runner: ModelRunner, windows: Sequence[list[int]]) -> list[TokenLogprob]:
    """Every token but each window's first, with the likeliest one beside it."""
    found: list[TokenLogprob] = []
    blocks = [BlockId(i) for i in range(WINDOW // BLOCK)]
    for window in windows:
        chunk = Chunk(request_id=RequestId("w"), token_ids=window, start=0, block_ids=blocks, prompt_logprobs=1)
        found += runner.execute(StepPlan(chunks=(chunk,))).prompt_logprobs[RequestId("w")]
    return found


def generate(runner: ModelRunner, prompts: Sequence[list[int]]) -> list[list[int]]:
    """Greedy, all prompts in one batch, nothing shared."""
    per_request = -(-(max(map(len, prompts)) + NEW_TOKENS) // BLOCK)
    outputs: list[list[int]] = [[] for _ in prompts]
    for step in range(NEW_TOKENS):
        chunks = []
        for row, prompt in enumerate(prompts):
            spec = SampleSpec(
                params=SamplingParams(temperature=0), prompt_token_ids=prompt, output_token_ids=outputs[row]
            )
            chunks.append(
                Chunk(
                    request_id=RequestId(str(row)),
                    token_ids=prompt if step == 0 else outputs[row][-1:],
                    start=0 if step == 0 else len(prompt) + step - 1,
                    block_ids=[BlockId(row * per_request + i) for i in range(per_request)],
                    samples=(spec,),
                )
            )
        for request, (token,) in runner.execute(StepPlan(chunks=tuple(chunks))).tokens.items():
            outputs[int(request)].append(token.token_id)
    return outputs


@torch.inference_mode()
def beside_transformers(model: str, runner: ModelRunner, prompts: Sequence[list[int]]) -> None:
    reference = AutoModelForCausalLM.from_pretrained(resolve_model(model).folder, dtype=torch.bfloat16)
    margins = []
    for prompt, output in zip(prompts, generate(runner, prompts), strict=True):
        # Along our output transformers takes the tokens that greedy decoding gives it, up to where they part.
        logits = reference(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1].float()
        parted = (logits.argmax(dim=1) != torch.tensor(output)).nonzero()
        if len(parted):
            row = logits[parted[0, 0]]
            margins.append(float(row.max() - row[output[int(parted[0, 0])]]))
    print(f"{len(margins)} of {len(prompts)} outputs differ from transformers' bf16 within {NEW_TOKENS} tokens")
    if margins:
        median = statistics.median(margins)
        print(f"  where they part, its logits are {median:.3f} apart (median), {max(margins):.3f} at most", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--skip-transformers", action="store_true")
    parser.add_argument("--checkpoints", nargs="*", default=[], help="of the same model, by transformers' quantizers")
    arguments = parser.parse_args()
    text = "\n".join(topics[name] for name in sorted(topics))[:TEXT_CHARACTERS]
    ids = AutoTokenizer.from_pretrained(resolve_model(arguments.model).folder)(text).input_ids[: 16 * WINDOW]
    windows = [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW + 1, WINDOW)][:16]
    print(
        f"{len(windows)} windows of {WINDOW} tokens, text {hashlib.sha256(text.encode()).hexdigest()[:12]}, "
        f"Python {platform.python_version()}"
    )
    random = Random(0)
    prompts = [
        ids[(at := random.randrange(len(ids) - 64)) : at + random.randint(8, 64)] for _ in range(arguments.prompts)
    ]
    per_request = -(-(64 + NEW_TOKENS) // BLOCK)
    best: list[int] = []
    kinds = [ModelConfig(model=arguments.model, dtype="float32")] + [
        ModelConfig.model_validate(
            {"model": arguments.model, "weights": weights, "dtype": "bfloat16", "quantization": rounding}
        )
        for weights in (None, *arguments.checkpoints)
        for rounding in ROUNDINGS
    ]
    for kind in kinds:
        runner = load(kind, max(WINDOW // BLOCK, per_request * len(prompts)))
        entries = score(runner, windows)
        likeliest = [entry.top[0][0] for entry in entries]
        if kind.dtype == "bfloat16" and not best:
            best = likeliest
            if not arguments.skip_transformers:
                beside_transformers(arguments.model, runner, prompts)
        perplexity = math.exp(-statistics.fmean(entry.logprob for entry in entries))
        agreement = statistics.fmean(a == b for a, b in zip(likeliest, best, strict=True)) if best else math.nan
        name = f"{kind.quantization or kind.dtype} {Path(kind.weights).name if kind.weights else ''}"
        print(f"{name:24s} perplexity {perplexity:8.3f}, agreement with bf16 {agreement:.2%}", flush=True)


if __name__ == "__main__":
    main()
