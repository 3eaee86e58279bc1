"""The shared index agrees with a set of keys per worker, whatever the workers say and whatever is missed."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from duopool.core.handoff.request import Member
from duopool.core.messages import KvChanged, KvSnapshot, KvStoredSegment
from duopool.core.types import BlockKey, Incarnation, WorkerId
from duopool.router.prefix_index import PrefixIndex

MEMBERS = tuple(Member(WorkerId(f"decode-{n}"), Incarnation(n + 1)) for n in range(3))
member = st.sampled_from(MEMBERS)
path = st.lists(st.integers(0, 2), min_size=1, max_size=5)


def keys_of(names: list[int]) -> tuple[BlockKey, ...]:
    """Keys that name their whole path, as chained digests do."""
    return tuple(BlockKey(bytes(names[: length + 1])) for length in range(len(names)))


class IndexMachine(RuleBasedStateMachine):
    """`held` is what each worker really holds; messages of a worker may be lost before the index sees them."""

    @initialize()
    def begin(self) -> None:
        self.index = PrefixIndex()
        self.held: dict[Member, set[BlockKey]] = {}
        self.sequence: dict[Member, int] = {}
        self.in_step: dict[Member, bool] = {}
        """Whether the index has seen everything that the worker said."""

    def tell(self, who: Member, *, lost: bool, stored=(), removed=()) -> None:
        self.sequence[who] += 1
        event = KvChanged(sequence=self.sequence[who], stored=tuple(stored), removed=tuple(removed))
        if lost:
            self.in_step[who] = False
            return
        wants_snapshot = self.index.apply(who, event)
        assert not (wants_snapshot and self.in_step[who])

    @rule(who=member)
    def join(self, who: Member) -> None:
        if who not in self.held:
            self.index.add(who)
            self.held[who], self.sequence[who], self.in_step[who] = set(), 0, False
            self.snapshot(who)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), names=path, lost=st.booleans())
    def store(self, data: st.DataObject, names: list[int], lost: bool) -> None:
        who = data.draw(st.sampled_from(sorted(self.held, key=str)))
        keys = keys_of(names)
        known = next((n for n, key in enumerate(keys) if key not in self.held[who]), len(keys))
        if known == len(keys):
            return
        parent = keys[known - 1] if known else None
        self.held[who].update(keys)
        self.tell(who, lost=lost, stored=[KvStoredSegment(parent=parent, keys=keys[known:])])

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data(), lost=st.booleans())
    def evict_a_leaf(self, data: st.DataObject, lost: bool) -> None:
        who = data.draw(st.sampled_from(sorted((m for m in self.held if self.held[m]), key=str)))
        leaves = [key for key in self.held[who] if not any(k[:-1] == key for k in self.held[who])]
        leaf = data.draw(st.sampled_from(sorted(leaves)))
        self.held[who].discard(leaf)
        self.tell(who, lost=lost, removed=[leaf])

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def send_snapshot(self, data: st.DataObject) -> None:
        self.snapshot(data.draw(st.sampled_from(sorted(self.held, key=str))))

    def snapshot(self, who: Member) -> None:
        leaves = [key for key in self.held[who] if not any(k[:-1] == key for k in self.held[who])]
        paths = tuple(keys_of(list(leaf)) for leaf in leaves)
        assert not self.index.apply(who, KvSnapshot(sequence=self.sequence[who], paths=paths))
        self.in_step[who] = True

    @rule(who=member)
    def leave(self, who: Member) -> None:
        self.index.drop(who)
        self.held.pop(who, None)

    @invariant()
    def index_is_sound(self) -> None:
        self.index.check()
        for who, keys in self.held.items():
            if self.in_step[who]:
                assert self.index.keys_of(who) == keys
        assert all(not self.index.keys_of(who) for who in MEMBERS if who not in self.held)

    @rule(names=path)
    def hits_are_the_common_prefix(self, names: list[int]) -> None:
        hits = self.index.num_hits(keys_of(names))
        for who, keys in self.held.items():
            if self.in_step[who]:
                expected = next((n for n, key in enumerate(keys_of(names)) if key not in keys), len(names))
                assert hits[who] == expected


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_gap_is_noticed_once_and_healed_by_a_snapshot() -> None:
    index, who = PrefixIndex(), MEMBERS[0]
    index.add(who)
    index.apply(who, KvSnapshot(sequence=4, paths=()))
    (first, second) = keys_of([1, 2])
    stored = (KvStoredSegment(parent=first, keys=(second,)),)
    assert index.apply(who, KvChanged(sequence=6, stored=stored))
    assert not index.apply(who, KvChanged(sequence=7))
    assert not index.apply(who, KvSnapshot(sequence=7, paths=((first, second),)))
    assert index.num_hits([first, second]) == {who: 2}
    assert not index.apply(who, KvChanged(sequence=8, removed=(second,)))
    assert index.num_hits([first, second]) == {who: 1}


def test_news_that_does_not_fit_asks_for_a_snapshot() -> None:
    index, who = PrefixIndex(), MEMBERS[0]
    index.add(who)
    index.apply(who, KvSnapshot(sequence=0, paths=()))
    first, second = keys_of([1, 2])
    assert index.apply(who, KvChanged(sequence=1, stored=(KvStoredSegment(parent=first, keys=(second,)),)))
    index.check()


def test_a_worker_that_is_wrong_about_a_block_silences_nobody_else() -> None:
    """One says that `b` lies at the root, where others have it behind `a`."""
    index = PrefixIndex()
    wrong, right = MEMBERS[:2]
    a, b, c = (BlockKey(bytes([n]) * 16) for n in range(3))
    for who in (wrong, right):
        index.add(who)
        index.apply(who, KvSnapshot(sequence=0, paths=()))
    index.apply(wrong, KvChanged(sequence=1, stored=(KvStoredSegment(None, (b,)),)))
    assert not index.apply(
        right, KvChanged(sequence=1, stored=(KvStoredSegment(None, (a, b)), KvStoredSegment(None, (c,))))
    )
    index.check()
    assert index.num_hits([c])[right] == 1
    index.drop(wrong)
    index.apply(right, KvSnapshot(sequence=2, paths=((a, b), (c,))))
    index.check()
    assert index.num_hits([a, b])[right] == 2
