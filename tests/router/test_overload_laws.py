"""Under loads far past capacity what the router accepts ends in time, and as much ends as could."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from random import Random

import pytest
from overloaded_system import Machine, System, Wish, closed_loop, open_loop

SHARED = Machine(step_s=0.015, sequence_s=0.0019, prompt_token_s=0.0004, max_num_seqs=64, slowdown=1.9)
"""Both stages on the same cores; fitted to SmolLM2 on two."""
PREFILL_BOUND = Machine(step_s=0.02, sequence_s=0.0002, prompt_token_s=0.002, max_num_seqs=64)
SEATS_BOUND = Machine(step_s=0.12, sequence_s=0.001, prompt_token_s=0.0006, max_num_seqs=32)
MACHINES = {
    "shared": SHARED,
    "shared, 32 seats": replace(SHARED, max_num_seqs=32),
    "shared, unsteady": replace(SHARED, hiccup_s=3.0),
    "prefill-bound": PREFILL_BOUND,
    "seats-bound": SEATS_BOUND,
}
WISHES = {
    "short": Wish(prompt_tokens=64, output_tokens=16, deadline_s=10),
    "short, little time": Wish(prompt_tokens=64, output_tokens=16, deadline_s=5),
    "long": Wish(prompt_tokens=128, output_tokens=64, deadline_s=30),
    "mostly prompt": Wish(prompt_tokens=1000, output_tokens=8, deadline_s=20),
}
MIXED = (
    WISHES["short"],
    Wish(prompt_tokens=400, output_tokens=8, deadline_s=10),
    Wish(prompt_tokens=64, output_tokens=160, deadline_s=30),
    Wish(prompt_tokens=128, output_tokens=32, deadline_s=60),
)


@cache
def peak(machine: Machine, wish: Wish) -> float:
    return max(closed_loop(machine, wish, num_streams=number) for number in (8, 64, 96))


@pytest.mark.parametrize("wish", WISHES.values(), ids=WISHES)
@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_at_ten_times_the_peak_nothing_is_late_and_as_much_ends_as_can(machine: Machine, wish: Wish) -> None:
    best, random, system = peak(machine, wish), Random(1), System(machine)
    open_loop(system, lambda: wish, rate=0.9 * best, seconds=30.0, random=random)
    begin = system.now
    outcome = open_loop(system, lambda: wish, rate=10 * best, seconds=110.0, random=random)
    assert outcome.num_late == 0
    assert outcome.goodput(begin + 30.0, begin + 110.0) >= 0.95 * best


@pytest.mark.parametrize("wish", WISHES.values(), ids=WISHES)
@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_a_router_that_has_seen_nothing_yet_accepts_nothing_that_is_late(machine: Machine, wish: Wish) -> None:
    rate = 10 * peak(machine, wish)
    outcome = open_loop(System(machine), lambda: wish, rate=rate, seconds=15.0, random=Random(2))
    assert outcome.num_accepted > 0
    assert outcome.num_late == 0


@pytest.mark.parametrize("load", [0.5, 0.8, 1.5])
def test_near_the_peak_few_are_refused(load: float) -> None:
    wish = WISHES["short"]
    best = peak(SHARED, wish)
    outcome = open_loop(System(SHARED), lambda: wish, rate=load * best, seconds=100.0, random=Random(3))
    assert outcome.num_late == 0
    assert outcome.num_accepted >= 0.98 * outcome.num_offered * min(1.0, 1 / load)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_where_requests_of_all_sizes_come_together_hardly_one_is_late(machine: Machine) -> None:
    random, system = Random(4), System(machine)

    def wish() -> Wish:
        return random.choice(MIXED)

    open_loop(system, wish, rate=4.0, seconds=30.0, random=random)
    outcome = open_loop(system, wish, rate=40.0, seconds=90.0, random=random)
    assert outcome.num_late <= 0.005 * outcome.num_accepted


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_an_earlier_priority_hardly_notices_the_load_of_a_later_one(machine: Machine) -> None:
    """Three in a hundred requests come first: a third of what the system can do."""
    random, system, first = Random(5), System(machine), WISHES["short"]
    later, rate = replace(first, priority=1), 10 * peak(machine, first)
    accepted = []
    while system.now < 60.0:
        system.advance(system.now + random.expovariate(rate))
        if random.random() < 0.03:
            accepted.append(system.offer(first))
        else:
            system.offer(later)
    assert sum(accepted) >= 0.9 * len(accepted)
    assert system.outcome.num_late == 0
