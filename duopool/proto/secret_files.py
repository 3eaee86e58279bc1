"""Files that hold secrets: made for the owner alone, and refused when others can read them."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from duopool.core.errors import Unauthenticated


def read_secret(path: Path) -> str:
    """The file's text without the white space around it. Raises Unauthenticated naming the file and what is wrong."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise Unauthenticated(f"{path} is open to other users (mode {stat.S_IMODE(mode):04o}): chmod 600 it")
            return file.read().decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise Unauthenticated(f"cannot read {path}: {error}") from error


def make_secret(path: Path, new: Callable[[], str]) -> None:
    """Make the file with mode 0600, unless it is there; whoever comes second finds the first one's secret, whole."""
    if path.exists():
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, draft = tempfile.mkstemp(prefix=path.name, dir=path.parent)  # mode 0600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(new() + "\n")
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        os.unlink(draft)
