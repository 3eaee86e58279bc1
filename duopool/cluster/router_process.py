"""The router's process: started as a plain child, never a Ray driver, and started again if it ends.

Owns the child and where it listens. The port that the first one got is kept by its successors.
"""

from __future__ import annotations

import json
import logging
import os
import re
import select
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

from duopool.core.config import RouterConfig
from duopool.core.errors import DuopoolError

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 10.0
_INFO = re.compile(r" (INFO|DEBUG) ")


class RouterFailed(DuopoolError):
    """The router ended before it listened; the text holds what it said last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listening:
    """Where a router listens."""

    port: int
    http_port: int
    """0 without an HTTP face."""
    internal_port: int


class RouterProcess:
    """One router at a time: `launch` it, then `poll` until it listens."""

    def __init__(self, config: RouterConfig, *, module: str = "duopool.router.main") -> None:
        self._config = config
        self._module = module
        self._child: subprocess.Popen[str] | None = None
        self._last_lines: list[str] = []

    @property
    def pid(self) -> int:
        """Process id of the current child, 0 if there is none."""
        return self._child.pid if self._child is not None else 0

    @property
    def has_ended(self) -> bool:
        """True if there was a child and it is gone."""
        return self._child is not None and self._child.poll() is not None

    def launch(self) -> None:
        """Start a child; returns at once. Call from a thread that lives as long as the router shall."""
        command = [sys.executable, "-m", "duopool.cluster.bound_process", str(os.getpid()), self._module]
        self._child = subprocess.Popen(
            [*command, "--config", self._config.model_dump_json()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=_environment(),
            # Ctrl-C reaches the whole foreground group; the router ends when it is told to, after its requests. It
            # stays in this session: Linux shares cores out by sessions (autogroup) before it looks at processes, and
            # a session that sleeps as often as a router's has waited half a second for its turn beside busy workers.
            process_group=0,
        )
        self._last_lines = []
        threading.Thread(target=self._forward_errors, args=(self._child,), name="router-stderr", daemon=True).start()

    def poll(self) -> Listening | None:
        """Where the child listens, once; None before. Raises RouterFailed if it ended instead."""
        child = self._child
        if child is None or child.stdout is None:
            raise RouterFailed("the router was not started")
        if not select.select([child.stdout], [], [], 0)[0]:
            return None
        line = child.stdout.readline()
        if not line:
            child.wait()
            time.sleep(0.1)
            raise RouterFailed("the router ended at its start: " + "\n".join(self._last_lines[-5:]))
        told = json.loads(line)
        listening = Listening(**told)
        http_port = None if self._config.http_port is None else listening.http_port
        self._config = self._config.model_copy(update={"port": listening.port, "http_port": http_port})
        return listening

    def stop(self) -> None:
        """End the child, first kindly. Safe to call twice."""
        child, self._child = self._child, None
        if child is None:
            return
        child.terminate()
        try:
            child.wait(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        for stream in (child.stdout, child.stderr):
            if stream is not None:
                stream.close()

    def _forward_errors(self, child: subprocess.Popen[str]) -> None:
        """Pass the child's stderr on as log lines; keep the end of it for RouterFailed."""
        assert child.stderr is not None
        try:
            for line in child.stderr:
                self._last_lines = [*self._last_lines[-20:], line.rstrip()]
                logger.log(logging.INFO if _INFO.search(line) else logging.WARNING, "router: %s", line.rstrip())
        except ValueError:
            return  # closed by stop()


def _environment() -> dict[str, str]:
    from duopool.cluster.placement import source_folder

    path = os.pathsep.join(part for part in (source_folder(), os.environ.get("PYTHONPATH", "")) if part)
    quiet = {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "GRPC_VERBOSITY": "ERROR"}
    return {**os.environ, **quiet, "PYTHONPATH": path}
