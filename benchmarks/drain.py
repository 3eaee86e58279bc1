"""Takes a decode worker away under running streams, over and over, and measures how long each moved stream stood still.

    python benchmarks/drain.py [--rounds 6] [--streams 16] [--dtype bfloat16] [--transport auto] [--output FILE]

Starts a system of one prefill and two decode workers. In every round the streams run over both, `scale decode=1` takes
one away, and its streams move. Every stream must give the tokens of an undisturbed run. Exit code 1 if one does not, if
none has moved, or if a prompt was computed twice. The pause is the longest gap between two tokens of a stream while its
worker drained, less one step: an upper bound that counts the machine's noise as pause.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from moving_streams import Round, make_round, requests_of, scale_decode

from duopool.cluster.config import ClusterConfig
from duopool.cluster.machine import describe_machine
from duopool.cluster.measure import percentile
from duopool.cluster.system import System
from duopool.core.config import HandoffConfig, ModelConfig

BAR_STEPS = 2.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--transport", default="auto", choices=("auto", "nixl", "grpc"))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    config = ClusterConfig(
        port=0,
        decode=2,
        model=ModelConfig(dtype=arguments.dtype),
        handoff=HandoffConfig(transport=arguments.transport),
    )
    rounds, num_wrong = [], 0
    with System.start(config) as system:
        for seed in range(arguments.rounds):
            scale_decode(system.address, 2)
            requests = requests_of(
                arguments.streams, prompt_tokens=arguments.prompt_tokens, max_tokens=arguments.max_tokens, seed=seed
            )
            moved = make_round(system.address, requests)
            alone = make_round(system.address, requests)  # one worker is left, and keeps its streams
            pairs = zip(moved.records, alone.records, strict=True)
            num_wrong += sum(one.error is not None or one.token_ids != other.token_ids for one, other in pairs)
            rounds.append(moved)
            print(f"round {seed}, drain {moved.drain_s:.1f} s: {summarise(rounds, num_wrong)}", flush=True)
        system.check()
    summary = summarise(rounds, num_wrong)
    print("\n".join(f"{name:40} {value}" for name, value in summary.items()))
    if arguments.output is not None:
        result = {"machine": describe_machine(), "arguments": vars(arguments), "summary": summary}
        result["moves"] = [asdict(move) for one in rounds for move in one.moves]
        arguments.output.write_text(json.dumps(result, indent=2, default=str))
    return int(bool(num_wrong) or not summary["moved"] or bool(summary["prompt tokens computed twice"]))


def summarise(rounds: Sequence[Round], num_wrong: int) -> dict[str, float]:
    """All rounds together, times in decode steps."""
    pauses = [move.pause_steps for one in rounds for move in one.moves]
    noise = [max(0.0, steps - 1.0) for one in rounds for steps in one.undisturbed]
    return {
        "streams": sum(len(one.records) for one in rounds),
        "lost or changed": num_wrong,
        "moved": len(pauses),
        "prompt tokens computed twice": sum(one.num_computed_prompts for one in rounds),
        "pause p50, steps": round(percentile(pauses, 50), 2),
        "pause p99, steps": round(percentile(pauses, 99), 2),
        "longest pause, steps": round(max(pauses, default=0.0), 2),
        "the same before the drain p50, steps": round(percentile(noise, 50), 2),
        "the same before the drain p99, steps": round(percentile(noise, 99), 2),
        "step p50, ms": round(1e3 * statistics.median([move.step_s for one in rounds for move in one.moves] or [0]), 1),
    }


if __name__ == "__main__":
    sys.exit(main())
