"""Which pools compute on GPUs, and how many workers share one: pure choices from what was asked and what Ray has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from duopool.core.config import DeviceName
from duopool.core.errors import Unavailable
from duopool.core.types import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuPlan:
    """What each worker of a pool is told, and asks Ray for."""

    devices: Mapping[Role, DeviceName]
    """`auto` only where Ray has a GPU for the worker: whether torch can use it is found out there."""
    share: float
    """Of a GPU, for a worker that is not sure to compute on the CPU."""

    def num_gpus(self, role: Role) -> float:
        """What a worker of this pool claims from Ray."""
        return 0.0 if self.devices[role] == "cpu" else self.share

    @property
    def uses_gpus(self) -> bool:
        return any(self.num_gpus(role) for role in self.devices)


def plan_gpus(
    asked: Mapping[Role, DeviceName],
    wanted: Mapping[Role, int],
    *,
    num_gpus: float,
    share: float | None,
    waits_for_nodes: bool,
) -> GpuPlan:
    """Settle `auto`, and how much of a GPU a worker gets: `share` if given, else as much as lets all fit.

    `num_gpus` is what Ray has at the start; with `waits_for_nodes` more may come. Raises Unavailable, naming the
    setting, rather than have workers wait for a GPU that is not there.
    """
    has_gpus = num_gpus >= 1 and share != 0
    devices: dict[Role, DeviceName] = {
        role: "cpu" if device == "auto" and not has_gpus else device for role, device in asked.items()
    }
    on_gpus = [role for role, device in devices.items() if device != "cpu"]
    num_workers = sum(wanted[role] for role in on_gpus)
    if not num_workers:
        return GpuPlan(devices=devices, share=0.0)
    if share == 0:
        raise Unavailable(f"num-gpus-per-worker: 0, and {on_gpus[0]}.device is {devices[on_gpus[0]]}")
    if waits_for_nodes:
        return GpuPlan(devices=devices, share=share or 1.0)
    if num_gpus < 1:
        raise Unavailable(
            f"{on_gpus[0]}.device: cuda was asked for, and Ray has no GPU: CUDA_VISIBLE_DEVICES and 'nvidia-smi' say "
            "what this machine shows; --pin-pools waits for nodes that are still to come"
        )
    share = share or even_share(num_gpus, num_workers)
    num_places = math.floor(num_gpus) * math.floor(1 / share)
    if num_workers > num_places:
        raise Unavailable(
            f"num-gpus-per-worker: {num_workers} workers with {share:g} of a GPU each, and on the {num_gpus:g} that "
            f"Ray has {num_places} fit"
        )
    return GpuPlan(devices=devices, share=share)


def even_share(num_gpus: float, num_workers: int) -> float:
    """The largest share with which all find a place, each on one GPU; in hundredths, and one at least."""
    return max(1, math.floor(100 / math.ceil(num_workers / math.floor(num_gpus)))) / 100
