"""deploy/prometheus and deploy/grafana ask for metrics that exist, in expressions that Prometheus understands."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from shutil import which
from typing import Any

import httpx
import pytest
import yaml
from router_fakes import FakeCluster

from duopool.proto import inference_pb2 as pb

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
REQUEST = pb.GenerateRequest(
    token_ids=pb.TokenIds(ids=range(40, 60)), sampling=pb.SamplingParams(max_tokens=4, ignore_eos=True)
)
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


@pytest.mark.skipif(which("prometheus") is None, reason="prometheus is not installed")
def test_a_real_prometheus_scrapes_a_router_and_answers_the_board(tmp_path: Path) -> None:
    """The scrape file as it is, but for the port; every panel's expression gets an answer, the central ones a value."""

    async def run() -> None:
        async with FakeCluster(http_port=0) as cluster:
            async for _ in cluster.inference.Generate(REQUEST):
                pass
            text = (DEPLOY / "prometheus" / "prometheus.yml").read_text()
            assert text.count("127.0.0.1:8000") == 1
            text = text.replace("127.0.0.1:8000", f"127.0.0.1:{cluster.router.http_port}")
            (tmp_path / "prometheus.yml").write_text(text.replace("scrape_interval: 5s", "scrape_interval: 1s"))
            (tmp_path / "rules.yml").write_text((DEPLOY / "prometheus" / "rules.yml").read_text())
            async with prometheus(tmp_path) as client:
                async with asyncio.timeout(60):
                    while not await values(client, "duopool:generation_tokens_total"):
                        await asyncio.sleep(0.2)
                assert await values(client, 'up{job="duopool"}') == [1.0]
                assert await values(client, "sum(duopool:generation_tokens_total)") == [4.0]
                assert await values(client, 'sum(duopool:worker_up{role="decode"})') == [1.0]
                for expression in board_expressions():
                    await values(client, expression.replace("$__rate_interval", "1m"))
                rules = (await client.get("/api/v1/rules")).json()["data"]["groups"][0]["rules"]
                assert {rule["health"] for rule in rules} <= {"ok", "unknown"}

    asyncio.run(run())


@contextlib.asynccontextmanager
async def prometheus(folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    process = await asyncio.create_subprocess_exec(
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with httpx.AsyncClient(base_url=f"http://{address}") as client, asyncio.timeout(90):
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if (await client.get("/-/ready")).status_code == 200:
                        break
                await asyncio.sleep(0.1)
            yield client
    finally:
        process.terminate()
        await process.wait()


async def values(client: httpx.AsyncClient, expression: str) -> list[float]:
    answer = (await client.get("/api/v1/query", params={"query": expression})).json()
    assert answer["status"] == "success", (expression, answer)
    return [float(series["value"][1]) for series in answer["data"]["result"]]
