"""D's slot under doubled listings, failing reads, wrong verdicts and drops at any moment."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from duopool.core.handoff.slot import (
    Confirm,
    Dropped,
    GiveBack,
    Granted,
    Join,
    Listed,
    Read,
    ReadEnded,
    Refuse,
    Slot,
    SlotPhase,
    Validated,
    transition,
)
from duopool.core.messages import BlocksReady, LeaseRef, SealedBlock, Tokens
from duopool.core.types import BlockId, Incarnation, LeaseId, RequestId, WorkerId

LEASE = LeaseRef(lease_id=LeaseId(1), worker_id=WorkerId("p"), incarnation=Incarnation(1), source_address="p:1")
FIRST_TOKEN = Tokens(request_id=RequestId("r"), attempt=1, index=0, token_ids=(5,))


def sealed(number: int) -> SealedBlock:
    return SealedBlock(BlockId(100 + number), 1, number)


class SlotMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.slot = Slot(attempt=1)
        self.running: list[Read] = []
        self.arrived: set[int] = set()
        self.all_well = True
        self.confirms_open = 0
        self.num_confirms = 0
        self.granted = False
        self.joins = 0
        self.given_back = 0
        self.refusals = 0

    @initialize(cuts=st.lists(st.integers(0, 8), max_size=4), num_blocks=st.integers(1, 8), data=st.data())
    def chunks(self, cuts: list[int], num_blocks: int, data: st.DataObject) -> None:
        """P lists the blocks in chunks, some of them empty; the last one carries the first token."""
        edges = [0, *sorted(min(cut, num_blocks) for cut in cuts), num_blocks]
        self.num_blocks = num_blocks
        self.num_cached = data.draw(st.integers(0, num_blocks))
        self.messages = [
            BlocksReady(
                request_id=RequestId("r"),
                attempt=1,
                lease=LEASE,
                first_block=begin,
                blocks=tuple(sealed(number) for number in range(begin, end)),
                first_token=FIRST_TOKEN if place == len(edges) - 2 else None,
            )
            for place, (begin, end) in enumerate(pairwise(edges))
        ]

    def feed(self, event: object) -> None:
        over = self.slot.phase in (SlotPhase.COMMITTED, SlotPhase.GONE)
        self.slot, actions = transition(self.slot, event)  # type: ignore[arg-type]
        assert not (over and actions)
        for action in actions:
            match action:
                case Read(sources=sources, targets=targets):
                    assert self.given_back == self.joins == self.refusals == 0
                    numbers = [source.block_id - 100 for source in sources]
                    assert list(targets) == numbers, "a page would land in the wrong block"
                    assert numbers
                    assert not self.arrived & set(numbers)
                    assert min(numbers) >= self.num_cached
                    self.running.append(action)
                case Confirm():
                    assert self.running == []
                    assert self.arrived == set(range(self.num_cached, self.num_blocks))
                    self.num_confirms += 1
                    self.confirms_open += 1
                case Join(first_token=first_token):
                    assert isinstance(event, Validated)
                    assert event.ok
                    assert self.all_well
                    assert first_token == FIRST_TOKEN
                    self.joins += 1
                case GiveBack():
                    assert self.running == [], "blocks were given back while a read may write into them"
                    self.given_back += 1
                case Refuse():
                    self.refusals += 1

    @precondition(lambda self: not self.granted)
    @rule()
    def grant(self) -> None:
        self.granted = True
        self.feed(Granted(tuple(BlockId(number) for number in range(self.num_blocks)), self.num_cached))

    @rule(place=st.integers(0, 5))
    def hear(self, place: int) -> None:
        """Any listing, in any order, any number of times."""
        self.feed(Listed(self.messages[min(place, len(self.messages) - 1)]))

    @precondition(lambda self: self.running)
    @rule(place=st.integers(0, 7), fails=st.integers(0, 4))
    def end_read(self, place: int, fails: int) -> None:
        read = self.running.pop(place % len(self.running))
        if fails == 0:
            self.all_well = False
        else:
            self.arrived |= set(read.targets)
        self.feed(ReadEnded("" if fails else "digest"))

    @precondition(lambda self: self.confirms_open)
    @rule(ok=st.booleans())
    def verdict(self, ok: bool) -> None:
        self.confirms_open -= 1
        self.feed(Validated(ok, "" if ok else "lease expired"))

    @rule(dice=st.integers(0, 7))
    def drop(self, dice: int) -> None:
        if dice == 0:
            self.feed(Dropped())

    @invariant()
    def a_slot_ends_once_and_one_way(self) -> None:
        assert self.joins + self.given_back <= 1
        assert self.refusals <= 1
        assert self.num_confirms <= 1
        assert (self.slot.phase is SlotPhase.COMMITTED) == (self.joins == 1)
        assert (self.slot.phase is SlotPhase.GONE) == (self.given_back == 1)

    @invariant()
    def reads_are_counted(self) -> None:
        if self.slot.phase not in (SlotPhase.COMMITTED, SlotPhase.GONE):
            assert self.slot.num_reads == len(self.running)

    def teardown(self) -> None:
        """If nothing fails any more, the slot joins or has given everything back."""
        if not hasattr(self, "messages"):
            return
        if not self.granted:
            self.grant()
        for message in self.messages:
            self.feed(Listed(message))
        while self.running:
            self.end_read(0, 1)
        if self.confirms_open:
            self.verdict(True)
        assert self.joins + self.given_back == 1
        self.a_slot_ends_once_and_one_way()


TestSlot = SlotMachine.TestCase
TestSlot.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)


def test_more_blocks_than_were_reserved_are_refused() -> None:
    slot, _ = transition(Slot(attempt=1), Granted((BlockId(0), BlockId(1)), 0))
    blocks = tuple(sealed(number) for number in range(3))
    message = BlocksReady(request_id=RequestId("r"), attempt=1, lease=LEASE, first_block=0, blocks=blocks)
    slot, actions = transition(slot, Listed(message))
    assert [type(action) for action in actions] == [Refuse, GiveBack]
    assert slot.phase is SlotPhase.GONE


def test_a_gap_in_what_is_listed_ends_the_slot() -> None:
    """The message in between was lost or is late; nobody will say it again in order."""
    slot, _ = transition(Slot(attempt=1), Granted((BlockId(0), BlockId(1)), 0))
    late = BlocksReady(request_id=RequestId("r"), attempt=1, lease=LEASE, first_block=1, blocks=(sealed(1),))
    slot, actions = transition(slot, Listed(late))
    assert [type(action) for action in actions] == [Refuse, GiveBack]
    assert slot.phase is SlotPhase.GONE
