"""Duopool beside vLLM and llama.cpp on this machine, through each one's HTTP interface, with the same prompts.

    python benchmarks/bench_peers.py --vllm VENV/bin/vllm --llama-server BUILD/bin/llama-server --gguf MODEL.gguf

One system runs at a time, warmed up; medians over the runs. Writes a table, an HTML report with plots and all numbers
into --output. The first system in the table is Duopool, and every ratio is Duopool's number over the peer's. How the
peers are installed is in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

from peers.loads import WORKLOADS, Measurement, median_of, run, warm
from peers.report import markdown, page
from peers.systems import System, duopool, llama_cpp, running, vllm

from duopool.cluster.machine import describe_machine
from duopool.engine.model_source import resolve_model


def systems(arguments: argparse.Namespace) -> list[System]:
    own = Path(sys.executable).with_name("duopool")
    threads = os.cpu_count() or 1
    found = [duopool("duopool", own, arguments.model, "--dtype", "bfloat16")]
    for quantization in arguments.quantization:
        options = ("--dtype", "bfloat16", f"--decode.quantization={quantization}")
        found.append(duopool(f"duopool {quantization}", own, arguments.model, *options))
    if arguments.vllm:
        found.append(vllm("vllm", arguments.vllm, resolve_model(arguments.model).folder, threads))
    for file in arguments.gguf:
        found.append(llama_cpp(f"llama.cpp {file.stem.split('-')[-1]}", arguments.llama_server, file, threads))
    return [system for system in found if arguments.only in system.name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--vllm", type=Path, help="vLLM's command line")
    parser.add_argument("--llama-server", type=Path)
    parser.add_argument("--gguf", type=Path, nargs="*", default=[], help="models for llama.cpp")
    parser.add_argument("--quantization", nargs="*", default=[], help="of Duopool's decode pool, a system each")
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=WORKLOADS)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", default="", help="systems whose name has this in it")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/peers-report"))
    arguments = parser.parse_args()
    if arguments.gguf and not arguments.llama_server:
        parser.error("--gguf needs --llama-server")
    arguments.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, list[Measurement]]] = {}
    for system in systems(arguments):
        print(f"{system.name}: {shlex.join(system.command)}", flush=True)
        log = arguments.output / f"{system.name.replace(' ', '-')}.log"
        with running(system, log) as endpoint:
            asyncio.run(warm(endpoint))
            for workload in arguments.workloads:
                for number in range(arguments.runs):
                    for burst, measurement in asyncio.run(run(endpoint, workload, number)).items():
                        results.setdefault(system.name, {}).setdefault(burst, []).append(measurement)
                        print(f"  {burst}: {_line(measurement)}", flush=True)
        _write(arguments.output, results)
    print((arguments.output / "table.md").read_text())


def _line(one: Measurement) -> str:
    between = f"{one.itl_p50:.1f} / {one.itl_p99:.1f} ms"
    return f"first {one.ttft_p50:.0f} ms, between {between}, {one.tokens_per_s:.1f} tokens/s"


def _write(folder: Path, results: dict[str, dict[str, list[Measurement]]]) -> None:
    medians = {system: {burst: median_of(runs) for burst, runs in found.items()} for system, found in results.items()}
    machine, command = describe_machine(), shlex.join(["python", *sys.argv])
    (folder / "table.md").write_text(markdown(medians), encoding="utf-8")
    (folder / "report.html").write_text(page(medians, machine=str(machine), command=command), encoding="utf-8")
    runs = {
        system: {burst: [asdict(each) for each in measured] for burst, measured in found.items()}
        for system, found in results.items()
    }
    (folder / "results.json").write_text(
        json.dumps({"command": command, "machine": machine, "runs": runs}, indent=2) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
