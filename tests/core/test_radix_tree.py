"""The radix tree against a dictionary from keys to values, where a key is its whole path."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from duopool.core.radix_tree import RadixTree

PathKey = tuple[int, ...]
STEPS = st.lists(st.integers(0, 2), max_size=7)


def path_of(steps: list[int]) -> list[PathKey]:
    """Chained keys of a walk: like a digest, each names all steps up to it."""
    return [tuple(steps[: end + 1]) for end in range(len(steps))]


class TreeMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.tree: RadixTree[PathKey, int] = RadixTree()
        self.model: dict[PathKey, int] = {}
        self.counter = 0

    def known(self, keys: list[PathKey]) -> int:
        return sum(key in self.model for key in keys)

    @rule(steps=STEPS, start=st.integers(0, 7))
    def insert(self, steps: list[int], start: int) -> None:
        keys = path_of(steps)
        start = min(start, self.known(keys))
        below = keys[start:]
        values = list(range(self.counter, self.counter + len(below)))
        self.counter += len(below)
        assert self.tree.insert(below, values, parent=keys[start - 1] if start else None) == self.known(below)
        for key, value in zip(below, values, strict=True):
            self.model.setdefault(key, value)

    @rule(steps=STEPS)
    def match(self, steps: list[int]) -> None:
        keys = path_of(steps)
        expected = [self.model[key] for key in keys if key in self.model]
        assert self.tree.match(keys) == expected
        assert self.tree.match_length(tuple(keys)) == len(expected)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.model)))
        is_leaf = not any(other[:-1] == key for other in self.model)
        assert self.tree.is_leaf(key) == is_leaf
        if not is_leaf:
            with pytest.raises(ValueError, match="last key"):
                self.tree.remove(key)
            return
        assert self.tree.remove(key) == self.model.pop(key)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def replace(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.model)))
        self.counter += 1
        self.tree.replace(key, self.counter)
        self.model[key] = self.counter

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def a_key_on_a_second_path_is_refused(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.model)))
        with pytest.raises(ValueError, match="two paths"):
            self.tree.insert([(9,), key], [0, 0])
        with pytest.raises(ValueError, match="two paths"):
            self.tree.insert([(9,), (9,)], [0, 0], parent=key)
        with pytest.raises(KeyError):
            self.tree.insert([(9, 9)], [0], parent=(9,))

    @rule()
    def clear(self) -> None:
        if self.counter % 7 == 0:
            self.tree.clear()
            self.model = {}

    @invariant()
    def agrees(self) -> None:
        self.tree.check()
        assert dict(self.tree.items()) == self.model
        assert len(self.tree) == len(self.model)
        for key, value in self.model.items():
            assert key in self.tree
            assert self.tree.get(key) == value
            assert self.tree.parent(key) == (key[:-1] or None)
            assert self.tree.path(key) == tuple(path_of(list(key)))
        leaves = {key for key in self.model if not any(other[:-1] == key for other in self.model)}
        assert {path[-1]: path for path in self.tree.paths()} == {leaf: self.tree.path(leaf) for leaf in leaves}

    def teardown(self) -> None:
        for key, value in self.tree.items_leaf_first():
            assert self.tree.remove(key) == value
        self.tree.check()
        assert len(self.tree) == 0


TestTree = TreeMachine.TestCase
TestTree.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)


def test_a_walk_without_branches_is_one_node_however_it_came() -> None:
    tree: RadixTree[int, int] = RadixTree()
    for key in range(100):
        tree.insert([key], [key], parent=key - 1 if key else None)
    tree.insert([1000], [0], parent=49)
    tree.remove(1000)
    assert len(list(tree._walk())) == 2
    assert tree.match(range(100)) == list(range(100))
