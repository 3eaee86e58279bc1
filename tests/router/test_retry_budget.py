"""The budget of further attempts: bounded by burst, traffic and time together."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from duopool.core.config import HandoffConfig
from duopool.router.retry_budget import RetryBudget

CONFIG = HandoffConfig(retry_share=0.125, retries_per_s=2.0, retry_burst=4)


def test_a_burst_then_a_share_of_the_traffic_then_time() -> None:
    budget = RetryBudget(CONFIG)
    assert [budget.spend(now=0.0) for _ in range(5)] == [True] * 4 + [False]
    for _ in range(8):
        budget.earn()
    assert [budget.spend(now=0.0) for _ in range(2)] == [True, False]
    assert budget.next_at(now=0.0) == 0.5
    assert [budget.spend(now=0.5) for _ in range(2)] == [True, False]


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 3)), max_size=60))
def test_never_more_than_burst_share_and_trickle(events: list[tuple[bool, float]]) -> None:
    budget, now, earned, spent = RetryBudget(CONFIG), 0.0, 0, 0
    budget.next_at(now=now)
    for is_request, pause in events:
        now += pause
        if is_request:
            budget.earn()
            earned += 1
        else:
            spent += budget.spend(now=now)
        assert spent <= CONFIG.retry_burst + CONFIG.retry_share * earned + CONFIG.retries_per_s * now + 1e-6
