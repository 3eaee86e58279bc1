"""Pools on node types of their own: a Ray cluster of three nodes here, with the resources that deploy/ uses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from calls import complete, greedy_request, has_workers, scale, wait_for
from remains import Remains

from duopool.cluster.config import ClusterConfig
from duopool.cluster.system import System
from duopool.core.config import CacheConfig, HandoffConfig, ModelConfig

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def ray_cluster(nothing_remains: Remains, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    import ray
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    head = {"num_cpus": 0, "object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for role in ("prefill", "decode"):
        cluster.add_node(num_cpus=1, resources={role: 2}, object_store_memory=80 << 20)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_workers_run_on_the_nodes_of_their_pool(ray_cluster: Any, tiny_model: Path) -> None:
    import ray

    config = ClusterConfig(
        port=0,
        model=ModelConfig(model=str(tiny_model)),
        cache=CacheConfig(num_blocks=64),
        handoff=HandoffConfig(transport="grpc"),
        ray_address=ray_cluster.address,
        num_threads=1,
    )
    with System.start(config) as system:
        node_of = {
            role: node["NodeID"] for node in ray.nodes() for role in ("prefill", "decode") if role in node["Resources"]
        }
        assert len(set(node_of.values())) == 2
        scale(system.address, decode=2)
        now = wait_for(system.address, has_workers({"prefill-0", "decode-0", "decode-1"}))
        assert {worker.worker_id: worker.node_id for worker in now.workers} == {
            "prefill-0": node_of["prefill"],
            "decode-0": node_of["decode"],
            "decode-1": node_of["decode"],
        }
        prompt = list(range(100, 230))
        records = complete(system.address, [greedy_request(prompt, max_tokens=8, salt=b"%d" % at) for at in range(3)])
        assert len({tuple(record.token_ids) for record in records}) == 1
        assert all(record.finished is not None and record.finished.times.transfer_blocks > 0 for record in records)
    # Leaving a cluster that we only joined must not stop it.
    ray.init(address=ray_cluster.address, logging_level="ERROR", log_to_driver=False)
    assert sum(node["Alive"] for node in ray.nodes()) == 3
