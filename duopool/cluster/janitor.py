"""Clears up after a local Ray, however its driver ended (its own process: `python janitor.py FOLDER`).

Waits until its standard input is closed, which the death of the driver does too. Then it ends every process that has a
file of Ray's folder open (some of Ray's agents outlive a killed driver) and removes the folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

GRACE_S = 3.0
"""Ray's own shutdown gets this long before processes are killed."""
TIMEOUT_S = 20.0


class Janitor:
    """The janitor's process, held by the driver."""

    def __init__(self, folder: Path) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-I", str(Path(__file__).resolve()), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            # Ctrl-C in a terminal reaches the whole group; the janitor comes last.
            start_new_session=True,
        )

    def clear_up(self) -> None:
        """Let it work and wait for it. Safe to call twice."""
        if self._child.stdin is not None:
            self._child.stdin.close()
        try:
            self._child.wait(timeout=TIMEOUT_S + GRACE_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()


def clear(folder: Path) -> None:
    """End the processes that use the folder and remove it."""
    deadline = time.monotonic() + GRACE_S
    while users(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    deadline = time.monotonic() + TIMEOUT_S
    while (alive := users(folder)) and time.monotonic() < deadline:
        for process in alive:
            try:
                process.kill()
            except psutil.Error:
                continue
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)


def users(folder: Path) -> list[psutil.Process]:
    """Own processes with a file of the folder open or named on their command line; neither this one nor its driver."""
    spared = (os.getpid(), os.getppid())
    return [process for process in psutil.process_iter() if process.pid not in spared and _uses(process, f"{folder}/")]


def _uses(process: psutil.Process, prefix: str) -> bool:
    try:
        if process.uids().real != os.getuid() or process.status() == psutil.STATUS_ZOMBIE:
            return False
        return any(file.path.startswith(prefix) for file in process.open_files()) or any(
            f"={prefix}" in argument or argument.startswith(prefix) for argument in process.cmdline()
        )
    except (psutil.Error, OSError):
        return False


def main() -> None:
    """Wait for the driver, then clear up."""
    sys.stdin.read()
    clear(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
