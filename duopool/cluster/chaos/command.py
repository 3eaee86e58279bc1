"""`duopool chaos`: kill workers of a system of its own under streams with known tokens; a table of what was seen."""

from __future__ import annotations

import asyncio
import math
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from random import Random
from typing import Annotated

import typer
from rich.table import Table

from duopool.cluster.chaos.killer import Freeze, Kill, Killer
from duopool.cluster.chaos.requests import mixed_requests
from duopool.cluster.chaos.streams import Streams, Tally, answer_all
from duopool.cluster.config import ClusterConfig, SupervisorConfig
from duopool.cluster.serve_command import TransportChoice
from duopool.cluster.system import System
from duopool.cluster.terminal import EXIT_FAILED, clear_errors, complain, err, out, progress, set_up_logging
from duopool.core.config import CacheConfig, HandoffConfig, ModelConfig
from duopool.core.types import Role
from duopool.engine.failpoints import FOLDER_VARIABLE

NUM_QUESTIONS = 48
MOST_COMPLAINTS = 5
STOP_S = 10.0


class Victims(StrEnum):
    """Which pools lose workers."""

    prefill = "prefill"
    decode = "decode"
    both = "both"


def chaos(
    kills: Annotated[int, typer.Option(min=1, help="Workers to kill, in each pool that is named by --role.")] = 10,
    role: Annotated[Victims, typer.Option(help="Pool whose workers are killed.")] = Victims.both,
    streams: Annotated[int, typer.Option(min=1, help="Requests under way at any time.")] = 32,
    stops: Annotated[int, typer.Option(min=0, help="Workers to stop for 10 s besides, in each pool.")] = 0,
    seconds: Annotated[float, typer.Option(min=1, help="No further worker is killed after this time.")] = math.inf,
    seed: Annotated[int, typer.Option(help="Draws requests, victims and failpoints.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Workers in each pool.")] = 2,
    model: Annotated[str, typer.Option(help="Model that is served, in float32.")] = "smollm2",
    transport: Annotated[TransportChoice, typer.Option(help="How KV blocks travel.")] = TransportChoice.auto,
) -> None:
    """Kill -9 random workers at failpoints and compare every stream, token for token, with its unfaulted run."""
    set_up_logging(verbose=False)
    roles = list(Role) if role is Victims.both else [Role(role.value)]
    with clear_errors(), tempfile.TemporaryDirectory(prefix="duopool-failpoints-") as folder:
        os.environ[FOLDER_VARIABLE] = folder
        with progress() as report:
            system = System.start(chaos_config(model, workers=workers, transport=transport), report=report)
        with system:
            tally, deaths, freezes = run(
                system, Path(folder), roles * kills, frozen=roles * stops, limit_s=seconds, streams=streams, seed=seed
            )
    out.print(_table(deaths, freezes, tally))
    for text in tally.complaints[:MOST_COMPLAINTS]:
        complain(text)
    if not tally.is_good:
        raise typer.Exit(EXIT_FAILED)


def chaos_config(
    model: str, *, workers: int, transport: TransportChoice = TransportChoice.auto, routers: int = 1
) -> ClusterConfig:
    """Prompts are always handed over, and a worker that dies is replaced at once, however often it dies."""
    return ClusterConfig(
        prefill=workers,
        decode=workers,
        port=0,
        model=ModelConfig(model=model, dtype="float32"),
        routers=routers,
        cache=CacheConfig(num_blocks=1024),
        handoff=HandoffConfig(transport=transport.value, local_prefill_max_tokens=0),
        num_threads=1,
        supervisor=SupervisorConfig(backoff_s=0.05, max_backoff_s=0.05),
    )


def run(
    system: System,
    folder: Path,
    roles: Sequence[Role],
    *,
    frozen: Sequence[Role] = (),
    stop_s: float = STOP_S,
    limit_s: float = math.inf,
    streams: int,
    seed: int,
) -> tuple[Tally, list[Kill], list[Freeze]]:
    """Kill a worker of each of these pools, one after the other, then stop one of each that shall be frozen.

    Ends with every worker's proof of its invariants.
    """
    random = Random(seed)
    questions = asyncio.run(answer_all(system.address, mixed_requests(NUM_QUESTIONS, random)))
    killer = Killer(system.address, folder, random)
    deaths: list[Kill] = []
    freezes: list[Freeze] = []
    try:
        with Streams(system.address, questions, count=streams, seed=seed) as running:
            began_at = time.monotonic()
            for at, role in enumerate(roles):
                if time.monotonic() - began_at > limit_s:
                    break
                deaths.append(killer.kill(role))
                # Retries and suspicion of poison are bounded: a request may meet one kill, and must survive it.
                running.wait_until_none_is_older(deaths[-1].killed_at)
                err.print(_line(at, deaths[-1], running.tally), highlight=False, soft_wrap=True)
            for role in frozen:
                freezes.append(killer.freeze(role, stop_s))
                err.print(f"{freezes[-1]}; {running.tally}", highlight=False, soft_wrap=True)
                running.wait_until_none_is_older(time.monotonic())
    finally:
        killer.close()
    system.check()
    return running.tally, deaths, freezes


def _line(at: int, kill: Kill, tally: Tally) -> str:
    problems = "".join(f"; {text}" for text in tally.complaints[:MOST_COMPLAINTS])
    return (
        f"{at + 1}: {kill.worker_id} at {kill.place}, back after {kill.back_after_s:.1f} s; {tally.requests} requests, "
        f"{tally.retried} retried, {tally.lost} lost, {tally.doubled} doubled, {tally.changed} changed{problems}"
    )


def _table(deaths: Sequence[Kill], freezes: Sequence[Freeze], tally: Tally) -> Table:
    table = Table("what", "result", header_style="bold")
    for role in Role:
        places = Counter(kill.place for kill in deaths if kill.role is role)
        if places:
            spread = ", ".join(f"{place} {count}" for place, count in sorted(places.items()))
            table.add_row(f"{role} workers killed", f"{places.total()}: {spread}")
    back = [kill.back_after_s for kill in deaths]
    table.add_row(
        "from kill to ready", f"median {statistics.median(back):.1f} s, longest {max(back, default=math.nan):.1f} s"
    )
    if freezes:
        noticed = max(freeze.noticed_after_s for freeze in freezes)
        table.add_row("stopped for 10 s", f"{len(freezes)}: noticed after {noticed:.1f} s at most")
    table.add_row("requests, tokens", f"{tally.requests:,}, {tally.tokens:,}; {tally.retried:,} took another attempt")
    table.add_row("longest pause between tokens", f"{tally.longest_pause_s:.1f} s")
    table.add_row("longest wait for a first token", f"{tally.longest_wait_s:.1f} s")
    for name in ("lost", "doubled", "changed"):
        table.add_row(name, str(getattr(tally, name)))
    return table
