"""deploy/prometheus and deploy/grafana ask for metrics that exist, in expressions that Prometheus understands."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import yaml
from router_fakes import FakeCluster

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
BOARD = DEPLOY / "grafana" / "boards" / "duopool.json"
needs_promtool = pytest.mark.skipif(which("promtool") is None, reason="promtool (Debian: prometheus) is not installed")


def board_expressions() -> list[str]:
    board = json.loads(BOARD.read_text())
    return [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]


def rules() -> Iterator[dict[str, Any]]:
    for group in yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text())["groups"]:
        yield from group["rules"]


@pytest.fixture(scope="module")
def known_names() -> set[str]:
    """Every series that a router shows, with the labels taken off."""

    async def page() -> str:
        async with FakeCluster() as cluster:
            return cluster.router.metrics.page().decode()

    text = asyncio.run(page())
    names = {re.split(r"[{ ]", line)[0] for line in text.splitlines() if not line.startswith("#")}
    # A counter with labels of its own has no series before its first event, but says that it is there.
    declared = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    return names | declared


def test_every_metric_that_is_asked_for_exists(known_names: set[str]) -> None:
    expressions = [*board_expressions(), *(rule["expr"] for rule in rules())]
    asked = {name for expression in expressions for name in re.findall(r"duopool:[a-z0-9_]+", expression)}
    assert len(asked) > 20
    assert asked <= known_names


def test_the_board_has_no_overlap_and_no_panel_without_a_description() -> None:
    board = json.loads(BOARD.read_text())
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        assert panel["type"] == "row" or panel["description"], panel["title"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


@needs_promtool
def test_prometheus_understands_every_expression_of_the_board(tmp_path: Path) -> None:
    file = tmp_path / "board.yml"
    records = [
        {"record": f"panel_{at}", "expr": expression.replace("$__rate_interval", "1m")}
        for at, expression in enumerate(board_expressions())
    ]
    file.write_text(yaml.safe_dump({"groups": [{"name": "board", "rules": records}]}))
    subprocess.run(["promtool", "check", "rules", file], check=True, capture_output=True, timeout=60)


@needs_promtool
@pytest.mark.parametrize("arguments", [("check", "config", "prometheus.yml"), ("test", "rules", "rules-test.yml")])
def test_prometheus_takes_the_files_and_the_alerts_fire_when_they_should(arguments: tuple[str, ...]) -> None:
    subprocess.run(["promtool", *arguments], cwd=DEPLOY / "prometheus", check=True, capture_output=True, timeout=60)
