"""Which worker holds which prefix: one radix tree over all workers, fed by their KV events.

Owns the sequence numbers: after a gap a worker's news is ignored until its snapshot comes, and meanwhile it counts
with what was known before. The index is a hint: a worker that has evicted a block computes it again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from duopool.core.handoff.request import Member
from duopool.core.messages import KvChanged, KvSnapshot
from duopool.core.radix_tree import RadixTree
from duopool.core.types import BlockKey, WorkerId


class _News:
    """What one worker has told so far."""

    __slots__ = ("bit", "keys", "next_sequence")

    def __init__(self, bit: int) -> None:
        self.bit = bit
        self.keys: set[BlockKey] = set()
        self.next_sequence: int | None = None
        """None while a snapshot is awaited."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixRun:
    """Blocks that are cached one behind the other without a branch, as the live page shows them."""

    key: BlockKey
    """Of the last block; `parent` is that of another run."""
    parent: BlockKey | None
    num_blocks: int
    num_hits: int
    """Requests whose prefix was found up to somewhere in this run."""
    holders: tuple[WorkerId, ...]
    """Workers that hold its first block."""


class PrefixIndex:
    """Block keys of all workers; the value at a key is a bit set of the workers that hold it."""

    def __init__(self) -> None:
        self._tree: RadixTree[BlockKey, int] = RadixTree()
        self._members: dict[Member, _News] = {}
        self._num_hits: Counter[BlockKey] = Counter()
        """By the deepest block that a routed request found."""

    def __len__(self) -> int:
        """Number of different keys."""
        return len(self._tree)

    def add(self, member: Member) -> None:
        """Begin to listen to a worker; its snapshot is awaited."""
        if member not in self._members:
            used = {news.bit for news in self._members.values()}
            self._members[member] = _News(next(1 << place for place in range(len(used) + 1) if 1 << place not in used))

    def drop(self, member: Member) -> None:
        """Forget a worker and all it holds."""
        if member in self._members:
            self._clear(self._members[member])
            del self._members[member]

    def apply(self, member: Member, event: KvChanged | KvSnapshot) -> bool:
        """Take in a worker's news; True when something was missed and a snapshot must be asked for."""
        news = self._members.get(member)
        if news is None:
            return False
        if isinstance(event, KvSnapshot):
            self._clear(news)
            for path in event.paths:
                self._store(news, path, None)
            news.next_sequence = event.sequence + 1
            return False
        if news.next_sequence is None or event.sequence < news.next_sequence:
            return False
        if event.sequence > news.next_sequence or not self._follow(news, event):
            news.next_sequence = None
            return True
        news.next_sequence += 1
        return False

    def num_hits(self, keys: Sequence[BlockKey]) -> dict[Member, int]:
        """For every worker, how many of `keys` it holds from the first one on."""
        holders = self._tree.match(keys)
        hits = {}
        for member, news in self._members.items():
            low, high = 0, len(holders)
            while low < high:  # a worker that holds a key holds all before it
                middle = (low + high) // 2
                if holders[middle] & news.bit:
                    low = middle + 1
                else:
                    high = middle
            hits[member] = low
        return hits

    def used(self, keys: Sequence[BlockKey], num_hits: int) -> None:
        """A request was routed to a worker that holds the first `num_hits` of its keys."""
        if num_hits > 0 and keys[num_hits - 1] in self._tree:
            self._num_hits[keys[num_hits - 1]] += 1

    def runs(self) -> list[PrefixRun]:
        """The whole tree, every run before those behind it."""
        members = tuple(self._members.items())
        return [
            PrefixRun(
                key=keys[-1],
                parent=parent,
                num_blocks=len(keys),
                num_hits=sum(self._num_hits[key] for key in keys),
                holders=tuple(member.worker_id for member, news in members if keys[0] in news.keys),
            )
            for parent, keys in self._tree.runs()
        ]

    def keys_of(self, member: Member) -> frozenset[BlockKey]:
        """Everything a worker is known to hold."""
        news = self._members.get(member)
        return frozenset() if news is None else frozenset(news.keys)

    def check(self) -> None:
        """Raise AssertionError unless tree and per-worker sets agree."""
        self._tree.check()
        bits = [news.bit for news in self._members.values()]
        assert len(set(bits)) == len(bits)
        for key, holders in self._tree.items():
            assert holders
            assert holders == sum(news.bit for news in self._members.values() if key in news.keys)
            before = self._tree.parent(key)
            assert before is None or holders & ~(self._tree.get(before) or 0) == 0
        assert all(key in self._tree for news in self._members.values() for key in news.keys)
        assert all(key in self._tree for key in self._num_hits)

    def _follow(self, news: _News, event: KvChanged) -> bool:
        if not news.keys.issuperset(event.removed):
            return False
        if not self._remove(news, event.removed):
            return False
        for segment in event.stored:
            if segment.parent is not None and segment.parent not in news.keys:
                return False
            self._store(news, segment.keys, segment.parent)
        return True

    def _store(self, news: _News, keys: Sequence[BlockKey], parent: BlockKey | None) -> None:
        try:
            self._tree.insert(keys, [0] * len(keys), parent=parent)
        except ValueError:
            return  # one of two workers is wrong about where these lie; as a hint they are worth nothing
        for key in keys:
            self._tree.replace(key, (self._tree.get(key) or 0) | news.bit)
        news.keys.update(keys)

    def _remove(self, news: _News, keys: Iterable[BlockKey]) -> bool:
        """Take keys from a worker, leaf side first; False when the worker still holds one behind."""
        for key in keys:
            holders = (self._tree.get(key) or 0) & ~news.bit
            news.keys.discard(key)
            if holders:
                self._tree.replace(key, holders)
            elif self._tree.is_leaf(key):
                self._tree.remove(key)
                self._num_hits.pop(key, None)
            else:
                news.keys.add(key)
                return False
        return True

    def _clear(self, news: _News) -> None:
        held = [key for key, holders in self._tree.items_leaf_first() if holders & news.bit]
        self._remove(news, held)
        news.next_sequence = None
