"""A decode worker rests between steps while a burst is prefilled on the same cores, and only then."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from moving_fakes import Movers
from worker_fakes import BLOCK_SIZE, Clock, make_pair

from duopool.core.handoff.request import Moved, Phase
from duopool.core.types import RequestId
from duopool.decode_worker.pace import LONGEST_REST_S, rest_s
from duopool.engine.step_loop import TICK_S, StepLoop

steps = st.floats(0.001, 1.0)
few, some = st.integers(0, 64), st.integers(1, 64)


@given(step_s=steps, num_running=some, num_coming=few)
def test_the_rest_grows_with_what_comes_and_shrinks_with_what_runs(
    step_s: float, num_running: int, num_coming: int
) -> None:
    rest = rest_s(step_s=step_s, num_running=num_running, num_coming=num_coming)
    assert 0 <= rest <= LONGEST_REST_S
    assert rest <= rest_s(step_s=step_s, num_running=num_running, num_coming=num_coming + 1)
    assert rest >= rest_s(step_s=step_s, num_running=num_running + 1, num_coming=num_coming)
    assert (rest == 0) == (num_coming <= 1)


def test_a_worker_rests_while_most_of_a_burst_is_on_its_way() -> None:
    pair = make_pair(prefill={"max_num_batched_tokens": BLOCK_SIZE})
    for number in range(3):
        pair.send(pair.request(f"r{number}", [number, *range(10, 10 + BLOCK_SIZE - 1)], max_tokens=9, ignore_eos=True))
    assert pair.decode.rest_s == 0  # nobody decodes
    pair.decode_runner.during_step = lambda: setattr(pair.clock, "now", pair.clock.now + 0.01)
    while not pair.decode.load().num_running:
        pair.step_prefill()
        pair.run_reads()
    pair.step_decode()
    assert pair.decode.rest_s > 0
    while pair.step_prefill():
        pair.run_reads()
    pair.step_decode()
    assert pair.decode.load().num_running == 3
    assert pair.decode.rest_s == 0


def test_nobody_rests_for_streams_that_come_from_another_worker() -> None:
    movers = Movers()
    for number in range(4):
        movers.start(f"r{number}", tuple(range(10 + number, 40 + number)), number // 3, max_tokens=40, ignore_eos=True)
    while min(map(len, movers.streams.values())) < 3:
        movers.turn()
    target = movers.decoders[1]
    for number in range(3):
        movers.feed(f"r{number}", Moved(target.member))
        assert movers.states[RequestId(f"r{number}")].phase is Phase.MIGRATING
        while movers.deliver_command(1):
            pass
    target.runner.during_step = lambda: setattr(movers.clock, "now", movers.clock.now + 0.01)
    assert movers.step(1)
    assert target.worker.load().num_running == 1
    assert target.worker.rest_s == 0
    movers.settle()
    assert {movers.home(f"r{number}") for number in range(4)} == {1}
    movers.assert_nothing_is_held()


class RestingWorker:
    """Steps at once and asks for rest."""

    def __init__(self, clock: Clock, rest: float) -> None:
        self.rest_s = rest
        self.stepped_at: list[float] = []
        self.ticked_at: list[float] = []
        self._clock = clock

    def step(self, *, now: float) -> bool:
        self.stepped_at.append(now)
        return True

    def tick(self, *, now: float) -> None:
        self.ticked_at.append(now)


@given(rest=st.floats(0, 0.3), wakes=st.lists(st.floats(0.001, 0.05), min_size=20, max_size=60))
def test_no_wake_shortens_a_rest_and_timers_go_on(rest: float, wakes: list[float]) -> None:
    clock = Clock()
    worker = RestingWorker(clock, rest)
    loop = StepLoop(worker, flush=lambda: None, on_fatal=lambda error: None, clock=clock)  # type: ignore[arg-type]
    for wake in wakes:
        clock.now += min(wake, loop.turn())
    assert all(later - earlier >= rest - 1e-9 for earlier, later in pairwise(worker.stepped_at))
    assert all(later - earlier <= TICK_S + max(wakes) + 1e-9 for earlier, later in pairwise(worker.ticked_at))


def test_without_rest_steps_follow_each_other() -> None:
    clock = Clock()
    worker = RestingWorker(clock, 0.0)
    loop = StepLoop(worker, flush=lambda: None, on_fatal=lambda error: None, clock=clock)  # type: ignore[arg-type]
    assert [loop.turn() for _ in range(5)] == [0.0] * 5
    assert len(worker.stepped_at) == 5
