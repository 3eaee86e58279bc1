"""The two faces of a transport: the reader on D and the source on P.

A transport moves bytes and checks digests. It knows nothing of requests: which blocks may be read and whether the read
counts is decided by the lease on P and the slot on D.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from duopool.core.messages import LeaseRef, ReadBlocks, SealedBlock, Validate, Verdict
from duopool.core.types import BlockId, LeaseId


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOutcome:
    """How a read ended. `error` is empty when every page arrived and its digest matched."""

    error: str = ""
    is_damaged: bool = False
    """Pages arrived, and not as they were sealed: the same read may go well."""
    num_bytes: int = 0


class BlockReader(Protocol):
    """On D: pulls pages and asks for verdicts. Calls return at once; `done` runs on a thread of the reader's."""

    def read(
        self,
        lease: LeaseRef,
        attempt: int,
        sources: Sequence[SealedBlock],
        targets: Sequence[BlockId],
        done: Callable[[ReadOutcome], None],
    ) -> None:
        """Copy P's pages `sources` over own pages `targets` and check their digests."""
        ...

    def confirm(self, lease: LeaseRef, attempt: int, done: Callable[[Verdict], None]) -> None:
        """Ask P whether the lease still held, releasing it if so."""
        ...

    def close(self) -> None:
        """End all reads and threads."""
        ...


class LeaseKeeper(Protocol):
    """On P: what the KV source service asks of the worker. Any thread; each call takes only a moment."""

    def begin_read(self, read: ReadBlocks) -> str:
        """Count a read that this process serves itself; the answer is a refusal or empty."""
        ...

    def end_read(self, lease_id: LeaseId) -> None:
        """The counted read has ended."""
        ...

    def validate(self, validate: Validate) -> Verdict:
        """Whether the lease still holds for this attempt and every generation is unchanged."""
        ...
