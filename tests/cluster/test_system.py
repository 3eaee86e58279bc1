"""What a worker is started with: the settings of its own pool."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from duopool.cluster import system as system_module
from duopool.cluster.config import ClusterConfig
from duopool.cluster.launch import RayCluster
from duopool.cluster.system import System
from duopool.core.config import InternalConfig, ModelConfig, WorkerConfig
from duopool.core.types import Role, WorkerId

Started = dict[Role, tuple[WorkerConfig, dict[str, Any]]]
Start = Callable[..., Started]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Has one worker of each pool started on a Ray with so many GPUs: its settings and its actor's options."""
    credential = tmp_path / "credential"
    credential.write_text("a credential of a test, long enough to pass\n")
    credential.chmod(0o600)
    started: Started = {}

    def spawn(worker: WorkerConfig, *, options: dict[str, Any]) -> None:
        started[worker.role] = worker, options

    monkeypatch.setattr(system_module, "RayWorkerProcess", spawn)
    # Not the real one: it reads its settings when it is first imported, and other tests start it with theirs.
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(cluster_resources=dict))

    def begin(*, is_local: bool = True, num_gpus: float = 0, **settings: Any) -> Started:
        config = ClusterConfig(
            model=ModelConfig(model="/a/folder", served_model_name="tiny"),
            internal=InternalConfig(credential_file=str(credential)),
            **settings,
        )
        cluster = RayCluster(
            address="nowhere", is_local=is_local, num_cpus=2, num_gpus=num_gpus, janitor=None, control_plane=None
        )
        asked = ClusterConfig(model=ModelConfig(model="asked"), decode_model="asked, quantized")
        system = System(config, cluster, asked=asked)
        for role in Role:
            system._spawn(WorkerId(f"{role}-0"), role)
        return started

    return begin


@pytest.mark.parametrize("is_local", [True, False])
def test_decode_workers_alone_have_other_weights(is_local: bool, start: Start) -> None:
    started = start(is_local=is_local, decode_model="/a/quantized/folder", decode_quantization="int8")
    models = {role: worker.model for role, (worker, _) in started.items()}
    assert models[Role.PREFILL].quantization is None
    assert models[Role.PREFILL].weights is None
    assert models[Role.DECODE].quantization == "int8"
    assert models[Role.DECODE].weights == ("/a/quantized/folder" if is_local else "asked, quantized")
    assert {model.model for model in models.values()} == {"/a/folder" if is_local else "asked"}
    assert {model.served_model_name for model in models.values()} == {"tiny"}


def test_a_gpu_is_claimed_by_workers_that_may_use_it_and_told_to_them(start: Start) -> None:
    for worker, options in start(num_gpus=1).values():
        assert (worker.device, worker.cache.gpu_share, options["num_gpus"]) == ("auto", 0.5, 0.5)
        assert not worker.shares_cores
    for worker, options in start().values():
        assert (worker.device, options["num_gpus"]) == ("cpu", 0)
        assert worker.shares_cores
    mixed = start(num_gpus=1, prefill_device="cuda", decode_quantization="int8")
    assert [(worker.device, options["num_gpus"]) for worker, options in mixed.values()] == [("cuda", 1), ("cpu", 0)]


def test_weights_are_rounded_on_the_cpu_only() -> None:
    with pytest.raises(ValidationError, match=r"decode.quantization .* decode.device is cuda"):
        ClusterConfig(decode_quantization="int8", decode_device="cuda")
