"""Small systems searched to the last state, over the production transitions; `make model-check` takes larger ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
from model_search import Result, search
from model_setting import Guards, Setting
from model_world import World

TAKEN_AWAY: dict[str, tuple[Setting, str]] = {
    "attempt_fence": (Setting(faults=frozenset({"busy"}), cancels=False), "joins on blocks that hold other"),
    "index_fence": (Setting(faults=frozenset({"double"}), cancels=False), "is shown token 1 as token 2"),
    "end_is_final": (Setting(num_faults=0), "is shown a token after the end"),
    "validate_after_read": (Setting(num_faults=0), "joins on blocks that hold other"),
    "lease_ttl": (Setting(faults=frozenset({"break"})), "never given back at P0"),
    "lease_fence": (Setting(faults=frozenset({"busy", "break"}), cancels=False), "gives attempt 1 the blocks"),
    "tombstones": (Setting(faults=frozenset({"double"})), "holds the blocks of attempt 1 twice"),
    "quarantine": (Setting(num_faults=0), "writes into blocks that D0 has given back"),
    "reader_count": (Setting(faults=frozenset({"ttl"}), one_sided=False), "serves blocks that it has given away"),
    "incarnation_check": (Setting(faults=frozenset({"crash"})), "joins on blocks that hold other"),
    "orphan_ttl": (Setting(faults=frozenset({"break"})), "never given back at P0"),
    "digest": (Setting(faults=frozenset({"read"}), cancels=False), "joins on blocks that hold other"),
    "lease_pins generation_check": (Setting(num_faults=0), "joins on blocks that hold other"),
}
"""Guards, the setting in which their absence shows, and how."""


def without(names: str) -> Guards:
    return Guards(**dict.fromkeys(names.split(), False))


def assert_nothing_is_wrong(result: Result) -> None:
    assert result.is_complete, result.report()
    assert not result.violation, result.report()


@pytest.mark.parametrize("one_sided", [True, False], ids=["read by D", "served by P"])
def test_no_way_is_wrong_when_the_client_goes_away(one_sided: bool) -> None:
    assert_nothing_is_wrong(search(World(Setting(num_faults=0, one_sided=one_sided))))


def test_no_way_is_wrong_when_prefixes_are_computed_on_either_side() -> None:
    faults = frozenset({"crash", "read", "validate"})
    setting = Setting(num_prefill=1, num_decode=2, faults=faults, cancels=False, local_prefill=True)
    assert_nothing_is_wrong(search(World(setting)))


def test_no_single_fault_is_wrong_nor_costs_more_than_two_retries() -> None:
    assert_nothing_is_wrong(search(World(Setting(cancels=False, max_retries=2, may_fail=False))))


@pytest.mark.parametrize("names", TAKEN_AWAY)
def test_every_guard_is_needed(names: str) -> None:
    setting, wrong = TAKEN_AWAY[names]
    result = search(World(replace(setting, guards=without(names))))
    assert wrong in result.violation, result.report()
    assert result.trace[0] == "R routes to P0 and D0"


def test_generations_hold_where_a_lease_does_not() -> None:
    """The second line: a prefill worker that gave leased blocks away still answers no."""
    assert_nothing_is_wrong(search(World(Setting(num_faults=0, guards=without("lease_pins")))))


def test_a_counterexample_reads_step_by_step() -> None:
    lines = search(World(Setting(num_faults=0, guards=without("quarantine")))).report().splitlines()
    assert lines[1:] == [
        "  1  R routes to P0 and D0",
        "  2  P0 hears Prefill(attempt 1)",
        "  3  P0 computes block 0 for attempt 1",
        "  4  R hears BlocksReady(attempt 1, block 0) from P0",
        "  5  D0 hears Reserve(attempt 1)",
        "  6  D0 hears BlocksReady(attempt 1, block 0)",
        "  7  D0 gives blocks to attempt 1",
        "  8  the client goes away",
        "  9  D0 hears Cancel(attempt 1)",
        "  =>  a read writes into blocks that D0 has given back",
    ]


@pytest.mark.parametrize("faults", [frozenset({"busy"}), frozenset({"double"}), frozenset({"ttl", "read"})])
def test_what_is_left_out_by_order_changes_no_verdict(faults: frozenset[str]) -> None:
    """The search that looks at all orders of independent steps finds the same: nothing."""
    setting = Setting(num_prefill=1, num_decode=1, faults=faults)
    reduced, full = search(World(setting)), search(World(setting, reduces=False))
    assert_nothing_is_wrong(reduced)
    assert_nothing_is_wrong(full)
    assert reduced.num_states < full.num_states
