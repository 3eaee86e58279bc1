"""What a measurement ran on: processor, cores, memory, versions."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from pathlib import Path
from typing import Any

import psutil

from duopool.cluster.launch import available_cpus

FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16")
PACKAGES = ("torch", "transformers", "ray", "grpcio", "nixl-cu12", "triton")


def describe_machine() -> dict[str, Any]:
    """Facts as JSON values."""
    processor, flags = _processor()
    return {
        "cpu": processor,
        "cpu_flags": [flag for flag in FLAGS if flag in flags],
        "cores": available_cpus(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": sys.version.split()[0],
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _processor() -> tuple[str, set[str]]:
    """Model name and flags; no flags where /proc/cpuinfo is missing."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor(), set()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return fields.get("model name", platform.processor()), set(fields.get("flags", "").split())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
