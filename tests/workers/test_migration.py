"""A running request changes its worker while it streams: no token is lost, doubled or changed, and no block is lost."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from moving_fakes import Movers
from worker_fakes import BLOCK_SIZE, expected_stream

from duopool.core.handoff.request import Evicted, Moved, Phase, Stopped
from duopool.core.messages import BlocksReady, Stay
from duopool.core.types import RequestId

NAME = RequestId("r")


def running(num_tokens: int = 30, max_tokens: int = 40, **settings: int) -> Movers:
    """A request that decodes on worker 0 and has given a few tokens."""
    movers = Movers(**settings)
    movers.start(NAME, tuple(index % 40 + 8 for index in range(num_tokens)), 0, max_tokens=max_tokens, ignore_eos=True)
    while len(movers.streams[NAME]) < 5:
        movers.deliver_command(0)
        movers.step(0)
        while movers.deliver_event(0):
            pass
    assert movers.states[NAME].phase is Phase.DECODING
    return movers


def move(movers: Movers, to: int = 1) -> None:
    movers.feed(NAME, Moved(movers.decoders[to].member))
    assert movers.states[NAME].phase is Phase.MIGRATING


@pytest.mark.parametrize("num_tokens", [1, 2, BLOCK_SIZE, BLOCK_SIZE + 1, 30, 31, 32, 33])
@pytest.mark.parametrize("is_counted", [False, True])
def test_a_stream_goes_on_elsewhere_without_recomputing(num_tokens: int, is_counted: bool) -> None:
    movers = running(num_tokens, is_counted=is_counted)
    move(movers)
    movers.settle()
    assert movers.home(NAME) == 1
    state = movers.states[NAME]
    assert (state.phase, state.attempt) == (Phase.DONE, 2)
    assert movers.streams[NAME] == expected_stream(state.request.prompt_token_ids, state.request.params)
    # The target wrote KV for its own steps alone, one token each.
    assert all(len(chunk.token_ids) == 1 for plan in movers.decoders[1].runner.plans for chunk in plan.chunks)
    assert movers.audit() == []
    movers.assert_nothing_is_held()


def test_the_source_decodes_while_its_blocks_are_copied_and_stops_for_the_last_ones_only() -> None:
    movers = running(30, max_tokens=60)
    move(movers)
    movers.deliver_command(0)
    movers.deliver_command(1)
    before = len(movers.streams[NAME])
    for _ in range(3 * BLOCK_SIZE):  # nothing is read yet: the stream goes on where it is
        movers.step(0)
        while movers.deliver_event(0):
            pass
    assert len(movers.streams[NAME]) == before + 3 * BLOCK_SIZE
    listed = movers.states[NAME].shadow
    assert listed is not None
    assert listed.num_listed_blocks >= (30 + before) // BLOCK_SIZE
    movers.settle()
    last = [command for command in _said(movers, BlocksReady) if command.first_token is not None]
    assert movers.home(NAME) == 1
    assert last == [] or len(last[0].blocks) <= 2
    movers.assert_nothing_is_held()


def _said(movers: Movers, kind: type) -> list:
    return [command for decoder in movers.decoders for command in decoder.commands if isinstance(command, kind)]


def parked(**settings: int) -> Movers:
    """Worker 0 has made its last step for the request; worker 1 has not heard of it."""
    movers = running(**settings)
    move(movers)
    for _ in range(100):
        movers.deliver_command(0)
        movers.deliver_command(1)
        movers.read(1)
        movers.deliver_event(1)
        movers.step(0)
        while movers.deliver_event(0):
            pass
        if any(listing.first_token is not None for listing in _said(movers, BlocksReady)):
            return movers
    raise AssertionError("the request never stopped")


def test_the_last_listing_brings_the_tokens_that_came_meanwhile() -> None:
    movers = parked()
    (last,) = [one for one in _said(movers, BlocksReady) if one.first_token is not None]
    stream = movers.streams[NAME]
    known = movers.states[NAME].shadow
    assert known is not None
    assert last.output == tuple(stream[known.num_known_tokens : -1])
    assert last.first_token is not None
    assert last.first_token.token_ids == tuple(stream[-1:])
    movers.settle()
    movers.assert_nothing_is_held()


def test_a_request_whose_target_fails_stays_and_can_be_moved_again() -> None:
    movers = parked()
    movers.decoders[1].commands.clear()
    movers.feed(NAME, Evicted(movers.decoders[1].member))
    assert movers.states[NAME].phase is Phase.DECODING
    assert isinstance(movers.decoders[0].commands[-1], Stay)
    while movers.deliver_command(0):
        pass
    before = len(movers.streams[NAME])
    movers.step(0)
    movers.deliver_event(0)
    assert len(movers.streams[NAME]) == before + 1
    move(movers)
    movers.settle()
    assert movers.home(NAME) == 1
    assert movers.states[NAME].attempt == 3
    movers.assert_nothing_is_held()


def test_a_parked_request_that_nobody_takes_over_goes_on_by_itself() -> None:
    movers = parked()
    movers.decoders[1].commands.clear()
    movers.pass_time(3.0)
    assert not movers.step(0)
    movers.pass_time(3.0)
    assert movers.step(0)
    while movers.deliver_event(0):
        pass
    assert movers.states[NAME].phase is Phase.DECODING
    movers.settle()
    assert movers.states[NAME].phase is Phase.DONE
    movers.assert_nothing_is_held()


def test_a_damaged_block_drops_the_shadow_and_costs_nothing_else() -> None:
    movers = running()
    move(movers)
    while not movers.decoders[1].reader.pending:
        movers.deliver_command(0)
        movers.deliver_command(1)
        movers.step(0)
        movers.deliver_event(0)
    movers.read(1, error="digest")
    movers.settle()
    assert movers.home(NAME) == 0
    assert movers.states[NAME].phase is Phase.DONE
    movers.assert_nothing_is_held()


def test_a_request_that_ends_at_its_source_takes_its_shadow_along() -> None:
    movers = running(max_tokens=8)
    move(movers)
    movers.deliver_command(1)
    while movers.states[NAME].phase is not Phase.DONE:
        movers.step(0)
        movers.deliver_event(0)
    movers.settle()
    assert movers.home(NAME) == 0
    movers.assert_nothing_is_held()


def test_a_full_target_is_waited_for_while_the_stream_goes_on() -> None:
    movers = Movers(num_blocks=20)
    movers.start("full", tuple(range(8, 40)) * 2, 1, max_tokens=12, ignore_eos=True)
    movers.deliver_command(1)
    movers.step(1)
    movers.start(NAME, (45,) * 14, 0, max_tokens=60, ignore_eos=True)
    for _ in range(8):
        movers.deliver_command(0)
        movers.step(0)
        movers.deliver_event(0)
    while movers.deliver_event(0):
        pass
    move(movers)
    movers.deliver_command(1)
    assert movers.decoders[1].worker.load().num_waiting == 1
    movers.settle()
    assert movers.home(NAME) == 1
    assert {state.phase for state in movers.states.values()} == {Phase.DONE}
    movers.assert_nothing_is_held()


def test_a_preempted_request_refuses_to_move_and_comes_back() -> None:
    movers = Movers(num_blocks=12)
    for number, name in enumerate(("a", "b")):
        movers.start(name, (20 + number,) * 12, 0, max_tokens=30, ignore_eos=True)
    for _ in range(4):
        movers.deliver_command(0)
        movers.step(0)
        while movers.deliver_event(0):
            pass
    movers.feed("b", Moved(movers.decoders[1].member))
    movers.deliver_command(0)  # the target hears nothing yet
    while not movers.decoders[0].worker.load().num_preemptions:
        movers.step(0)
        movers.deliver_event(0)
    movers.settle()
    assert {state.phase for state in movers.states.values()} == {Phase.DONE}
    movers.assert_nothing_is_held()


class AnyMove(RuleBasedStateMachine):
    """Three workers; requests start, move, are evicted and stopped; queues run at any pace, reads fail, time passes."""

    movers: Movers

    @initialize(num_blocks=st.integers(16, 40), is_counted=st.booleans(), budget=st.integers(3, 24))
    def begin(self, num_blocks: int, is_counted: bool, budget: int) -> None:
        self.movers = Movers(
            3, num_blocks=num_blocks, is_counted=is_counted, max_num_batched_tokens=budget, max_num_seqs=3
        )
        for on, name in enumerate("ab"):
            self.start(name, 7, 30, on)
        self.take_turns(4)

    @rule(name=st.sampled_from("abcd"), length=st.integers(1, 14), rest=st.integers(1, 20), on=st.integers(0, 2))
    def start(self, name: str, length: int, rest: int, on: int) -> None:
        if name not in self.movers.states:
            prompt = (*range(8, 8 + length // 2), *[ord(name) % 40] * (length - length // 2))
            self.movers.start(name, prompt, on, max_tokens=rest, ignore_eos=True)

    @rule(name=st.sampled_from("abcd"), by=st.integers(1, 2))
    def move(self, name: str, by: int) -> None:
        if name in self.movers.states and self.movers.states[name].route is not None:
            to = (self.movers.home(name) + by) % 3
            self.movers.feed(name, Moved(self.movers.decoders[to].member))

    @rule(name=st.sampled_from("abcd"), on=st.integers(0, 2), dice=st.integers(0, 3))
    def evict(self, name: str, on: int, dice: int) -> None:
        if dice == 0 and name in self.movers.states:
            self.movers.feed(name, Evicted(self.movers.decoders[on].member))

    @rule(name=st.sampled_from("abcd"), dice=st.integers(0, 9))
    def stop(self, name: str, dice: int) -> None:
        if dice == 0 and name in self.movers.states:
            self.movers.feed(name, Stopped(Phase.CANCELLED))

    @rule(on=st.integers(0, 2), to=st.integers(1, 3), num=st.integers(1, 4))
    def run_worker(self, on: int, to: int, num: int) -> None:
        for _ in range(num):
            self.movers.deliver_command(on)
            self.movers.step(on)
            for _ in range(to):
                self.movers.deliver_event(on)

    @rule(on=st.integers(0, 2), error=st.sampled_from(["", "", "", "", "broken"]))
    def read(self, on: int, error: str) -> None:
        self.movers.read(on, error=error)

    @rule(on=st.integers(0, 2))
    def deliver(self, on: int) -> None:
        for _ in range(3):
            self.movers.deliver_command(on)
            self.movers.deliver_event(on)

    @rule(on=st.integers(0, 2))
    def command_during_a_step(self, on: int) -> None:
        runner = self.movers.decoders[on].runner
        runner.during_step = lambda: [self.movers.deliver_command(on) for _ in range(2)]
        self.movers.step(on)
        runner.during_step = lambda: None

    @rule(num=st.integers(1, 3))
    def take_turns(self, num: int) -> None:
        for _ in range(num):
            self.movers.turn()

    @rule(seconds=st.sampled_from([0.1, 3.0, 6.0]))
    def pass_time(self, seconds: float) -> None:
        self.movers.pass_time(seconds)

    @invariant()
    def laws_hold(self) -> None:
        if hasattr(self, "movers"):
            for decoder in self.movers.decoders:
                decoder.worker.check()
            for request_id, state in self.movers.states.items():
                whole = expected_stream(state.request.prompt_token_ids, state.request.params)
                assert self.movers.streams[request_id] == whole[: len(self.movers.streams[request_id])]
            assert self.movers.audit() == []

    def teardown(self) -> None:
        """If nothing fails any more, every request ends with its stream, and nothing is held."""
        if not hasattr(self, "movers"):
            return
        movers = self.movers
        for _ in range(4):
            for name in list(movers.homeless):
                movers.route(name, 0)
            for _ in range(400):
                if not movers.turn():
                    break
            movers.pass_time(1.0)
        assert set(movers.finishes) == set(movers.states)
        for request_id, finish in movers.finishes.items():
            state = movers.states[request_id]
            if finish.phase is Phase.DONE:
                assert movers.streams[request_id] == expected_stream(
                    state.request.prompt_token_ids, state.request.params
                )
        movers.assert_nothing_is_held()


AnyMove.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestAnyMove = AnyMove.TestCase
