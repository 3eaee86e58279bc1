"""Looks for what a serving system must not leave behind: processes, folders, listening ports."""

from __future__ import annotations

import socket
import tempfile
import time
from pathlib import Path

import psutil

WAIT_S = 20.0


class Remains:
    """Remembers what there was; `check` fails on anything new of ours."""

    def __init__(self) -> None:
        self._processes = set(_children())
        self._folders = set(_folders())
        self.addresses: list[str] = []
        """Of running systems, host:port."""

    def watch(self, address: str) -> None:
        """This host:port must be closed in the end."""
        self.addresses.append(address)

    def check(self) -> None:
        deadline = time.monotonic() + WAIT_S
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert left == []

    def _left(self) -> list[str]:
        processes = [f"{process.pid} {_name(process)}" for process in _children() if process not in self._processes]
        folders = [str(folder) for folder in _folders() if folder not in self._folders]
        return processes + folders + [address for address in self.addresses if is_open(address)]


def _children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _folders() -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob("duopool-*"))


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:200]
    except psutil.Error:
        return "(ended)"


def is_open(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True
