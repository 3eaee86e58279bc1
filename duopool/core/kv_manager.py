"""Paged KV memory of one worker: the only face that schedulers see.

A request is admitted (its cached prefix is matched and pinned in one step), reserves blocks as it grows, appends the
tokens it generates, publishes the blocks whose KV is written, and is freed: published blocks stay as cache, the rest go
to the free list. Each block is in exactly one of three places: free, cached and unreferenced, or referenced (by tables
and pins). Owns the tables and ties the pool to the prefix cache; does not own the memory itself, nor decide who runs.

Shared memory is never written: a block on which somebody else counts, or that is cached, is replaced by a copy before a
write (`prepare_write`). Copies are to be made in the order given, before anything else is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from duopool.core.block_keys import KeyChain
from duopool.core.block_pool import BlockPool
from duopool.core.block_table import BlockTable, blocks_for
from duopool.core.errors import DuopoolError, OutOfBlocks
from duopool.core.kv_events import KvEvent
from duopool.core.ledger import BlockLedger
from duopool.core.prefix_cache import PrefixCache
from duopool.core.types import BlockCopy, BlockId, BlockKey, RequestId


class AlreadyAdmitted(DuopoolError, KeyError):
    """The request holds a block table already."""

    def __init__(self, request_id: RequestId) -> None:
        super().__init__(f"request {request_id} is admitted already")


class NotAdmitted(DuopoolError, KeyError):
    """The request holds no block table."""

    def __init__(self, request_id: RequestId) -> None:
        super().__init__(f"request {request_id} is not admitted")


class _Sequence:
    """What the manager keeps for one request."""

    __slots__ = ("chain", "is_wrong", "num_published", "table")

    def __init__(self, chain: KeyChain, table: BlockTable, num_published: int) -> None:
        self.chain = chain
        self.table = table
        self.num_published = num_published
        """Leading blocks whose keys were offered to the cache."""
        self.is_wrong = False
        """It holds a block that was discarded: nothing of it may be shared."""


class KVCacheManager:
    """Blocks for sequences, with prefix sharing, copy-on-write and leaf-first LRU eviction."""

    def __init__(self, *, num_blocks: int, block_size: int, namespace: bytes = b"") -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._namespace = namespace
        self._pool = BlockPool(num_blocks)
        self._cache = PrefixCache(num_blocks)
        self._sequences: dict[RequestId, _Sequence] = {}
        self._pins: Counter[BlockId] = Counter()

    @property
    def num_free(self) -> int:
        """Blocks on the free list."""
        return self._pool.num_free

    @property
    def num_cached(self) -> int:
        """Cached blocks that can be evicted: nobody counts on them or on a block behind them."""
        return self._cache.num_evictable

    @property
    def num_available(self) -> int:
        """Blocks that `reserve` can give out: free or evictable."""
        return self._pool.num_free + self._cache.num_evictable

    @property
    def usage(self) -> float:
        """Share of the blocks that cannot be given out, between 0 and 1."""
        return 1.0 - self.num_available / self.num_blocks if self.num_blocks else 0.0

    def keys(self, token_ids: Sequence[int], salt: bytes = b"") -> tuple[BlockKey, ...]:
        """Keys of the full blocks of `token_ids` for the tenant `salt`."""
        return tuple(self._chain(token_ids, salt).keys)

    def lookup(self, keys: Sequence[BlockKey]) -> int:
        """How many blocks along `keys` are cached; nothing is pinned and nothing counts as used."""
        return self._cache.lookup(keys)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return blocks_for(num_tokens, self.block_size)

    def has(self, request_id: RequestId) -> bool:
        return request_id in self._sequences

    def admit(
        self,
        request_id: RequestId,
        token_ids: Sequence[int],
        *,
        salt: bytes = b"",
        max_cached_tokens: int | None = None,
    ) -> int:
        """Open a table on the longest cached prefix of `token_ids` and pin that prefix in the same step.

        Returns how many leading tokens are cached: a multiple of the block size, at most `max_cached_tokens`.
        AlreadyAdmitted when the request has a table.
        """
        if request_id in self._sequences:
            raise AlreadyAdmitted(request_id)
        chain = self._chain(token_ids, salt)
        limit = len(chain.keys)
        if max_cached_tokens is not None:
            limit = min(limit, max(0, max_cached_tokens) // self.block_size)
        matched = self._cache.match(chain.keys[:limit])
        self._retain(matched)
        self._sequences[request_id] = _Sequence(chain, BlockTable(self.block_size, matched), len(matched))
        return len(matched) * self.block_size

    def reserve(self, request_id: RequestId, num_tokens: int) -> None:
        """Grow the table to hold `num_tokens` tokens, evicting cached blocks when the free list is short.

        All or nothing: OutOfBlocks before anything changes. A table that holds as many already stays as it is.
        """
        table = self._sequence(request_id).table
        missing = table.blocks_missing(num_tokens)
        if missing:
            table.extend(self._allocate(missing))

    def append(self, request_id: RequestId, token_ids: Sequence[int]) -> None:
        """Generated tokens become part of the sequence, so that the blocks they fill get keys."""
        self._sequence(request_id).chain.extend(token_ids)

    def publish(self, request_id: RequestId, num_computed_tokens: int) -> None:
        """KV of the first `num_computed_tokens` tokens is written: its full blocks become a prefix others can use.

        A key that is cached already keeps its block and the request's own duplicate stays private. ValueError when
        the sequence or its table is shorter than that.
        """
        sequence = self._sequence(request_id)
        end = num_computed_tokens // self.block_size
        start = sequence.num_published
        if end <= start or sequence.is_wrong:
            return
        keys, block_ids = sequence.chain.keys, sequence.table.block_ids
        if end > len(keys) or end > len(block_ids):
            raise ValueError(
                f"{num_computed_tokens} tokens computed of {sequence.chain.num_tokens}, "
                f"room for {sequence.table.capacity}"
            )
        # Earlier blocks may be private duplicates whose cached twins were evicted since: go on from the last key
        # that is still there. A block of our own that is cached holds all keys before it, so none goes in twice.
        while start and not self._cache.has_key(keys[start - 1]):
            start -= 1
        self._cache.insert(keys[start:end], block_ids[start:end], parent=keys[start - 1] if start else None)
        sequence.num_published = end

    def discard(self, block_ids: Collection[BlockId]) -> None:
        """What these blocks hold is not what was written: they, and all that is cached behind them, serve nobody anew.

        Tables that hold one of them keep it, and publish nothing from then on.
        """
        self._pool.give_back(self._cache.forget(block_ids))
        for sequence in self._sequences.values():
            sequence.is_wrong |= any(block_id in block_ids for block_id in sequence.table.block_ids)

    def block_ids(self, request_id: RequestId) -> Sequence[BlockId]:
        """The request's block table (live)."""
        return self._sequence(request_id).table.block_ids

    def num_tokens(self, request_id: RequestId) -> int:
        """Tokens of the sequence: those admitted and those appended."""
        return self._sequence(request_id).chain.num_tokens

    def fork(self, parent: RequestId, child: RequestId) -> None:
        """Open a table for `child` with the same tokens as `parent`, which shares every block that they lie in."""
        sequence = self._sequence(parent)
        if child in self._sequences:
            raise AlreadyAdmitted(child)
        shared = sequence.table.block_ids[: self.blocks_for(sequence.chain.num_tokens)]
        self._retain(shared)
        table = BlockTable(self.block_size, shared)
        self._sequences[child] = _Sequence(sequence.chain.copy(), table, sequence.num_published)
        self._sequences[child].is_wrong = sequence.is_wrong

    def prepare_write(self, request_id: RequestId, start: int, end: int) -> list[BlockCopy]:
        """Make the blocks of positions [start, end) the request's own: copies to make before the write.

        A block that is cached or on which somebody else (a table or a pin) counts is replaced in the table by a fresh
        one. All or nothing: OutOfBlocks before anything changes. IndexError past the table's capacity.
        """
        table = self._sequence(request_id).table
        block_ids = table.block_ids
        shared = [
            index
            for index in table.touched(start, end)
            if self._pool.ref_count(block_ids[index]) > 1 or self._cache.has_block(block_ids[index])
        ]
        if not shared:
            return []
        copies = [
            BlockCopy(source=block_ids[index], target=target)
            for index, target in zip(shared, self._allocate(len(shared)), strict=True)
        ]
        for index, copy in zip(shared, copies, strict=True):
            block_ids[index] = copy.target
        self._release([copy.source for copy in copies])
        return copies

    def free(self, request_id: RequestId) -> None:
        """Close the table: published blocks stay as cache, blocks that nobody else counts on become free."""
        sequence = self._sequence(request_id)
        del self._sequences[request_id]
        self._release(sequence.table.block_ids)

    def pin(self, block_ids: Sequence[BlockId]) -> None:
        """Keep blocks alive beyond a table's life (a lease, a quarantine). ValueError for a free block."""
        self._retain(block_ids)
        self._pins.update(block_ids)

    def unpin(self, block_ids: Sequence[BlockId]) -> None:
        """Undo one `pin`. ValueError, and nothing changes, when a block is not pinned as often."""
        wanted = Counter(block_ids)
        for block_id, times in wanted.items():
            if self._pins[block_id] < times:
                raise ValueError(f"block {block_id} is pinned {self._pins[block_id]} times, not {times}")
        for block_id, times in wanted.items():
            self._pins[block_id] -= times
            if not self._pins[block_id]:
                del self._pins[block_id]
        self._release(block_ids)

    def generation(self, block_id: BlockId) -> int:
        """How often the block was allocated: tells its present content from what it held before."""
        return self._pool.generation(block_id)

    def drain_events(self) -> list[KvEvent]:
        """What became cached and what was evicted since the last call, oldest first."""
        return self._cache.drain_events()

    def snapshot(self) -> list[tuple[BlockKey, ...]]:
        """Paths of everything cached, root first, for a router that missed events."""
        return self._cache.snapshot()

    def reset_cache(self) -> None:
        """Drop every cached block that can be evicted."""
        self._pool.give_back(self._cache.evict(self._cache.num_evictable))

    def ledger(self) -> BlockLedger:
        """Every block, table and pin as it stands, for an audit."""
        counts = ((BlockId(index), self._pool.ref_count(BlockId(index))) for index in range(self.num_blocks))
        return BlockLedger(
            num_blocks=self.num_blocks,
            free=self._pool.free_list(),
            cached=tuple(self._cache.blocks().values()),
            ref_counts={block_id: count for block_id, count in counts if count},
            tables={name: tuple(sequence.table.block_ids) for name, sequence in self._sequences.items()},
            pins=dict(self._pins),
        )

    def check(self) -> None:
        """Raise AssertionError unless every block is accounted for exactly once."""
        self._pool.check()
        self._cache.check()
        expected = Counter(self._pins)
        for sequence in self._sequences.values():
            expected.update(sequence.table.block_ids)
            assert len(set(sequence.table.block_ids)) == len(sequence.table.block_ids)
        assert all(count > 0 for count in self._pins.values())
        cached = set(self._cache.blocks().values())
        for index in range(self.num_blocks):
            block_id = BlockId(index)
            count = self._pool.ref_count(block_id)
            assert count == expected[block_id]
            assert self._pool.is_free(block_id) == (count == 0 and block_id not in cached)
        assert not any(self._pool.is_free(block_id) for block_id in cached)
        assert self._cache.referenced() == {block_id for block_id in cached if self._pool.ref_count(block_id)}

    def _sequence(self, request_id: RequestId) -> _Sequence:
        sequence = self._sequences.get(request_id)
        if sequence is None:
            raise NotAdmitted(request_id)
        return sequence

    def _chain(self, token_ids: Sequence[int], salt: bytes) -> KeyChain:
        chain = KeyChain(self.block_size, salt=salt, namespace=self._namespace)
        chain.extend(token_ids)
        return chain

    def _allocate(self, n: int) -> list[BlockId]:
        if n > self.num_available:
            raise OutOfBlocks(needed=n, free=self.num_available)
        short = n - self._pool.num_free
        if short > 0:
            self._pool.give_back(self._cache.evict(short))
        return self._pool.allocate(n)

    def _retain(self, block_ids: Sequence[BlockId]) -> None:
        self._cache.hold(self._pool.retain(block_ids))

    def _release(self, block_ids: Sequence[BlockId]) -> None:
        self._pool.give_back(self._cache.unhold(self._pool.release(block_ids)))
