"""Reads into the host's side of a store on a device: a read is over when its pages are on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from duopool.core.messages import LeaseRef, SealedBlock, Verdict
from duopool.core.types import BlockId
from duopool.engine.transfer.transport import BlockReader, ReadOutcome


class UploadingReader:
    """A `BlockReader` over another one, whose threads do the uploads. Pages that are not as sealed go no further."""

    def __init__(self, reader: BlockReader, upload: Callable[[Sequence[BlockId]], None]) -> None:
        self._reader = reader
        self._upload = upload

    def read(
        self,
        lease: LeaseRef,
        attempt: int,
        sources: Sequence[SealedBlock],
        targets: Sequence[BlockId],
        done: Callable[[ReadOutcome], None],
    ) -> None:
        """Pull `sources` into own pages `targets`. Raises RuntimeError once closed."""
        own = tuple(targets)
        self._reader.read(lease, attempt, sources, own, lambda outcome: done(self._finish(outcome, own)))

    def confirm(self, lease: LeaseRef, attempt: int, done: Callable[[Verdict], None]) -> None:
        self._reader.confirm(lease, attempt, done)

    def close(self) -> None:
        self._reader.close()

    def _finish(self, outcome: ReadOutcome, targets: tuple[BlockId, ...]) -> ReadOutcome:
        if outcome.error:
            return outcome
        try:
            self._upload(targets)
        except RuntimeError as error:  # as torch tells of a device
            return ReadOutcome(error=f"the pages arrived and could not be brought to the device: {error}")
        return outcome
