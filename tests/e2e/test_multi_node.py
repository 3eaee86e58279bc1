"""Pools on node types of their own: a Ray cluster of three nodes here, with the resources that deploy/ uses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from calls import Load, complete, greedy_request, has_workers, scale, wait_for
from remains import Remains

from duopool.cluster.config import ClusterConfig, SupervisorConfig
from duopool.cluster.system import System
from duopool.core.config import CacheConfig, HandoffConfig, ModelConfig

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

EVERYONE = {"prefill-0", "decode-0", "decode-1"}
# Ray's own patience with a silent node is 15 s.
FAST_HEALTH_CHECK = {
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 2,
}


@pytest.fixture(scope="module")
def ray_cluster(nothing_remains: Remains, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    import ray
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    head = {"num_cpus": 0, "object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={**head, "_system_config": FAST_HEALTH_CHECK})
    for role in ("prefill", "decode"):
        add_node(cluster, role)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def system(ray_cluster: Any, tiny_model: Path) -> Iterator[System]:
    config = ClusterConfig(
        port=0,
        model=ModelConfig(model=str(tiny_model)),
        cache=CacheConfig(num_blocks=64),
        handoff=HandoffConfig(transport="grpc"),
        supervisor=SupervisorConfig(backoff_s=0.05, max_backoff_s=0.05),
        ray_address=ray_cluster.address,
        num_threads=1,
    )
    with System.start(config) as running:
        scale(running.address, decode=2)
        wait_for(running.address, has_workers(EVERYONE))
        yield running


def test_workers_run_on_the_nodes_of_their_pool(system: System) -> None:
    assert nodes_of_workers(system) == {
        "prefill-0": node_with("prefill"),
        "decode-0": node_with("decode"),
        "decode-1": node_with("decode"),
    }
    assert node_with("prefill") != node_with("decode")
    prompt = list(range(100, 230))
    records = complete(system.address, [greedy_request(prompt, max_tokens=8, salt=b"%d" % at) for at in range(3)])
    assert len({tuple(record.token_ids) for record in records}) == 1
    assert all(record.finished is not None and record.finished.times.transfer_blocks > 0 for record in records)


def test_streams_outlive_the_only_node_of_their_pool(system: System, ray_cluster: Any) -> None:
    """They wait for a node of that kind, and no worker of the pool goes to another pool's node meanwhile."""
    prompts = [tuple(range(200 + 40 * at, 230 + 40 * at)) for at in range(6)]
    whole = complete(system.address, [greedy_request(prompt, max_tokens=24) for prompt in prompts])
    expected = [tuple(record.token_ids) for record in whole]
    killed = node_with("decode")
    with Load(system.address, prompts, expected) as load:
        load.wait_until_served_by(EVERYONE)
        kill_node(ray_cluster, killed)
        wait_for(system.address, has_workers({"prefill-0"}))
        add_node(ray_cluster, "decode")
        wait_for(system.address, has_workers(EVERYONE))
    assert load.wrong == []
    with Load(system.address, prompts, expected) as load:
        load.wait_until_served_by(EVERYONE)
    assert load.wrong == []
    nodes = nodes_of_workers(system)
    assert nodes["decode-0"] == nodes["decode-1"] == node_with("decode") not in (killed, nodes["prefill-0"])


def test_leaving_a_cluster_does_not_stop_it(system: System, ray_cluster: Any) -> None:
    import ray

    system.stop()
    ray.init(address=ray_cluster.address, logging_level="ERROR", log_to_driver=False)
    assert {name for node in ray.nodes() if node["Alive"] for name in node["Resources"]} >= {"prefill", "decode"}


def add_node(cluster: Any, role: str) -> None:
    """Another node that takes two workers of this pool."""
    cluster.add_node(num_cpus=1, resources={role: 2}, object_store_memory=80 << 20)


def kill_node(cluster: Any, node_id: str) -> None:
    """`kill -9` of everything that runs on it, workers first, as when its power goes."""
    (node,) = [node for node in cluster.worker_nodes if node.node_id == node_id]
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    for process in [*raylet.children(recursive=True), raylet]:
        process.kill()
    cluster.remove_node(node, allow_graceful=False)


def node_with(resource: str) -> str:
    """The live node that carries this resource."""
    import ray

    (found,) = [node["NodeID"] for node in ray.nodes() if node["Alive"] and resource in node["Resources"]]
    return str(found)


def nodes_of_workers(system: System) -> dict[str, str]:
    now = wait_for(system.address, has_workers(EVERYONE))
    return {worker.worker_id: worker.node_id for worker in now.workers}
