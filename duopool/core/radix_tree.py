"""A radix tree with compressed edges: a node holds a run of keys and one value per key.

Used for block ids in a worker's prefix cache and for sets of workers in the router's index. A key names its whole path
(chained digests do), so it occurs at most once and is found without walking from the root. The tree grows by paths and
shrinks from its leaves. Does not know what values mean, when they were used, or who wants them gone.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class _Node(Generic[Key, Value]):
    """A run of keys without a branch. Only the root's run is empty; any other node has no child or at least two."""

    __slots__ = ("children", "keys", "parent", "values")

    def __init__(self, keys: list[Key], values: list[Value], parent: _Node[Key, Value] | None) -> None:
        self.keys = keys
        self.values = values
        self.parent = parent
        self.children: dict[Key, _Node[Key, Value]] = {}
        """By the first key of the child's run."""


class RadixTree(Generic[Key, Value]):
    """Paths of keys that share prefixes, with a value at every key."""

    def __init__(self) -> None:
        self._root: _Node[Key, Value] = _Node([], [], None)
        self._nodes: dict[Key, _Node[Key, Value]] = {}

    def __len__(self) -> int:
        """Number of keys."""
        return len(self._nodes)

    def __contains__(self, key: Key) -> bool:
        return key in self._nodes

    def match_length(self, keys: Sequence[Key]) -> int:
        """How many of `keys` lie on a path from the root."""
        return self._descend(self._root, 0, keys)[2]

    def match(self, keys: Sequence[Key]) -> list[Value]:
        """Values of the longest prefix of `keys` that lies on a path from the root."""
        node, offset, _ = self._descend(self._root, 0, keys)
        runs = [node.values[:offset]]
        while node.parent is not None:
            node = node.parent
            runs.append(node.values)
        return [value for run in reversed(runs) for value in run]

    def insert(self, keys: Sequence[Key], values: Sequence[Value], *, parent: Key | None = None) -> int:
        """Add the path `keys` below `parent` (the root when None) and return how many of its keys were already there.

        Keys that were there keep their value. Nothing changes when an error is raised: KeyError for a parent that is
        not in the tree, ValueError when the lengths differ or a new key is already on another path.
        """
        if len(keys) != len(values):
            raise ValueError(f"{len(keys)} keys, {len(values)} values")
        node, offset = (self._root, 0) if parent is None else self._find(parent)
        if parent is not None:
            offset += 1
        node, offset, known = self._descend(node, offset, keys)
        if known == len(keys):
            return known
        new_keys, new_values = list(keys[known:]), list(values[known:])
        if len(set(new_keys)) < len(new_keys) or not self._nodes.keys().isdisjoint(new_keys):
            raise ValueError("a key names its whole path: it cannot be on two paths")
        if offset < len(node.keys):
            self._split(node, offset)
        if node.children or node is self._root:
            child = _Node(new_keys, new_values, node)
            node.children[new_keys[0]] = child
            node = child
        else:
            node.keys += new_keys
            node.values += new_values
        self._nodes.update(dict.fromkeys(new_keys, node))
        return known

    def get(self, key: Key) -> Value | None:
        """Value at `key`, or None when it is not in the tree."""
        node = self._nodes.get(key)
        return None if node is None else node.values[_offset(node, key)]

    def replace(self, key: Key, value: Value) -> None:
        """Put `value` at `key`. KeyError when it is not in the tree."""
        node, offset = self._find(key)
        node.values[offset] = value

    def parent(self, key: Key) -> Key | None:
        """The key before `key` on its path, None for the first. KeyError when it is not in the tree."""
        node, offset = self._find(key)
        if offset:
            return node.keys[offset - 1]
        above = node.parent
        return above.keys[-1] if above is not None and above.keys else None

    def path(self, key: Key) -> tuple[Key, ...]:
        """All keys from the root to `key`. KeyError when it is not in the tree."""
        node, offset = self._find(key)
        return _path(node, offset + 1)

    def is_leaf(self, key: Key) -> bool:
        """Whether no path goes on behind `key`. KeyError when it is not in the tree."""
        node = self._nodes[key]
        return not node.children and node.keys[-1] == key

    def remove(self, key: Key) -> Value:
        """Take the last key of a path out and return its value.

        KeyError when it is not in the tree, ValueError when a path goes on behind it.
        """
        node = self._nodes[key]
        if node.children or node.keys[-1] != key:
            raise ValueError("only the last key of a path can be removed")
        del self._nodes[key]
        node.keys.pop()
        value = node.values.pop()
        if not node.keys and node.parent is not None:
            above = node.parent
            del above.children[key]
            if len(above.children) == 1 and above is not self._root:
                self._merge(above)
        return value

    def clear(self) -> None:
        """Forget everything."""
        self._root = _Node([], [], None)
        self._nodes = {}

    def items(self) -> Iterator[tuple[Key, Value]]:
        """Every key with its value, each before all that lie behind it. The tree must not change meanwhile."""
        for node in self._walk():
            yield from zip(node.keys, node.values, strict=True)

    def items_leaf_first(self) -> list[tuple[Key, Value]]:
        """Every key with its value, each after all that lie behind it: the order in which keys can be removed."""
        items = list(self.items())
        items.reverse()
        return items

    def runs(self) -> Iterator[tuple[Key | None, Sequence[Key]]]:
        """Every run of keys without a branch, behind the last key of the run before it (None at the root).

        A run comes before those behind it. The tree must not change meanwhile.
        """
        for node in self._walk():
            if node.keys:
                above = node.parent.keys if node.parent is not None else []
                yield (above[-1] if above else None), node.keys

    def paths(self) -> Iterator[tuple[Key, ...]]:
        """Every path from the root to a leaf. The tree must not change meanwhile."""
        for node in self._walk():
            if not node.children and node.keys:
                yield _path(node, len(node.keys))

    def check(self) -> None:
        """Raise AssertionError unless runs are compressed, links agree and every key is known exactly once."""
        num_keys = 0
        for node in self._walk():
            num_keys += len(node.keys)
            assert len(node.keys) == len(node.values)
            assert all(self._nodes[key] is node for key in node.keys)
            assert bool(node.keys) != (node is self._root)
            assert node is self._root or len(node.children) != 1
            for first, child in node.children.items():
                assert child.keys[0] == first
                assert child.parent is node
        assert num_keys == len(self._nodes)

    def _walk(self) -> Iterator[_Node[Key, Value]]:
        stack = [self._root]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def _find(self, key: Key) -> tuple[_Node[Key, Value], int]:
        node = self._nodes[key]
        return node, _offset(node, key)

    def _descend(self, node: _Node[Key, Value], offset: int, keys: Sequence[Key]) -> tuple[_Node[Key, Value], int, int]:
        """Follow `keys` from behind the first `offset` keys of `node`: (node, offset, keys followed)."""
        keys = keys if isinstance(keys, list) else list(keys)
        matched, total = 0, len(keys)
        while True:
            run = node.keys
            span = min(len(run) - offset, total - matched)
            if run[offset : offset + span] != keys[matched : matched + span]:
                while run[offset] == keys[matched]:
                    offset += 1
                    matched += 1
                return node, offset, matched
            offset += span
            matched += span
            if matched == total or offset < len(run):
                return node, offset, matched
            child = node.children.get(keys[matched])
            if child is None:
                return node, offset, matched
            node, offset = child, 0

    def _split(self, node: _Node[Key, Value], offset: int) -> None:
        """Keep the first `offset` keys in `node`; the rest of the run becomes its only child."""
        lower = _Node(node.keys[offset:], node.values[offset:], node)
        lower.children = node.children
        for child in lower.children.values():
            child.parent = lower
        del node.keys[offset:], node.values[offset:]
        node.children = {lower.keys[0]: lower}
        self._nodes.update(dict.fromkeys(lower.keys, lower))

    def _merge(self, node: _Node[Key, Value]) -> None:
        """Take the run of `node`'s only child into `node`."""
        (lower,) = node.children.values()
        node.keys += lower.keys
        node.values += lower.values
        node.children = lower.children
        for child in node.children.values():
            child.parent = node
        self._nodes.update(dict.fromkeys(lower.keys, node))


def _offset(node: _Node[Key, Value], key: Key) -> int:
    return len(node.keys) - 1 if node.keys[-1] == key else node.keys.index(key)


def _path(node: _Node[Key, Value], offset: int) -> tuple[Key, ...]:
    runs = [node.keys[:offset]]
    while node.parent is not None:
        node = node.parent
        runs.append(node.keys)
    return tuple(key for run in reversed(runs) for key in run)
