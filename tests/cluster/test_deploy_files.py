"""The files of deploy/ are what Ray, Kubernetes and Slurm take, and ask for what workers and flags are called."""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import typer
import yaml

from duopool import __version__
from duopool.cluster import cli
from duopool.cluster.placement import actor_options, has_pool_nodes
from duopool.core.types import Role

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES_VERSION = "1.34"


@pytest.fixture(scope="module")
def cluster_file() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text())
    return content


def test_ray_takes_the_file(cluster_file: dict[str, Any]) -> None:
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(cluster_file, schema)
    assert cluster_file["head_node_type"] in cluster_file["available_node_types"]


@pytest.mark.parametrize("role", Role)
def test_a_worker_fits_the_node_type_of_its_pool_only(cluster_file: dict[str, Any], role: Role) -> None:
    types = cluster_file["available_node_types"]
    assert types[role.value]["max_workers"] > types[role.value]["min_workers"] >= 1
    assert has_pool_nodes({name: 8 for node in types.values() for name in node["resources"]})
    options = actor_options(role, is_pinned=True, num_threads=4, num_gpus=0)
    fitting = {
        name
        for name, node in types.items()
        if all(node["resources"].get(r, 0) >= n for r, n in options["resources"].items())
    }
    assert fitting == {role.value}
    assert options["max_restarts"] == 0
    assert options["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "4"


def test_without_node_types_workers_go_anywhere() -> None:
    assert not has_pool_nodes({"CPU": 4.0})
    assert "resources" not in actor_options(Role.DECODE, is_pinned=False, num_threads=1, num_gpus=0)


def test_nodes_of_one_pool_are_not_for_the_other() -> None:
    """Whichever pool's nodes join first."""
    assert all(has_pool_nodes({"CPU": 4.0, role.value: 1.0}) for role in Role)


# ---- Kubernetes ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def manifests() -> dict[str, dict[str, Any]]:
    return {manifest["kind"]: manifest for manifest in yaml.safe_load_all((DEPLOY / "kuberay.yaml").read_text())}


def pod_templates(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    groups = {group["groupName"]: group["template"] for group in cluster["spec"]["workerGroupSpecs"]}
    return {"head": cluster["spec"]["headGroupSpec"]["template"], **groups}


def test_kubernetes_takes_every_pod_and_the_service(manifests: dict[str, dict[str, Any]]) -> None:
    for name, template in pod_templates(manifests["RayCluster"]).items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, **template["metadata"]}}
        kubernetes_validate.validate({**pod, "spec": template["spec"]}, KUBERNETES_VERSION, strict=True)
    service = manifests["Service"]
    kubernetes_validate.validate(service, KUBERNETES_VERSION, strict=True)
    head = pod_templates(manifests["RayCluster"])["head"]
    assert service["spec"]["selector"].items() <= head["metadata"]["labels"].items()
    ports = {port["name"] for container in head["spec"]["containers"] for port in container.get("ports", ())}
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports


@pytest.mark.parametrize("role", Role)
def test_a_worker_fits_the_pods_of_its_pool_only(manifests: dict[str, dict[str, Any]], role: Role) -> None:
    groups = {
        group["groupName"]: json.loads(json.loads(group["rayStartParams"]["resources"]))
        for group in manifests["RayCluster"]["spec"]["workerGroupSpecs"]
    }
    assert has_pool_nodes({name: 8.0 for resources in groups.values() for name in resources})
    wanted = actor_options(role, is_pinned=True, num_threads=4, num_gpus=0)["resources"]
    fitting = {
        group
        for group, resources in groups.items()
        if all(resources.get(name, 0) >= number for name, number in wanted.items())
    }
    assert fitting == {role.value}


# ---- Slurm -----------------------------------------------------------------------------------------------------------


def run_slurm(folder: Path, nodes: int, **variables: str) -> list[list[str]]:
    """What each node would run: `srun` runs its command once a node, `ray` prints its arguments."""
    programs = {
        "scontrol": "echo node-0",
        "srun": 'shift 2; for at in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do SLURM_PROCID=$at "$@"; done',
        "ray": "printf '%s\\037' \"$@\"; echo",
    }
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_NUM_NODES": str(nodes)}
    result = subprocess.run(
        [DEPLOY / "slurm.sh", "--max-num-seqs", "8"],
        env={**environment, "SLURM_JOB_NODELIST": "node-[0-5]", **variables},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return [line.split("\037")[:-1] for line in result.stdout.splitlines()]


@pytest.mark.parametrize("nodes", [1, 2, 3, 6])
def test_slurm_gives_every_worker_that_is_asked_for_a_node(nodes: int, tmp_path: Path) -> None:
    runs = run_slurm(tmp_path, nodes)
    assert len(runs) == nodes
    offered = [json.loads(run[run.index("--resources") + 1]) for run in runs]
    for run in runs:
        assert run[run.index("--address") + 1] == "node-0:6379"
        assert run[-2:] == ["--max-num-seqs", "8"]
        for role in Role:
            wanted = int(run[run.index(f"--{role.value}") + 1])
            assert wanted == sum(resources.get(role.value, 0) for resources in offered) >= 1


def test_slurm_refuses_a_split_without_decode(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failed:
        run_slurm(tmp_path, 2, PREFILL_NODES="2")
    assert "leaves none for decode" in failed.value.stderr


# ---- flags and versions ----------------------------------------------------------------------------------------------


def commands() -> dict[str, list[str]]:
    """Every `duopool ...` command line that deploy/ starts, by file."""
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / "duopool.service")
    router = next(
        container
        for manifest in yaml.safe_load_all((DEPLOY / "kuberay.yaml").read_text())
        if manifest["kind"] == "RayCluster"
        for container in manifest["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
        if container["name"] == "router"
    )
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    slurm = re.search(r"-- duopool (.*) \"\$@\"", (DEPLOY / "slurm.sh").read_text())
    last = re.search(r"^CMD (.*)$", dockerfile, re.MULTILINE)
    assert slurm is not None
    assert last is not None
    return {
        "duopool.service": shlex.split(unit["Service"]["ExecStart"])[1:],
        "kuberay.yaml": [*router["command"], *router["args"]][1:],
        "Dockerfile": json.loads(last[1]),
        "slurm.sh": shlex.split(slurm[1]),
    }


@pytest.mark.parametrize("file", ["duopool.service", "kuberay.yaml", "Dockerfile", "slurm.sh"])
def test_every_flag_is_one_of_the_command(file: str) -> None:
    command, *arguments = commands()[file]
    group: Any = typer.main.get_command(cli.app)
    known = {name for parameter in group.commands[command].params for name in parameter.opts}
    assert {argument for argument in arguments if argument.startswith("--")} <= known


def test_every_flag_in_the_guides_is_one_of_a_command() -> None:
    group: Any = typer.main.get_command(cli.app)
    every = [*group.commands.values()]
    every += [one for command in every for one in getattr(command, "commands", {}).values()]
    known = {name for command in every for parameter in command.params for name in (*parameter.opts, "--help")}
    known |= {name for command in every for parameter in command.params for name in parameter.secondary_opts}
    wrong = [
        f"{file.name}: {flag}"
        for file in (ROOT / "README.md", ROOT / "docs/security.md", *sorted((ROOT / "docs/guides").glob("*.md")))
        for line in file.read_text().splitlines()
        if not line.startswith(("curl ", "smg ", "pip "))
        for flag in re.findall(r"(?<![\w/-])--[a-z][a-z0-9.-]*[a-z0-9](?![*\w-])", line)
        if flag not in known
    ]
    assert wrong == []


def test_the_image_is_built_from_what_is_there_and_named_after_the_version() -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    sources = [
        name for line in re.findall(r"^COPY (?!--from)(.*)$", dockerfile, re.MULTILINE) for name in line.split()[:-1]
    ]
    assert sources
    kept = (ROOT / ".dockerignore").read_text().split()
    for name in sources:
        assert (ROOT / name).exists()
        assert f"!{name}" in kept
    assert f"duopool:{__version__}" in dockerfile
    assert set(re.findall(r"image: (\S+)", (DEPLOY / "kuberay.yaml").read_text())) == {f"duopool:{__version__}"}
