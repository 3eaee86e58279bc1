"""Every worker that may compute on a GPU finds a place on one, or the start names the setting that asks too much."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duopool.cluster.gpus import GpuPlan, plan_gpus
from duopool.core.config import DeviceName
from duopool.core.errors import Unavailable
from duopool.core.types import Role

DEVICES = st.sampled_from(["auto", "cpu", "cuda"])


def plan(
    prefill: DeviceName = "auto",
    decode: DeviceName = "auto",
    *,
    workers: tuple[int, int] = (1, 1),
    num_gpus: float = 0,
    share: float | None = None,
    waits: bool = False,
) -> GpuPlan:
    return plan_gpus(
        {Role.PREFILL: prefill, Role.DECODE: decode},
        {Role.PREFILL: workers[0], Role.DECODE: workers[1]},
        num_gpus=num_gpus,
        share=share,
        waits_for_nodes=waits,
    )


@given(
    DEVICES,
    DEVICES,
    st.tuples(st.integers(1, 256), st.integers(1, 256)),
    st.integers(0, 16),
    st.none() | st.floats(0.01, 1),
)
def test_workers_fit_on_the_gpus_one_by_one_or_are_refused(
    prefill: DeviceName, decode: DeviceName, workers: tuple[int, int], num_gpus: int, share: float | None
) -> None:
    try:
        found = plan(prefill, decode, workers=workers, num_gpus=num_gpus, share=share)
    except Unavailable:
        is_to_blame = "cuda" in (prefill, decode) or share is not None or sum(workers) > 100 * num_gpus
        assert is_to_blame
        return
    room = [1.0] * num_gpus
    for role, number in zip((Role.PREFILL, Role.DECODE), workers, strict=True):
        for _ in range(number if found.num_gpus(role) else 0):
            best = max(range(num_gpus), key=room.__getitem__)
            assert room[best] >= found.num_gpus(role) - 1e-9
            room[best] -= found.num_gpus(role)
    for role, asked in ((Role.PREFILL, prefill), (Role.DECODE, decode)):
        on_gpu = num_gpus > 0 if asked == "auto" else asked == "cuda"
        assert (found.num_gpus(role) > 0) == on_gpu
        assert (found.devices[role] == "cpu") == (not on_gpu)


def test_one_gpu_is_shared_and_spare_gpus_are_whole() -> None:
    assert plan(num_gpus=1).share == 0.5
    assert plan(num_gpus=8).share == 1
    assert plan(workers=(1, 2), num_gpus=2).share == 0.5
    assert plan("cuda", "cpu", num_gpus=1).num_gpus(Role.PREFILL) == 1
    assert plan("cuda", "cpu", num_gpus=1).num_gpus(Role.DECODE) == 0


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_cuda_without_a_gpu_names_the_pool(role: str) -> None:
    with pytest.raises(Unavailable, match=f"^{role}.device: cuda was asked for, and Ray has no GPU"):
        plan(**{role: "cuda"})


def test_what_does_not_fit_is_said_with_its_numbers() -> None:
    with pytest.raises(Unavailable, match=r"3 workers with 1 of a GPU each, and on the 2 that Ray has 2 fit"):
        plan(workers=(1, 2), num_gpus=2, share=1)
    with pytest.raises(Unavailable, match=r"^num-gpus-per-worker: 0, and decode.device is cuda"):
        plan("cpu", "cuda", num_gpus=2, share=0)


def test_without_gpus_or_with_none_of_them_everything_computes_on_the_cpu() -> None:
    for found in (plan(), plan(num_gpus=4, share=0), plan("cpu", "cpu", num_gpus=4)):
        assert not found.uses_gpus
        assert set(found.devices.values()) == {"cpu"}


def test_pinned_pools_wait_for_the_nodes_that_are_to_come() -> None:
    found = plan("cuda", "cuda", workers=(2, 4), waits=True)
    assert math.isclose(found.num_gpus(Role.DECODE), 1)
    assert plan("cuda", "auto", waits=True, share=0.5).devices[Role.DECODE] == "cpu"
