"""Which blocks hold which prefix, and which of them may go first.

Owns the tree from keys to blocks, the order of eviction and the events. A cached block is held while somebody counts on
it or on a block behind it; the others are evictable, so every evictable block can be reached leaf by leaf. Among the
evictable leaves the least recently used goes first; a block is used until the moment it stops being held, on a logical
clock. Does not own reference counts or the free list: the manager reports when a count leaves or reaches zero.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from heapq import heapify, heappop, heappush

from duopool.core.kv_events import KvEvent, KvRemoved, KvStored
from duopool.core.radix_tree import RadixTree
from duopool.core.types import BlockId, BlockKey

_NOTHING = BlockId(-1)


class PrefixCache:
    """A radix tree of block ids with leaf-first LRU eviction in O(log n) amortised."""

    def __init__(self, num_blocks: int) -> None:
        self._tree: RadixTree[BlockKey, BlockId] = RadixTree()
        self._keys: list[BlockKey | None] = [None] * num_blocks
        self._parents = [_NOTHING] * num_blocks
        self._num_children = [0] * num_blocks
        self._holds = [0] * num_blocks
        """One if the block is referenced, plus one for each child that is held."""
        self._last_use = [0] * num_blocks
        self._clock = 0
        self._leaves: list[tuple[int, BlockId]] = []
        """Heap of (last use, block) that holds every evictable leaf, and entries gone stale since."""
        self._num_evictable = 0
        self._events: list[KvEvent] = []

    def __len__(self) -> int:
        """Number of cached blocks, held or not."""
        return len(self._tree)

    @property
    def num_evictable(self) -> int:
        return self._num_evictable

    def has_block(self, block_id: BlockId) -> bool:
        return self._keys[block_id] is not None

    def has_key(self, key: BlockKey) -> bool:
        return key in self._tree

    def lookup(self, keys: Sequence[BlockKey]) -> int:
        """How many blocks along `keys` are cached. Does not count as a use."""
        return self._tree.match_length(keys)

    def match(self, keys: Sequence[BlockKey]) -> list[BlockId]:
        """Blocks of the longest cached prefix of `keys`."""
        return self._tree.match(keys)

    def insert(self, keys: Sequence[BlockKey], block_ids: Sequence[BlockId], *, parent: BlockKey | None) -> None:
        """Cache `block_ids` under `keys`, which go on behind the cached key `parent`.

        Keys that are cached already keep their block. The blocks that become cached must be referenced and not cached
        under another key.
        """
        known = self._tree.insert(keys, block_ids, parent=parent)
        if known == len(keys):
            return
        before = parent if known == 0 else keys[known - 1]
        above = _NOTHING if before is None else self._block_at(before)
        for key, block_id in zip(keys[known:], block_ids[known:], strict=True):
            self._keys[block_id] = key
            self._parents[block_id] = above
            if above != _NOTHING:
                self._num_children[above] += 1
            self._num_evictable += 1
            self._gain(block_id)
            above = block_id
        self._events.append(KvStored(tuple(keys[known:]), before))

    def hold(self, block_ids: Iterable[BlockId]) -> None:
        """Cached blocks among `block_ids`, on which nobody counted, are now referenced."""
        for block_id in block_ids:
            if self._keys[block_id] is not None:
                self._gain(block_id)

    def unhold(self, block_ids: Iterable[BlockId]) -> list[BlockId]:
        """Nobody counts on `block_ids` any more: the cached ones stay, the others are returned."""
        self._clock += 1
        uncached = []
        for block_id in block_ids:
            if self._keys[block_id] is None:
                uncached.append(block_id)
            else:
                self._drop(block_id)
        return uncached

    def evict(self, n: int) -> list[BlockId]:
        """Forget `n` blocks (fewer when fewer are evictable), least recently used leaves first, and return them."""
        evicted: list[BlockId] = []
        removed: list[BlockKey] = []
        while len(evicted) < n and self._leaves:
            last_use, block_id = heappop(self._leaves)
            key = self._keys[block_id]
            if key is None or not self._is_evictable_leaf(block_id) or self._last_use[block_id] != last_use:
                continue
            self._remove(key, block_id)
            evicted.append(block_id)
            removed.append(key)
        if removed:
            self._events.append(KvRemoved(tuple(removed)))
        return evicted

    def forget(self, block_ids: Container[BlockId]) -> list[BlockId]:
        """Uncache `block_ids` and all blocks behind them, held or not; returns those that nobody counted on."""
        doomed: dict[BlockId, BlockKey] = {}
        for key, block_id in self._tree.items():
            if block_id in block_ids or self._parents[block_id] in doomed:
                doomed[block_id] = key
        free = []
        for block_id, key in reversed(doomed.items()):
            if self._holds[block_id]:
                self._drop(block_id)
            else:
                free.append(block_id)
            self._remove(key, block_id)
        if doomed:
            self._events.append(KvRemoved(tuple(doomed.values())))
        return free

    def drain_events(self) -> list[KvEvent]:
        """Events since the last call, oldest first."""
        events, self._events = self._events, []
        return events

    def snapshot(self) -> list[tuple[BlockKey, ...]]:
        """Every path from the root to a leaf."""
        return list(self._tree.paths())

    def blocks(self) -> dict[BlockKey, BlockId]:
        """Every cached key with its block."""
        return dict(self._tree.items())

    def check(self) -> None:
        """Raise AssertionError unless tree, links, holds and eviction order agree."""
        self._tree.check()
        blocks = self.blocks()
        assert len(set(blocks.values())) == len(blocks) == sum(key is not None for key in self._keys)
        children = [0] * len(self._keys)
        held_children = [0] * len(self._keys)
        for key, block_id in blocks.items():
            assert self._keys[block_id] == key
            before = self._tree.parent(key)
            above = _NOTHING if before is None else blocks[before]
            assert self._parents[block_id] == above
            if above != _NOTHING:
                children[above] += 1
                held_children[above] += self._holds[block_id] > 0
        assert children == self._num_children
        queued = set(self._leaves)
        for block_id in blocks.values():
            assert self._holds[block_id] - held_children[block_id] in (0, 1)
            if self._is_evictable_leaf(block_id):
                assert (self._last_use[block_id], block_id) in queued
        assert self._num_evictable == sum(self._holds[block_id] == 0 for block_id in blocks.values())

    def referenced(self) -> set[BlockId]:
        """Cached blocks that somebody counts on themselves, not only on a block behind them."""
        held_children = [0] * len(self._keys)
        for child, above in enumerate(self._parents):
            if above != _NOTHING and self._holds[child]:
                held_children[above] += 1
        return {BlockId(index) for index, held in enumerate(held_children) if self._holds[index] > held}

    def _remove(self, key: BlockKey, block_id: BlockId) -> None:
        """Take an evictable leaf out of the tree."""
        self._tree.remove(key)
        above = self._parents[block_id]
        self._keys[block_id] = None
        self._parents[block_id] = _NOTHING
        self._num_evictable -= 1
        if above != _NOTHING:
            self._num_children[above] -= 1
            if self._is_evictable_leaf(above):
                self._queue(above)

    def _block_at(self, key: BlockKey) -> BlockId:
        block_id = self._tree.get(key)
        if block_id is None:
            raise KeyError(key)
        return block_id

    def _is_evictable_leaf(self, block_id: BlockId) -> bool:
        return self._holds[block_id] == 0 and self._num_children[block_id] == 0

    def _gain(self, block_id: BlockId) -> None:
        """One more hold on a block; the first one holds its parent too."""
        holds = self._holds
        while block_id != _NOTHING:
            holds[block_id] += 1
            if holds[block_id] > 1:
                return
            self._num_evictable -= 1
            block_id = self._parents[block_id]

    def _drop(self, block_id: BlockId) -> None:
        """One hold less on a block; the last one lets go of its parent too."""
        holds = self._holds
        while block_id != _NOTHING:
            holds[block_id] -= 1
            if holds[block_id]:
                return
            self._num_evictable += 1
            self._last_use[block_id] = self._clock
            if self._num_children[block_id] == 0:
                self._queue(block_id)
            block_id = self._parents[block_id]

    def _queue(self, block_id: BlockId) -> None:
        heappush(self._leaves, (self._last_use[block_id], block_id))
        if len(self._leaves) > 2 * len(self._keys) + 64:
            self._leaves = [
                (last_use, leaf)
                for last_use, leaf in set(self._leaves)
                if self._keys[leaf] is not None and self._is_evictable_leaf(leaf) and self._last_use[leaf] == last_use
            ]
            heapify(self._leaves)
