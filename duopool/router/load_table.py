"""How busy every worker is: its last report, plus what was routed to it since.

Owns the estimate of work that a report cannot show yet, and of prefixes that are just being computed, so that a burst
of requests does not follow one stale number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from duopool.core.handoff.request import Member
from duopool.core.messages import WorkerLoad
from duopool.core.types import BlockKey, RequestId

REPORTS_UNTIL_SEEN = 2
"""The report under way when a command is sent does not know of it; the one after that does."""


@dataclass(frozen=True, slots=True)
class _Unseen:
    """One request that was routed."""

    num_tokens: int
    num_sequences: int
    num_reports: int = REPORTS_UNTIL_SEEN
    """Still to come until the load shows it."""


@dataclass(slots=True)
class _Row:
    load: WorkerLoad = field(default_factory=WorkerLoad)
    unseen: dict[RequestId, _Unseen] = field(default_factory=dict)
    expected: Counter[BlockKey] = field(default_factory=Counter)
    """Keys of prefixes that are being computed there, with the number of requests that do."""


class LoadTable:
    """One row per worker; rows begin and end with the worker's session."""

    def __init__(self) -> None:
        self._rows: dict[Member, _Row] = {}

    def report(self, member: Member, load: WorkerLoad) -> None:
        row = self._rows.setdefault(member, _Row())
        row.load = load
        row.unseen = {
            request_id: replace(one, num_reports=one.num_reports - 1)
            for request_id, one in row.unseen.items()
            if one.num_reports > 1
        }

    def forget(self, member: Member) -> None:
        self._rows.pop(member, None)

    def load(self, member: Member) -> WorkerLoad:
        row = self._rows.get(member)
        return WorkerLoad() if row is None else row.load

    def routed(self, member: Member, request_id: RequestId, num_tokens: int, num_sequences: int = 1) -> None:
        """A request with this much prefill work, and so many outputs, was sent."""
        self._rows.setdefault(member, _Row()).unseen[request_id] = _Unseen(num_tokens, num_sequences)

    def heard(self, member: Member, request_id: RequestId) -> None:
        """The worker spoke of the request: its reports count it from now on."""
        row = self._rows.get(member)
        if row is not None:
            row.unseen.pop(request_id, None)

    def unseen(self, member: Member) -> tuple[int, int]:
        """(tokens, sequences) routed there that the load does not show."""
        unseen = self._rows[member].unseen.values() if member in self._rows else ()
        return sum(one.num_tokens for one in unseen), sum(one.num_sequences for one in unseen)

    def expect(self, member: Member, keys: Iterable[BlockKey]) -> None:
        """The worker is about to compute these blocks."""
        self._rows.setdefault(member, _Row()).expected.update(keys)

    def unexpect(self, member: Member, keys: Iterable[BlockKey]) -> None:
        """It has computed them, or will not."""
        row = self._rows.get(member)
        if row is not None:
            row.expected.subtract(keys)
            row.expected = +row.expected

    @property
    def num_expected_keys(self) -> int:
        """Blocks that workers are about to compute, over all workers."""
        return sum(len(row.expected) for row in self._rows.values())

    def num_expected(self, member: Member, keys: Sequence[BlockKey]) -> int:
        """How many of `keys`, from the first one on, are being computed there."""
        row = self._rows.get(member)
        if row is None or not row.expected:
            return 0
        return next((index for index, key in enumerate(keys) if key not in row.expected), len(keys))
