"""Every setting has one value and says who gave it: flag > environment > file > default."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from duopool.cluster.cli import app
from duopool.cluster.config import ClusterConfig
from duopool.cluster.pools import worker_id_of
from duopool.core.types import Role

ORIGINS = ("flag", "environment", "file")


def show(*arguments: str, environment: dict[str, str] | None = None) -> dict[str, list[str]]:
    """The rows of `duopool config show` by setting: value, origin."""
    result = CliRunner().invoke(app, ["config", "show", *arguments], env={"COLUMNS": "160", **(environment or {})})
    assert result.exit_code == 0, result.output
    rows = (line.strip("│").split("│") for line in result.output.splitlines() if line.startswith("│"))
    return {name.strip(): [value.strip(), origin.strip().split(" ")[0]] for name, value, origin in rows}


@pytest.mark.parametrize("given", [(), ORIGINS[2:], ORIGINS[1:], ORIGINS])
def test_the_strongest_origin_wins(given: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "duopool.yaml"
    file.write_text("max-num-seqs: 3\n" if "file" in given else "")
    flags = ["--max-num-seqs", "1"] if "flag" in given else []
    environment = {"DUOPOOL_MAX_NUM_SEQS": "2"} if "environment" in given else {}
    expected = {"flag": "1", "environment": "2", "file": "3", "default": "64"}
    origin = given[0] if given else "default"
    rows = show("--config", str(file), *flags, environment=environment)
    assert rows["max-num-seqs"] == [expected[origin], origin]
    assert {row[1] for name, row in rows.items() if name != "max-num-seqs"} == {"default"}


def test_the_limits_of_the_waiting_room_reach_every_router() -> None:
    rows = show("--max-num-waiting-tokens", "4096", environment={"DUOPOOL_MAX_WAIT_S": "2.5"})
    assert rows["max-num-waiting-tokens"] == ["4096", "flag"]
    assert rows["max-wait-s"] == ["2.5", "environment"]
    config = ClusterConfig(routers=2, max_num_waiting_tokens=4096, max_wait_s=2.5)
    for number in range(2):
        router = config.router(number)
        assert (router.max_num_waiting_tokens, router.max_wait_s) == (4096, 2.5)


def test_every_place_of_both_pools_has_a_gateway_port_of_its_own() -> None:
    config = ClusterConfig(smg_port=50100)
    ports = {
        (role, at): config.worker(worker_id_of(role, at), role, host="h", num_threads=1, shares_cores=True).smg_port
        for role in Role
        for at in range(8)
    }
    assert len(set(ports.values())) == len(ports)
    assert [ports[Role.PREFILL, 0], ports[Role.DECODE, 0], ports[Role.DECODE, 3]] == [50100, 50101, 50107]
    off = ClusterConfig().worker(worker_id_of(Role.DECODE, 1), Role.DECODE, host="h", num_threads=1, shares_cores=True)
    assert off.smg_port is None


def test_the_printed_file_gives_the_same_settings(tmp_path: Path) -> None:
    flags = ["--prefill", "2", "--dtype", "float32", "--num-blocks", "77"]
    file = tmp_path / "duopool.yaml"
    file.write_text(CliRunner().invoke(app, ["config", "show", "--yaml", *flags]).output)
    assert yaml.safe_load(file.read_text())["num-blocks"] == 77
    values = {name: row[0] for name, row in show(*flags).items()}
    assert {name: row[0] for name, row in show("--config", str(file)).items()} == values


@pytest.mark.parametrize(
    ("content", "named"),
    [("prot: 1\n", "'prot'"), ("- 1\n", "list"), ("port: [\n", "duopool.yaml"), ("port: x\n", "--port")],
)
def test_a_wrong_file_is_refused_by_name(content: str, named: str, tmp_path: Path) -> None:
    file = tmp_path / "duopool.yaml"
    file.write_text(content)
    result = CliRunner().invoke(app, ["serve", "--config", str(file)], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert named in result.output
