"""What a worker says of its load, and how often."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from duopool.core.messages import WorkerLoad
from duopool.core.worker import SessionId
from duopool.engine.outbox import MOST_SILENT_TICKS, Outbox


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40))
def test_load_is_said_when_it_changes_and_at_least_every_few_ticks(num_running: list[int]) -> None:
    outbox = Outbox()
    outbox.open(SessionId(1), now=0.0)
    told: WorkerLoad | None = None
    for num_ticks, number in enumerate(num_running):
        load = WorkerLoad(num_running=number, num_ticks=num_ticks)
        outbox.say_load(load)
        said = [addressed.event for addressed in outbox.take()]
        if said:
            assert said == [load]
            told = load
        assert told is not None
        assert told.num_running == number
        assert num_ticks - told.num_ticks < MOST_SILENT_TICKS


def test_an_idle_worker_says_little() -> None:
    outbox = Outbox()
    outbox.open(SessionId(1), now=0.0)
    for num_ticks in range(10 * MOST_SILENT_TICKS):
        outbox.say_load(WorkerLoad(num_ticks=num_ticks))
    assert len(outbox.take()) == 10
