"""The control plane (GCS) of a local Ray: started again, over the state that it left on disk, whenever it dies.

Owns the command line of the one process and its successor. Requests do not depend on it: routers and workers talk over
their own connections, and a worker that dies is forked anew by its host. Placing actors has to wait until it is back.
"""

from __future__ import annotations

import contextlib
import logging
import re
import subprocess

import psutil

logger = logging.getLogger(__name__)

PROCESS_NAME = "gcs_server"
STOP_TIMEOUT_S = 5.0
_PORT = re.compile(r"^--gcs_server_port=.*")


class ControlPlane:
    """Made by the driver right after it has started its Ray; `tick` now and then. One thread."""

    def __init__(self, gcs_address: str) -> None:
        """`gcs_address` is host:port of the running GCS, whose successors listen there too."""
        process = max(filter(_is_gcs, psutil.Process().children(recursive=True)), key=psutil.Process.create_time)
        port = gcs_address.rpartition(":")[2]
        self._command = [_PORT.sub(f"--gcs_server_port={port}", argument) for argument in process.cmdline()]
        self._environment = process.environ()
        self._process = process

    @property
    def pid(self) -> int:
        """Process id of the GCS now."""
        return int(self._process.pid)

    def tick(self) -> None:
        """Start it again if it has died."""
        if is_alive(self._process):
            return
        self.stop()
        logger.warning("Ray's control plane ended; starting it again")
        # If this process dies, the janitor finds it by the folder on its command line.
        self._process = psutil.Popen(
            self._command,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def stop(self) -> None:
        """End it, after the rest of Ray. Safe to call twice."""
        with contextlib.suppress(psutil.Error):
            self._process.kill()
        with contextlib.suppress(psutil.Error):
            self._process.wait(timeout=STOP_TIMEOUT_S)


def _is_gcs(process: psutil.Process) -> bool:
    try:
        return bool(process.name() == PROCESS_NAME and is_alive(process))
    except psutil.Error:
        return False


def is_alive(process: psutil.Process) -> bool:
    """Whether the process runs; one that has ended and not been waited for does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
