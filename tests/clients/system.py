"""What every check is told about the system it talks to, by the runner."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HTTP = os.environ["DUOPOOL_HTTP"]
"""http://host:port"""
GRPC = os.environ["DUOPOOL_GRPC"]
"""host:port"""
MODEL_FOLDER = Path(os.environ["DUOPOOL_MODEL_FOLDER"])
BIN = Path(sys.executable).parent
HERE = Path(__file__).parent
MODEL = "smollm2"
"""Also a link to the model's folder in the working directory, which is the check's own."""


def run(*command: object, timeout_s: float = 150) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, (
        f"{command[0]} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    )
    return done.stdout
