"""The live page shows what is there, without a word of what was said."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from headless_browser import BROWSER, tab
from router_fakes import FakeCluster, FakeWorker, eventually, expected_output

from duopool.core.block_keys import block_keys
from duopool.core.messages import KvSnapshot
from duopool.proto import inference_pb2 as pb
from duopool.router.http.live import PAGE, routes

PROMPT = list(range(40, 60))


def request(max_tokens: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        request_id="the-clients-own-name",
        token_ids=pb.TokenIds(ids=PROMPT),
        sampling=pb.SamplingParams(max_tokens=max_tokens, ignore_eos=True),
    )


@contextlib.asynccontextmanager
async def served(cluster: FakeCluster) -> AsyncIterator[str]:
    """The page's address."""
    page = FastAPI()
    page.include_router(routes(cluster.router.live, tick_s=0.05))
    server = uvicorn.Server(uvicorn.Config(page, port=0, log_level="error", timeout_graceful_shutdown=0))
    task = asyncio.create_task(server.serve())
    await eventually(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await task


async def first_event(address: str) -> dict[str, Any]:
    async with httpx.AsyncClient() as client, client.stream("GET", f"{address}/live/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        async for line in stream.aiter_lines():
            if line.startswith("data: "):
                return json.loads(line.removeprefix("data: "))
    raise AssertionError("the stream ended without an event")


def test_snapshot_holds_workers_requests_and_prefixes_but_no_text_and_no_name() -> None:
    async def run() -> tuple[dict[str, Any], dict[str, Any]]:
        workers = [FakeWorker("prefill-0", "prefill"), FakeWorker("decode-0", "decode", step_s=0.02)]
        async with FakeCluster(workers) as cluster, served(cluster) as address:
            block_size, namespace = cluster.router.pools.namespace()
            keys = tuple(block_keys(PROMPT, block_size=block_size, namespace=namespace))
            workers[0].say(KvSnapshot(sequence=1, paths=(keys,)))
            await eventually(lambda: cluster.router.pools.prefix_runs())
            call = cluster.inference.Generate(request(200))
            for _ in range(4):
                await call.read()
            during = await first_event(address)
            call.cancel()
            await eventually(lambda: cluster.router.pools.num_requests == 0)
            return during, await first_event(address)

    during, after = asyncio.run(run())
    assert [worker["id"] for worker in during["workers"]] == ["decode-0", "prefill-0"]
    assert (during["rates"]["alive"], after["rates"]["alive"]) == (1, 0)
    (alive,), (ended,) = during["requests"], after["requests"]
    assert (alive["phase"], alive["end"]) == ("decoding", "")
    assert (ended["phase"], ended["end"]) == ("cancelled", "abort")
    assert alive["id"] == ended["id"]
    assert alive["began_s_ago"] >= alive["total_s"] > 0
    assert during["prefixes"]["runs"] == [{"depth": 0, "blocks": 5, "hits": 1, "holders": ["prefill-0"]}]
    text = json.dumps([during, after])
    assert "the-clients-own-name" not in text
    assert not re.search("".join(map(chr, expected_output(PROMPT, 3))), text)


def test_page_loads_nothing_from_elsewhere() -> None:
    page = PAGE.read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page)
    assert "innerHTML" not in page


@pytest.mark.skipif(BROWSER is None, reason="no Chromium (Debian: chromium) is installed")
def test_a_browser_draws_every_worker_and_request_on_a_desk_and_on_a_phone() -> None:
    async def run() -> None:
        async with FakeCluster() as cluster, served(cluster) as address, tab() as page:
            for _ in range(3):
                async for _ in cluster.inference.Generate(request(3)):
                    pass
            await page.open(address)
            async with asyncio.timeout(40):
                while await page.ask("document.querySelectorAll('.row').length") != 3:
                    await asyncio.sleep(0.05)
            cards = "[...document.querySelectorAll('[data-worker]')].map((card) => card.dataset.worker)"
            assert await page.ask(cards) == ["prefill-0", "decode-0"]
            assert await page.ask("document.querySelectorAll('path.edge').length") == 1
            assert await page.ask("document.querySelector('.row .about').firstChild.data") == f"{len(PROMPT)}+3"
            grounds = set()
            for width, dark in ((1280, False), (360, True)):
                await page.resize(width, 800, dark=dark)
                assert await page.ask("document.documentElement.scrollWidth") <= width
                grounds.add(await page.ask("getComputedStyle(document.body).backgroundColor"))
            assert len(grounds) == 2

    asyncio.run(run())
