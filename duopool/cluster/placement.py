"""Where and with which environment a worker's actor runs: pure choices from what the Ray cluster has.

A node that carries a resource named after a role (`prefill`, `decode`) takes workers of that role only; deploy/ makes
such nodes. Without them workers spread over all nodes.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duopool
from duopool.core.types import Role

CPUS_PER_WORKER = 0.01
"""What a worker claims from Ray where no role resource pins it; its compute threads are bounded by OpenMP instead."""


def has_pool_nodes(resources: Mapping[str, float]) -> bool:
    """Whether a cluster with these resources has nodes for one of the pools: then both are pinned."""
    return any(role.value in resources for role in Role)


def actor_options(role: Role, *, is_pinned: bool, num_threads: int, num_gpus: float) -> dict[str, Any]:
    """Options of a worker's actor; one that is pinned waits for a node of its pool.

    `max_restarts` is 0: a restarted actor would answer under the same handle with empty state, so the supervisor starts
    a new one, with a new incarnation, itself.
    """
    options: dict[str, Any] = {
        "max_restarts": 0,
        "max_task_retries": 0,
        "num_cpus": CPUS_PER_WORKER,
        "num_gpus": num_gpus,
        "scheduling_strategy": "SPREAD",
        "runtime_env": {"env_vars": environment(num_threads)},
    }
    if is_pinned:
        options["resources"] = {role.value: 1}
    return options


def environment(num_threads: int) -> dict[str, str]:
    """Variables that must stand before the worker imports torch."""
    variables = {
        "OMP_NUM_THREADS": str(num_threads),
        # Workers share cores; threads that spin between two operators would take them from each other.
        "OMP_WAIT_POLICY": "PASSIVE",
        # torch asks for huge pages: scattered KV blocks and streamed weights cost fewer address translations.
        "THP_MEM_ALLOC_ENABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NIXL_LOG_LEVEL": "ERROR",
        "UCX_LOG_LEVEL": "error",
    }
    if not _is_installed():
        variables["PYTHONPATH"] = source_folder()
    return variables


def source_folder() -> str:
    """Folder that must be on the path for `import duopool`."""
    return str(Path(duopool.__file__).resolve().parent.parent)


def _is_installed() -> bool:
    try:
        importlib.metadata.distribution("duopool")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
