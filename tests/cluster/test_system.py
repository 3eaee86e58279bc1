"""What a worker is started with: the settings of its own pool."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from duopool.cluster import system as system_module
from duopool.cluster.config import ClusterConfig
from duopool.cluster.launch import RayCluster
from duopool.cluster.system import System
from duopool.core.config import InternalConfig, ModelConfig, WorkerConfig
from duopool.core.types import Role, WorkerId


@pytest.mark.parametrize("is_local", [True, False])
def test_decode_workers_alone_round_their_weights(
    is_local: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    credential = tmp_path / "credential"
    credential.write_text("a credential of a test, long enough to pass\n")
    credential.chmod(0o600)
    config = ClusterConfig(
        model=ModelConfig(model="/a/folder", served_model_name="tiny"),
        decode_quantization="int8",
        internal=InternalConfig(credential_file=str(credential)),
    )
    started: list[WorkerConfig] = []

    def spawn(worker: WorkerConfig, *, options: dict[str, Any]) -> None:
        started.append(worker)

    monkeypatch.setattr(system_module, "RayWorkerProcess", spawn)
    # Not the real one: it reads its settings when it is first imported, and other tests start it with theirs.
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(cluster_resources=dict))
    cluster = RayCluster(address="nowhere", is_local=is_local, num_cpus=2, num_gpus=0, janitor=None, control_plane=None)
    system = System(config, cluster, asked_model=ModelConfig(model="asked"))
    for role in Role:
        system._spawn(WorkerId(f"{role}-0"), role)
    models = {worker.role: worker.model for worker in started}
    assert models[Role.PREFILL].quantization is None
    assert models[Role.DECODE].quantization == "int8"
    assert {model.model for model in models.values()} == {"/a/folder" if is_local else "asked"}
    assert {model.served_model_name for model in models.values()} == {"tiny"}
