"""`duopool demo`: a whole system on this machine, eight prompts at once, what happened to each."""

from __future__ import annotations

import asyncio
import signal
from types import FrameType
from typing import Annotated

import typer

from duopool.cluster.completion_view import StreamView, stage_table
from duopool.cluster.completions import complete_all
from duopool.cluster.config import ClusterConfig
from duopool.cluster.demo_prompts import demo_requests
from duopool.cluster.system import System
from duopool.cluster.terminal import EXIT_FAILED, clear_errors, complain, out, progress, set_up_logging
from duopool.core.config import ModelConfig


def demo(
    model: Annotated[
        str, typer.Option(help="'smollm2' (embedded), a Hugging Face folder, a hub name or a .gguf file.")
    ] = "smollm2",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what supervisor and router do.")] = False,
) -> None:
    """Start a router, a prefill and a decode worker, stream eight prompts at once, show each one's stage times."""
    set_up_logging(verbose=verbose)
    config = ClusterConfig(model=ModelConfig(model=model), port=0)
    signal.signal(signal.SIGTERM, _interrupt)
    titles = [title for title, _ in demo_requests()]
    try:
        with clear_errors():
            with progress() as report:
                system = System.start(config, report=report)
            with system, StreamView(titles, out) as view:
                signal.signal(signal.SIGTERM, _interrupt)
                requests = [request for _, request in demo_requests()]
                records = asyncio.run(complete_all(system.address, requests, on_update=view.update))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    out.print(stage_table(titles, records))
    num_finished = sum(record.finished is not None for record in records)
    if num_finished < len(records):
        complain(f"{len(records) - num_finished} of {len(records)} requests failed")
        raise typer.Exit(EXIT_FAILED)
    out.print(f"{num_finished} requests finished; everything is stopped", highlight=False)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
