"""Keeps a checked model in a small process of its own, and forks a worker from it as often as one is wanted.

A worker that dies is followed by one whose weights are already in memory (shared until somebody writes, which nobody
does): what is left to do is a KV store, a port and a warm-up. The process has one thread, computes with one thread and
opens neither gRPC nor NIXL, so that a fork of it is whole. CUDA does not outlive a fork: a worker that may compute on a
GPU loads its model itself, and the nursery spares it the imports alone.

    host ── configuration ─▶ nursery          (a Ray actor; see nursed_process.py)
    host ── a socket ──────▶ nursery ── fork ─▶ worker, which answers the host's calls on that socket

Everything here ends when the host does: its sockets are closed then, however it ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

import msgspec
import torch

from duopool.core.config import WorkerConfig
from duopool.engine.checked_model import CheckedModel
from duopool.engine.device import choose_device
from duopool.engine.worker_process import Assembly, WorkerParts, WorkerProcess

log = logging.getLogger(__name__)

CALLS = ("info", "drain", "is_idle", "check")
"""Methods of WorkerProcess that the host may call."""
MAX_PACKET_BYTES = 1 << 17
MAX_ERROR_CHARS = 4096


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a worker's process says to its host: a value in plain types, or what was raised."""

    value: Any = None
    error: str = ""
    kind: str = ""
    """Name of the exception's class."""


def main(assemble: Callable[[WorkerParts], Assembly]) -> None:
    """Body of a role's process module: the number of the host's socket stands on the command line."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    with socket.socket(fileno=int(sys.argv[1])) as host:
        _nurse(host, assemble)


def _nurse(host: socket.socket, assemble: Callable[[WorkerParts], Assembly]) -> None:
    config = WorkerConfig.model_validate_json(host.recv(MAX_PACKET_BYTES))
    num_threads = config.num_threads or torch.get_num_threads()
    torch.set_num_threads(1)  # a thread pool would not survive the fork
    model, failure = _check(config) if config.device == "cpu" else (None, None)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # dead workers vanish by themselves
    child = 0
    while (wanted := _receive_socket(host)) is not None:
        with wanted:
            if failure is not None:
                _answer(wanted, failure)
            elif (child := os.fork()) == 0:
                host.close()
                torch.set_num_threads(num_threads)
                _work(wanted, lambda: WorkerProcess(config, assemble, model or _load(config)))
    # A worker that is stopped does not see that the host is gone.
    if child:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def _load(config: WorkerConfig) -> CheckedModel:
    return CheckedModel.load(config.model, config.cache, progress=log.info, device=choose_device(config.device))


def _check(config: WorkerConfig) -> tuple[CheckedModel | None, Answer | None]:
    """The model, or why there is none."""
    try:
        model = _load(config)
        if model.masks is not None:
            model.masks.wait()
        _settle()
        return model, None
    except Exception as error:
        log.exception("the model cannot be served")
        return None, _failure(error)


def _settle() -> None:
    """Give back what loading took and freed, and keep collections away from what is left.

    A collection that looks at it holds a worker up for 0.2 s, and copies the pages that it shares with the nursery.
    """
    gc.collect()
    gc.freeze()
    with contextlib.suppress(AttributeError):  # a C library without it
        ctypes.CDLL(None).malloc_trim(0)


def _receive_socket(host: socket.socket) -> socket.socket | None:
    """The end of a new worker's socket; None when the host is gone."""
    try:
        _, (number, *_), _, _ = socket.recv_fds(host, 1, 1)
    except (OSError, ValueError):
        return None
    return socket.socket(fileno=number)


def _work(host: socket.socket, make: Callable[[], WorkerProcess]) -> None:
    """Life of a forked worker. Never returns: what the nursery would do at its end is not a worker's to do."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        process = make()
        _answer(host, Answer(value=msgspec.to_builtins(process.start())))
        _serve_calls(host, process)
    except Exception as error:
        log.exception("the worker cannot go on")
        _answer(host, _failure(error))
    finally:
        logging.shutdown()
        os._exit(0)


def _serve_calls(host: socket.socket, process: WorkerProcess) -> None:
    while packet := host.recv(MAX_PACKET_BYTES):
        name = packet.decode()
        try:
            if name not in CALLS:
                raise ValueError(f"{name!r} is no call of a host")
            _answer(host, Answer(value=msgspec.to_builtins(getattr(process, name)())))
        except (Exception, AssertionError) as error:
            _answer(host, _failure(error))


def _answer(host: socket.socket, answer: Answer) -> None:
    with contextlib.suppress(OSError):  # the host is gone: the next receive says so
        host.send(msgspec.msgpack.encode(answer))


def _failure(error: BaseException) -> Answer:
    return Answer(error=str(error)[:MAX_ERROR_CHARS], kind=type(error).__name__)
