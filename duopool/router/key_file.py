"""The file with the API keys, read again when it changes: keys are given out and taken back without a restart.

Owns when the file is looked at and what holds while it is wrong: the keys it had. What a line means is not known here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from duopool.core.errors import DuopoolError, InvalidRequest
from duopool.proto.secret_files import read_secret

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""A key that was taken back opens nothing after this."""

Digests = tuple[tuple[bytes, str], ...]
"""(digest of a key, its tenant)."""


class KeyFile:
    """`digests` at every call. Raises Unauthenticated or InvalidRequest when the file is wrong from the beginning."""

    def __init__(
        self, path: Path, parse: Callable[[str], Digests], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._path = path
        self._parse = parse
        self._clock = clock
        self._stamp = self._look()
        self._digests = self._read()
        self._next_look = clock() + LOOK_S

    def digests(self) -> Digests:
        """The keys now; those of the last good file while it is missing, empty or cannot be read."""
        now = self._clock()
        if now >= self._next_look:
            self._next_look = now + LOOK_S
            stamp = self._look()
            if stamp != self._stamp:
                self._stamp = stamp
                self._take_in()
        return self._digests

    def _take_in(self) -> None:
        try:
            self._digests = self._read()
        except DuopoolError as error:
            log.warning("the API keys stay as they were: %s", error)
        else:
            log.info("%d API keys were read again from %s", len(self._digests), self._path)

    def _read(self) -> Digests:
        digests = self._parse(read_secret(self._path))
        if not digests:
            raise InvalidRequest("api_keys", "keys are wanted, but there is no key")
        return digests

    def _look(self) -> tuple[int, ...]:
        """What changes whenever somebody writes, replaces or locks the file."""
        try:
            status = self._path.stat()
        except OSError:
            return ()
        return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino
