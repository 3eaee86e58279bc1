"""Starts and ends the systems that are compared: Duopool, vLLM and llama.cpp's server."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from peers.streams import Endpoint

START_LIMIT_S = 420.0
STOP_LIMIT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """How one system is started; `{port}` stands for the port it is to listen on."""

    name: str
    command: tuple[str, ...]
    health: str
    """A path that answers 200 when requests are taken."""
    path: str = "/v1/completions"
    model: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


def duopool(name: str, executable: Path, model: str, *options: str) -> System:
    return System(
        name=name,
        command=(str(executable), "serve", "--model", model, "--port", "0", "--http-port", "{port}", *options),
        health="/ready",
        model=model,
    )


def vllm(name: str, executable: Path, folder: Path, num_threads: int) -> System:
    return System(
        name=name,
        command=(
            *(str(executable), "serve", str(folder), "--dtype", "bfloat16", "--port", "{port}"),
            *("--max-model-len", "4096", "--max-num-seqs", "64"),
        ),
        health="/health",
        model=str(folder),
        environment={"VLLM_CPU_OMP_THREADS_BIND": f"0-{num_threads - 1}", "VLLM_CPU_KVCACHE_SPACE": "1"},
    )


def llama_cpp(name: str, executable: Path, file: Path, num_threads: int) -> System:
    threads = str(num_threads)
    return System(
        name=name,
        command=(
            *(str(executable), "-m", str(file), "--port", "{port}", "-t", threads, "-tb", threads),
            *("-np", "32", "-c", "65536", "-ub", "512"),
        ),
        health="/health",
        path="/completion",
    )


@contextmanager
def running(system: System, log: Path) -> Iterator[Endpoint]:
    """Start, wait until it takes requests, end it and all it started. Raises RuntimeError with the log's end."""
    port = _free_port()
    command = [part.replace("{port}", str(port)) for part in system.command]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **system.environment},
            start_new_session=True,
        )
        try:
            _wait(process, f"http://127.0.0.1:{port}{system.health}", log)
            yield Endpoint(port=port, path=system.path, model=system.model)
        finally:
            _end(process)


def _wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    limit = time.monotonic() + START_LIMIT_S
    while time.monotonic() < limit:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    tail = log.read_text(errors="replace")[-2000:]
    raise RuntimeError(f"{process.args!r} does not answer at {address}:\n{tail}")


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_LIMIT_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
