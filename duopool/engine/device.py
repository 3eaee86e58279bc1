"""Where a worker computes: the choice of the device, and what is told of it.

A process that has touched CUDA cannot be forked any more, so nothing here may be called before a worker is one of its
own.
"""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass

import torch

from duopool.core.config import DeviceName
from duopool.core.errors import Unavailable


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """A device's memory in bytes, as one process sees it."""

    total: int
    free: int
    own: int
    """What this process has taken."""


def choose_device(asked: DeviceName) -> torch.device:
    """The device that was asked for; Ray shows a worker its own GPU alone. Raises Unavailable without CUDA."""
    if asked == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    if asked == "auto":
        return torch.device("cpu")
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    raise Unavailable(
        f"device: cuda was asked for, and torch {torch.__version__} finds no CUDA device here "
        f"(CUDA_VISIBLE_DEVICES is {'not set' if shown is None else repr(shown)})"
    )


def device_memory(device: torch.device) -> DeviceMemory:
    """Of a CUDA device, after what loading left behind was given back."""
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return DeviceMemory(total=total, free=free, own=torch.cuda.memory_reserved(device))


def describe(device: torch.device) -> str:
    """For an operator: empty on the CPU."""
    return f"on {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
