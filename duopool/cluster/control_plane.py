"""The control plane (GCS) of a local Ray: started again, over the state that it left on disk, whenever it dies.

Owns the command line of the one process and its successor. Requests do not depend on it: routers and workers talk over
their own connections, and a worker that dies is forked anew by its host. Placing actors has to wait until it is back.
"""

from __future__ import annotations

import logging
import re
import subprocess

import psutil

logger = logging.getLogger(__name__)

PROCESS_NAME = "gcs_server"
_PORT = re.compile(r"^--gcs_server_port=.*")


class ControlPlane:
    """Made by the driver right after it has started its Ray; `tick` now and then. One thread."""

    def __init__(self, gcs_address: str) -> None:
        """`gcs_address` is host:port of the running GCS, whose successors listen there too."""
        (process,) = [child for child in psutil.Process().children(recursive=True) if child.name() == PROCESS_NAME]
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
        logger.warning("Ray's control plane ended; starting it again")
        # The janitor ends it by the folder on its command line.
        child = psutil.Popen(
            self._command,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._process = child


def is_alive(process: psutil.Process) -> bool:
    """Whether the process runs; one that has ended and not been waited for does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
