"""What a worker keeps in memory, beside its weights and its KV store.

    python benchmarks/memory.py [--model smollm2] [--num-blocks 2912]

Starts one prefill and one decode worker in bf16, sends each pool work, and reads the processes' memory from the system.
RSS counts every page that a process maps; PSS divides a shared one by those who share it. Megabytes are 10^6 bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import psutil
from transformers import AutoConfig

from duopool.client import Client
from duopool.cluster.config import ClusterConfig
from duopool.cluster.system import System
from duopool.core.config import CacheConfig, ModelConfig
from duopool.engine.model_source import resolve_model

ROLES = ("prefill_worker", "decode_worker")
ALLOWED_MB = 500
BYTES = 2  # of a bf16 number


def store_mb(folder: Path, num_tokens: int) -> float:
    shape = AutoConfig.from_pretrained(folder)
    per_token = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * BYTES
    return num_tokens * per_token / 1e6


def is_foreign(mapping: Any) -> bool:
    """Whether this is another worker's KV store."""
    return "memfd:duopool" in mapping.path and "w" not in mapping.perms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--num-blocks", type=int, default=2912)
    arguments = parser.parse_args()
    cache = CacheConfig(num_blocks=arguments.num_blocks)
    folder = resolve_model(arguments.model).folder
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6
    store = store_mb(folder, arguments.num_blocks * cache.block_size)
    limit = weights + store + ALLOWED_MB
    print(f"weights {weights:.0f} MB, KV store {store:.0f} MB: a worker may take {limit:.0f} MB")
    model = ModelConfig(model=arguments.model, dtype="bfloat16")
    with System.start(ClusterConfig(port=0, model=model, cache=cache)) as system, Client(system.address) as client:
        for length in (16, 600, 1500):
            prompt = list(range(100, 100 + length))
            for _ in client.generate(token_ids=prompt, max_tokens=16, temperature=0.8, top_p=0.9):
                pass
        for role in ROLES:
            for process in psutil.Process().children(recursive=True):
                if f"duopool.{role}.process" not in " ".join(process.cmdline()):
                    continue
                memory = process.memory_full_info()
                # What a worker has mapped of another's pages, to copy them, is the other's.
                foreign = sum(one.rss for one in process.memory_maps(grouped=False) if is_foreign(one))
                rss, pss = (memory.rss - foreign) / 1e6, memory.pss / 1e6
                # The nursery keeps the checked model and forks the worker, which has the store.
                is_worker = rss > store
                verdict = f", {rss / limit:.2f} x of what it may" if is_worker else ""
                name = role if is_worker else f"{role}'s nursery"
                print(f"{name:24s} RSS {rss:6.0f} MB, PSS {pss:6.0f} MB{verdict}")


if __name__ == "__main__":
    main()
