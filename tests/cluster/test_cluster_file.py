"""deploy/ray-cluster.yaml is what Ray takes, and its node types are the ones that workers ask for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from duopool.cluster.placement import actor_options, gpu_share
from duopool.core.types import Role, WorkerId

FILE = Path(__file__).resolve().parents[2] / "deploy" / "ray-cluster.yaml"


@pytest.fixture(scope="module")
def cluster_file() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    content: dict[str, Any] = yaml.safe_load(FILE.read_text())
    return content


def test_ray_takes_the_file(cluster_file: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(cluster_file, schema)
    assert cluster_file["head_node_type"] in cluster_file["available_node_types"]


@pytest.mark.parametrize("role", Role)
def test_a_worker_fits_the_node_type_of_its_pool_only(cluster_file: dict[str, Any], role: Role) -> None:
    types = cluster_file["available_node_types"]
    assert types[role.value]["max_workers"] > types[role.value]["min_workers"] >= 1
    totals = {name: 8 for node in types.values() for name in node["resources"]}
    options = actor_options(WorkerId("w"), role, totals, num_threads=4, num_gpus=0)
    fitting = {
        name
        for name, node in types.items()
        if all(node["resources"].get(r, 0) >= n for r, n in options["resources"].items())
    }
    assert fitting == {role.value}
    assert options["max_restarts"] == 0
    assert options["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "4"


def test_without_node_types_workers_go_anywhere() -> None:
    assert "resources" not in actor_options(WorkerId("w"), Role.DECODE, {"CPU": 4.0}, num_threads=1, num_gpus=0)


@pytest.mark.parametrize(("gpus", "workers"), [(0, 2), (1, 2), (1, 3), (4, 2), (8, 3)])
def test_even_gpu_shares_never_ask_for_more_than_there_is(gpus: float, workers: int) -> None:
    share = gpu_share(gpus, workers, None)
    assert 0 <= share <= 1
    assert share * workers <= gpus
    assert gpu_share(gpus, workers, 0.25) == 0.25
