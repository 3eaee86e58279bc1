"""Who finds room to wait is told at once, and in time; accepted work is what leaves at the measured rate."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duopool.core.errors import Overloaded
from duopool.router.waiting_room import USED_SHARE, WaitingRoom


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def room_of(*, max_num_tokens: int = 1000, max_wait_s: float = 60.0) -> tuple[WaitingRoom, Clock]:
    clock = Clock()
    return WaitingRoom(max_num_tokens=max_num_tokens, max_wait_s=max_wait_s, clock=clock), clock


def drain(room: WaitingRoom, clock: Clock, *, tokens: int, seconds: float, times: int, decode_s: float = 0.0) -> None:
    """Requests one after the other, each waits for so long; then they decode 10 tokens in so long."""
    for _ in range(times):
        with room.enter([tokens], max_tokens=99, time_left_s=None) as (place,):
            clock.now += seconds
            place.decodes()
            for _ in range(10):
                clock.now += decode_s / 10
                place.emitted(1)
            place.leave(is_finished=True)


def test_an_empty_room_takes_a_prompt_of_any_size() -> None:
    room, _ = room_of(max_num_tokens=10)
    with room.enter([500], max_tokens=99, time_left_s=0.001):
        assert room.num_tokens == 500
    assert room.num_tokens == 0


def test_past_its_tokens_the_room_is_full_and_says_when_to_come_back() -> None:
    room, clock = room_of(max_num_tokens=100)
    drain(room, clock, tokens=10, seconds=1.0, times=5)
    with room.enter([60], max_tokens=99, time_left_s=None):
        with room.enter([40], max_tokens=99, time_left_s=None):
            with pytest.raises(Overloaded, match="100 tokens wait already, the limit is 100") as caught:
                room.check(20, max_tokens=99, time_left_s=None)
            assert caught.value.retry_after_s == pytest.approx(2.0)
            assert room.num_tokens == 100
        room.check(20, max_tokens=99, time_left_s=None)


def test_who_would_wait_past_the_deadline_is_refused_and_who_has_time_is_not() -> None:
    room, clock = room_of()
    drain(room, clock, tokens=10, seconds=1.0, times=20, decode_s=3.0)
    with room.enter([40], max_tokens=99, time_left_s=None):
        # 5 s of work then, and 3 s of decoding behind it, in the share of the time that may be used.
        room.check(10, max_tokens=99, time_left_s=8.1 / USED_SHARE)
        with pytest.raises(Overloaded, match=r"the wait is 5\.0 s, 4\.9 s are left for it"):
            room.check(10, max_tokens=99, time_left_s=7.9 / USED_SHARE)
        with pytest.raises(Overloaded):
            room.check(10, max_tokens=99, time_left_s=0.0)


def test_an_output_is_taken_to_be_as_long_as_those_of_about_the_same_limit() -> None:
    room, clock = room_of()
    for max_tokens, num_tokens in ((50, 40), (1000, 200)) * 30:
        with room.enter([1], max_tokens=max_tokens, time_left_s=None) as (place,):
            place.decodes()
            for _ in range(num_tokens):
                clock.now += 0.1
                place.emitted(1)
            place.leave(is_finished=True)
    assert room.decoding_s(40) == pytest.approx(4.0)
    assert room.decoding_s(63) == pytest.approx(4.0)
    assert room.decoding_s(900) == pytest.approx(20.0)
    assert room.decoding_s(5) == pytest.approx(0.5), "never more than it may have"


def test_a_newcomer_waits_for_its_own_priority_and_earlier_ones() -> None:
    room, clock = room_of(max_num_tokens=1000)
    drain(room, clock, tokens=10, seconds=1.0, times=5)
    with room.enter([100], max_tokens=1, time_left_s=None, priority=2):
        room.check(10, max_tokens=1, time_left_s=5.0, priority=1)
        for priority in (2, 3):
            with pytest.raises(Overloaded, match="the wait is 11"):
                room.check(10, max_tokens=1, time_left_s=5.0, priority=priority)
    room.check(10, max_tokens=1, time_left_s=5.0, priority=3)


def test_nobody_waits_longer_than_the_limit() -> None:
    room, clock = room_of(max_wait_s=7.5)
    drain(room, clock, tokens=10, seconds=1.0, times=20)
    with room.enter([70], max_tokens=99, time_left_s=None):
        room.check(5, max_tokens=99, time_left_s=None)
        with pytest.raises(Overloaded, match=r"the wait is 7\.6 s, 7\.5 s are left") as caught:
            room.check(6, max_tokens=99, time_left_s=None)
        assert caught.value.retry_after_s == 0.5


def test_a_call_finds_room_for_all_its_requests_or_for_none() -> None:
    room, _ = room_of(max_num_tokens=100)
    with room.enter([30], max_tokens=99, time_left_s=None):
        with pytest.raises(Overloaded), room.enter([40, 40], max_tokens=99, time_left_s=None):
            raise AssertionError("not reached")
        assert room.num_tokens == 30


def test_without_a_measured_rate_nobody_is_refused_for_the_wait() -> None:
    room, _ = room_of(max_wait_s=0.1)
    with room.enter([900], max_tokens=99, time_left_s=None):
        room.check(100, max_tokens=99, time_left_s=0.0)


def test_requests_that_end_before_they_decode_say_nothing_about_the_rate() -> None:
    room, clock = room_of()
    drain(room, clock, tokens=10, seconds=1.0, times=20)
    expected = room.wait_s(100)
    for _ in range(20):
        with room.enter([500], max_tokens=99, time_left_s=None):
            pass
    assert room.wait_s(100) == pytest.approx(expected)


def test_a_standstill_makes_the_wait_longer() -> None:
    room, clock = room_of()
    drain(room, clock, tokens=10, seconds=1.0, times=20)
    with room.enter([50], max_tokens=99, time_left_s=None):
        before = room.wait_s(50)
        clock.now += 10
        assert room.wait_s(50) > 2 * before


@given(st.lists(st.tuples(st.integers(1, 400), st.sampled_from(["decodes", "leave", "nothing"])), max_size=30))
def test_in_the_end_the_room_is_empty(requests: list[tuple[int, str]]) -> None:
    room, clock = room_of(max_num_tokens=10**6)
    with room.enter([tokens for tokens, _ in requests], max_tokens=99, time_left_s=None) as places:
        assert room.num_tokens == sum(tokens for tokens, _ in requests)
        for place, (_, what) in zip(places, requests, strict=True):
            clock.now += 0.1
            if what != "nothing":
                getattr(place, what)()
        assert room.num_tokens == sum(tokens for tokens, what in requests if what == "nothing")
    assert room.num_tokens == 0
