"""Names of full blocks: chained 16-byte keyed BLAKE2b digests.

Owns how token ids become block keys. A key names its block's tokens and everything before them, the salt (a tenant's)
and the namespace (what the KV is a function of besides tokens: model, adapter). Equal keys mean equal prefixes, so the
key of a block is enough to find it; keys under different salts never meet. Does not know which blocks exist.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import Self

from duopool.core.types import BlockKey

KEY_BYTES = 16


class KeyChain:
    """The keys of one growing sequence; appending tokens hashes only the blocks that they fill.

    Token ids must fit a signed 32-bit integer (OverflowError otherwise); they are hashed as little endian.
    """

    __slots__ = ("_hasher", "_keys", "_parent", "_tail", "block_size")

    def __init__(self, block_size: int, *, salt: bytes = b"", namespace: bytes = b"") -> None:
        self.block_size = block_size
        self._hasher = blake2b(digest_size=KEY_BYTES, key=blake2b(salt, digest_size=32).digest())
        root = self._hasher.copy()
        root.update(b"root" + namespace)
        self._parent = root.digest()
        self._keys: list[BlockKey] = []
        self._tail = array("i")

    @property
    def keys(self) -> Sequence[BlockKey]:
        """Keys of the full blocks so far, first block first (live)."""
        return self._keys

    @property
    def num_tokens(self) -> int:
        """Tokens appended so far, with the part of a block at the end that has no key yet."""
        return len(self._keys) * self.block_size + len(self._tail)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append tokens; every block that they fill gets its key."""
        incoming = array("i", token_ids)
        tail = self._tail
        tail.extend(incoming)
        num_full = len(tail) // self.block_size
        if not num_full:
            return
        words = tail[: num_full * self.block_size]
        if sys.byteorder == "big":
            words.byteswap()
        data = words.tobytes()
        stride = self.block_size * words.itemsize
        parent, fresh = self._parent, self._hasher.copy
        for start in range(0, len(data), stride):
            digest = fresh()
            digest.update(parent + data[start : start + stride])
            parent = digest.digest()
            self._keys.append(BlockKey(parent))
        self._parent = parent
        del tail[: num_full * self.block_size]

    def copy(self) -> Self:
        """An independent chain with the same past."""
        twin = object.__new__(type(self))
        twin.block_size = self.block_size
        twin._hasher = self._hasher
        twin._parent = self._parent
        twin._keys = self._keys.copy()
        twin._tail = self._tail[:]
        return twin


def block_keys(
    token_ids: Sequence[int], block_size: int, *, salt: bytes = b"", namespace: bytes = b""
) -> tuple[BlockKey, ...]:
    """Keys of the full blocks of `token_ids`, first block first; a partial last block has none."""
    chain = KeyChain(block_size, salt=salt, namespace=namespace)
    chain.extend(token_ids)
    return tuple(chain.keys)
