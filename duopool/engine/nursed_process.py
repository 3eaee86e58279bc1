"""A worker as its host sees it: started from a nursery, called over a socket, started again when it has died.

Owns the nursery's process and the socket to the worker that lives now. Imports neither torch nor Ray; the host is a Ray
actor. Its methods may be called from any thread; a call waits for the one before it.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec

from duopool.core.config import WorkerConfig
from duopool.core.errors import DuopoolError
from duopool.core.messages import WorkerInfo

MAX_PACKET_BYTES = 1 << 17


class WorkerEnded(DuopoolError):
    """The worker's process, or the nursery that should fork it, is gone."""


class WorkerRaised(DuopoolError):
    """What the worker raised; the text names the exception."""


class NursedProcess:
    """`start`, and `start` again after the worker has died. Everything ends with the process that made this."""

    def __init__(self, config: WorkerConfig, module: str) -> None:
        """`module` is a role's process module; its nursery begins to load the model at once."""
        self._lock = threading.Lock()
        self._worker: socket.socket | None = None
        self._host, nursery = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with nursery:
            self._nursery = subprocess.Popen(
                [sys.executable, "-m", module, str(nursery.fileno())],
                pass_fds=(nursery.fileno(),),
                stdin=subprocess.DEVNULL,
                env=_environment(),
            )
        self._host.send(config.model_dump_json().encode())

    def start(self) -> WorkerInfo:
        """Fork a worker and wait until it serves; returns its registration. An earlier worker's socket is closed."""
        with self._lock:
            if self._worker is not None:
                self._worker.close()
            self._worker, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                try:
                    socket.send_fds(self._host, [b"+"], [theirs.fileno()])
                except OSError as error:
                    raise WorkerEnded(f"the nursery is gone: {error}") from error
            return msgspec.convert(self._receive(), WorkerInfo)

    def info(self) -> WorkerInfo | None:
        return msgspec.convert(self._call("info"), WorkerInfo | None)

    def drain(self) -> None:
        """Take nothing new; what is here is finished."""
        self._call("drain")

    def is_idle(self) -> bool:
        """True if the worker may end without anyone noticing."""
        return bool(self._call("is_idle"))

    def check(self) -> None:
        """Have the worker prove its invariants; raise AssertionError naming what is wrong."""
        self._call("check")

    def stop(self) -> None:
        """End the worker and its nursery."""
        with self._lock:
            self._host.close()
            if self._worker is not None:
                self._worker.close()
                self._worker = None
        self._nursery.wait()

    def _call(self, name: str) -> Any:
        with self._lock:
            if self._worker is None:
                raise WorkerEnded("the worker was not started")
            try:
                self._worker.send(name.encode())
            except OSError as error:
                raise WorkerEnded(f"the worker is gone: {error}") from error
            return self._receive()

    def _receive(self) -> Any:
        assert self._worker is not None
        try:
            packet = self._worker.recv(MAX_PACKET_BYTES)
        except OSError as error:
            raise WorkerEnded(f"the worker is gone: {error}") from error
        if not packet:
            raise WorkerEnded("the worker's process ended")
        answer = msgspec.msgpack.decode(packet)
        if answer.get("kind") == "AssertionError":
            raise AssertionError(answer["error"])
        if "kind" in answer:
            raise WorkerRaised(f"{answer['kind']}: {answer['error']}")
        return answer.get("value")


def _environment() -> dict[str, str]:
    """This process's, with our package on the path however this process found it."""
    source = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(part for part in (source, os.environ.get("PYTHONPATH", "")) if part)
    return {**os.environ, "PYTHONPATH": path}
