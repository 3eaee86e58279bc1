"""Named moments in a worker at which a test may have its process killed.

Off unless the environment variable DUOPOOL_FAILPOINTS names a folder when the process starts; then the file
`WORKER_ID.FAILPOINT` in that folder arms one. Whoever removes the file dies: no signal handler and no destructor runs,
as under `kill -9`. The text of the file is how often the moment is let pass before that (nothing means never).
"""

from __future__ import annotations

import os
import signal
from enum import StrEnum
from pathlib import Path

from duopool.core.types import Role

FOLDER_VARIABLE = "DUOPOOL_FAILPOINTS"


class Failpoint(StrEnum):
    """Where a worker can be killed; the names of the phases are those of `core/handoff`."""

    FILLING = "filling"
    """P: a chunk is computed and sealed, and nobody has been told."""
    LEASED = "leased"
    """P: the router knows of the lease, and a decode worker may be about to read."""
    BEING_READ = "being_read"
    """P: a decode worker reads, or has read and waits for the verdict."""
    RESERVED = "reserved"
    """D: head-room is taken and the blocks are listed; none has been read."""
    READING = "reading"
    """D: a read is under way."""
    VALIDATED = "validated"
    """D: P has confirmed and released the lease; the request is not in the batch yet."""
    DECODING = "decoding"
    """D: a step has given tokens, and nobody has been told."""
    FINISHING = "finishing"
    """D: the last token of a request is known here only."""


FAILPOINTS: dict[Role, tuple[Failpoint, ...]] = {
    Role.PREFILL: (Failpoint.FILLING, Failpoint.LEASED, Failpoint.BEING_READ),
    Role.DECODE: (
        Failpoint.RESERVED,
        Failpoint.READING,
        Failpoint.VALIDATED,
        Failpoint.DECODING,
        Failpoint.FINISHING,
    ),
}

_prefix: str | None = None
_passes: dict[Failpoint, int] = {}


def enable(worker_id: str) -> None:
    """Let this process be killed under this name, if the environment allows it."""
    global _prefix
    folder = os.environ.get(FOLDER_VARIABLE)
    _prefix = os.path.join(folder, worker_id) if folder else None


def reach(failpoint: Failpoint) -> None:
    """The process is at this moment; it dies here if the failpoint is armed."""
    if _prefix is not None:
        _die_if_armed(failpoint, Path(f"{_prefix}.{failpoint}"))


def arm(folder: Path, worker_id: str, failpoint: Failpoint, *, passes: int = 0) -> Path:
    """Have a worker die when it reaches the failpoint once more than `passes` times; removing the file disarms it."""
    file, draft = folder / f"{worker_id}.{failpoint}", folder / f"draft-{worker_id}.{failpoint}"
    draft.write_text(str(passes))
    draft.rename(file)
    return file


def _die_if_armed(failpoint: Failpoint, file: Path) -> None:
    try:
        passes = int(file.read_text() or "0")
    except FileNotFoundError:
        _passes.pop(failpoint, None)
        return
    _passes[failpoint] = _passes.get(failpoint, 0) + 1
    if _passes[failpoint] > passes:
        file.unlink(missing_ok=True)
        os.kill(os.getpid(), signal.SIGKILL)
