"""`duopool bench`: fixed workloads against a running server or one of its own; a table and a JSON file."""

from __future__ import annotations

import asyncio
import json
import math
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from duopool import __version__
from duopool.cluster.bench_report import METRICS, PERCENTILES, Series, page
from duopool.cluster.completions import Completion, complete_all
from duopool.cluster.config import ClusterConfig
from duopool.cluster.machine import describe_machine
from duopool.cluster.measure import Measurement, measure, median_of, percentile
from duopool.cluster.serve_command import DType, TransportChoice
from duopool.cluster.system import System
from duopool.cluster.terminal import EXIT_FAILED, clear_errors, complain, describe, err, out, progress, set_up_logging
from duopool.cluster.workloads import WORKLOADS, Burst, bursts, warm_up
from duopool.core.config import HandoffConfig, ModelConfig


class Workload(StrEnum):
    """What to run."""

    single = "single"
    c8 = "c8"
    c32 = "c32"
    prefix = "prefix"
    all = "all"


def bench(
    workload: Annotated[
        Workload,
        typer.Argument(
            help="single: 512 tokens in, 128 out, alone. c8, c32: 8 or 32 at once, 224 to 288 in, 64 out. prefix: 16 "
            "at once with 1,024 shared and 64 own tokens, 16 out, then 16 more with new own tokens."
        ),
    ] = Workload.all,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each workload; medians are shown.")] = 3,
    address: Annotated[
        str | None, typer.Option(help="HOST:PORT of a running router; a system of its own is started if not given.")
    ] = None,
    model: Annotated[str, typer.Option(help="Model of the own system.")] = "smollm2",
    dtype: Annotated[DType, typer.Option(help="Number format of the own system.")] = DType.bfloat16,
    prefill: Annotated[int, typer.Option(min=1, help="Prefill workers of the own system.")] = 1,
    decode: Annotated[int, typer.Option(min=1, help="Decode workers of the own system.")] = 1,
    transport: Annotated[TransportChoice, typer.Option(help="Transport of the own system.")] = TransportChoice.auto,
    num_threads: Annotated[int | None, typer.Option(min=1, help="Compute threads per worker.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Write all numbers, machine and versions as JSON here, and a report with plots as .html."),
    ] = None,
) -> None:
    """Measure time to first token, time between tokens, throughput and handover."""
    set_up_logging(verbose=False)
    names = WORKLOADS if workload is Workload.all else (workload.value,)
    config = ClusterConfig(
        prefill=prefill,
        decode=decode,
        model=ModelConfig(model=model, dtype=dtype.value),
        handoff=HandoffConfig(transport=transport.value),
        num_threads=num_threads,
        port=0,
    )
    try:
        with clear_errors(address), _server(address, config) as target:
            results = asyncio.run(_run_all(target, names, runs))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    measured = {name: [measure(records) for records in runs] for name, runs in results.items()}
    medians = {name: median_of(measurements) for name, measurements in measured.items()}
    out.print(_table(medians))
    if output is not None:
        machine = describe_machine()
        command = shlex.join(["duopool", *sys.argv[1:]])
        report = {
            "duopool": __version__,
            "command": command,
            "server": address or config.model_dump(mode="json"),
            "machine": machine,
            "median": {name: _plain(measurement) for name, measurement in medians.items()},
            "runs": {name: [_plain(each) for each in measurements] for name, measurements in measured.items()},
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        html = output.with_suffix(".html")
        facts = {"command": command, **{name: str(value) for name, value in machine.items()}}
        html.write_text(page(f"Duopool {__version__}", _series(results, measured), facts=facts), encoding="utf-8")
        err.print(f"wrote {output} and {html}", highlight=False)


def _series(results: Mapping[str, list[list[Completion]]], measured: Mapping[str, list[Measurement]]) -> list[Series]:
    return [
        Series(
            system="duopool",
            workload=name,
            runs={metric.name: [getattr(each, metric.name) for each in measured[name]] for metric in METRICS},
            percentiles_ms=[1e3 * percentile(gaps, percent) for percent in PERCENTILES] if gaps else [],
        )
        for name, runs in results.items()
        for gaps in [[gap for records in runs for record in records for gap in record.inter_token_s]]
    ]


@contextmanager
def _server(address: str | None, config: ClusterConfig) -> Iterator[str]:
    if address is not None:
        yield address
        return
    with progress() as report:
        system = System.start(config, report=report)
    with system:
        yield system.address


async def _run_all(address: str, names: tuple[str, ...], runs: int) -> dict[str, list[list[Completion]]]:
    """Every run of every workload, one after another; burst name -> the records of each run."""
    await _run(address, warm_up())
    results: dict[str, list[list[Completion]]] = {}
    for name in names:
        for run in range(runs):
            for burst in bursts(name, run=run):
                err.print(f"{burst.name}, run {run + 1} of {runs}", highlight=False)
                results.setdefault(burst.name, []).append(await _run(address, burst))
    return results


async def _run(address: str, burst: Burst) -> list[Completion]:
    records = await complete_all(address, burst.requests)
    for record in records:
        if record.finished is None:
            said = describe(record.error) if record.error is not None else "a stream ended early"
            complain(f"{burst.name}: {said}")
            raise typer.Exit(EXIT_FAILED)
    return records


def _table(medians: Mapping[str, Measurement]) -> Table:
    table = Table(header_style="bold", box=SIMPLE_HEAD, title="medians; times in ms", title_justify="left")
    table.add_column("workload", no_wrap=True)
    for name in ("TTFT p50", "TTFT max", "ITL p50", "ITL p99", "tokens/s", "cached", "handover", "handover/step"):
        table.add_column(name, justify="right")
    for name, each in medians.items():
        table.add_row(
            name,
            *(_number(value, 0) for value in (each.ttft_p50_ms, each.ttft_max_ms)),
            *(_number(value, 1) for value in (each.inter_token_p50_ms, each.inter_token_p99_ms)),
            _number(each.output_tokens_per_s, 1),
            f"{each.cached_tokens / each.prompt_tokens:.0%}",
            _number(each.handover_p50_ms, 1),
            _number(each.handover_per_decode_step, 2),
        )
    return table


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _plain(measurement: Measurement) -> dict[str, Any]:
    """JSON has no NaN."""
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in asdict(measurement).items()
    }
