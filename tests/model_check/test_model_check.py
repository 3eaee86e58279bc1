"""Small systems searched to the last state, over the production transitions; `make model-check` takes larger ones."""

from __future__ import annotations

import pytest
from model_guards import ABSENCES, Absence, without
from model_pair import Pair, Turned, turns, whole_pair
from model_part import WholePart
from model_product import Product, search_product
from model_quotient import Quotient
from model_search import Result, search
from model_setting import Setting
from model_state import State
from model_world import World


def assert_nothing_is_wrong(result: Result) -> None:
    assert result.is_complete, result.report()
    assert not result.violation, result.report()


def classes_of(setting: Setting) -> Quotient:
    return Quotient(WholePart(World(setting)))


# ---- one request beside others that may do anything ------------------------------------------------------------------


@pytest.mark.parametrize("one_sided", [True, False], ids=["read by D", "served by P"])
def test_no_way_is_wrong_when_the_client_goes_away(one_sided: bool) -> None:
    assert_nothing_is_wrong(search(World(Setting(num_faults=0, one_sided=one_sided))))


def test_no_way_is_wrong_when_prefixes_are_computed_on_either_side() -> None:
    faults = frozenset({"crash", "read", "validate"})
    setting = Setting(num_prefill=1, num_decode=2, faults=faults, cancels=False, local_prefill=True)
    assert_nothing_is_wrong(search(World(setting)))


def test_no_single_fault_is_wrong_nor_costs_more_than_two_retries() -> None:
    assert_nothing_is_wrong(search(World(Setting(cancels=False, max_retries=2, may_fail=False))))


def test_a_heartbeat_that_asks_costs_nothing_where_nothing_is_wrong() -> None:
    setting = Setting(num_faults=2, faults=frozenset({"ask"}), max_retries=0, may_fail=False)
    assert_nothing_is_wrong(search(World(setting)))


@pytest.mark.parametrize("fault", ["delay", "double", pytest.param("break", marks=pytest.mark.slow)])
def test_a_heartbeat_that_asks_does_no_harm_beside_a_fault(fault: str) -> None:
    setting = Setting(num_prefill=1, num_decode=1, num_faults=2, cancels=False, faults=frozenset({"ask", fault}))
    assert_nothing_is_wrong(search(World(setting)))


# ---- two requests ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [1, 2])
def test_two_requests_never_wait_for_each_other_for_ever(room: int) -> None:
    assert_nothing_is_wrong(search(whole_pair(Setting(num_faults=0, cancels=False, room=room))))


@pytest.mark.parametrize("faults", [{"busy"}, {"double"}, {"ttl", "read"}])
def test_a_fault_hurts_neither_of_two(faults: set[str]) -> None:
    setting = Setting(num_prefill=1, num_decode=1, room=1, cancels=False, faults=frozenset(faults))
    assert_nothing_is_wrong(search(whole_pair(setting)))


def test_all_that_two_may_do_with_any_one_fault() -> None:
    setting = Setting(cancels=False, room=1)
    classes = classes_of(setting)
    assert_nothing_is_wrong(search_product(setting, classes, len(classes)))


@pytest.mark.parametrize("faults", [{"busy"}, {"crash"}, {"ttl", "read"}])
def test_classes_do_together_what_their_states_do(faults: set[str]) -> None:
    """Every pair of states lies in a pair of classes that is reached, and every such pair of classes has some."""
    setting = Setting(num_prefill=1, num_decode=1, room=1, cancels=False, faults=frozenset(faults))
    part = WholePart(World(setting))
    classes = Quotient(part)
    whole = {(classes.class_of(a), classes.class_of(b), left) for a, b, left in reached(Pair(setting, (part, part)))}
    assert reached(Pair(setting, (classes, classes))) == whole


@pytest.mark.parametrize("room", [1, 2])
def test_the_product_on_arrays_finds_as_many_pairs(room: int) -> None:
    setting = Setting(room=room, cancels=False, faults=frozenset({"crash", "ttl"}))
    classes = classes_of(setting)
    for order in turns(setting):
        product = Product(setting, classes, len(classes), order)
        assert not product.search()
        pairs = reached(Pair(setting, (classes, Turned(classes, order))))
        assert product.num_states == len({(max(a, b), min(a, b), left) for a, b, left in pairs})


@pytest.mark.parametrize(("num_prefill", "faults"), [(2, {"nothing"}), (1, {"busy"})])
def test_turns_leave_no_route_out(num_prefill: int, faults: set[str]) -> None:
    """What others see of two requests is the same when B takes every route, and when B's workers change places."""
    setting = Setting(num_prefill=num_prefill, room=1, cancels=False, faults=frozenset(faults))
    first, second = WholePart(World(setting)), WholePart(World(setting, all_routes=True))
    routed = {(first.held(a), second.held(b), left) for a, b, left in reached(Pair(setting, (first, second)))}
    classes, turned = classes_of(setting), set()
    for order in turns(setting):
        other = Turned(classes, order)
        pairs = reached(Pair(setting, (classes, other)))
        turned |= {(classes.held(a), other.held(b), left) for a, b, left in pairs}
    assert turned == routed


def reached(pair: Pair) -> set[State]:
    """All states of two requests."""
    found, layer = {pair.first}, [pair.first]
    while layer:
        layer = [after for state in layer for _, _, after in pair.next_states(state)]
        layer = list(set(layer) - found)
        found.update(layer)
    return found


# ---- guards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("absence", ABSENCES, ids=lambda one: f"{one.names} of {one.num_requests}")
def test_every_guard_is_needed(absence: Absence) -> None:
    result = absence.search()
    assert absence.wrong in result.violation, result.report()
    assert result.trace[0].endswith("R routes to P0 and D0")


@pytest.mark.parametrize("absence", [one for one in ABSENCES if one.num_requests == 2], ids=lambda one: one.names)
def test_some_absences_do_not_show_with_one_request(absence: Absence) -> None:
    assert_nothing_is_wrong(search(World(absence.setting_without)))
    assert_nothing_is_wrong(search(whole_pair(absence.setting)))


def test_generations_hold_where_a_lease_does_not() -> None:
    """The second line: a prefill worker that gave leased blocks away still answers no."""
    assert_nothing_is_wrong(search(World(Setting(num_faults=0, guards=without("lease_pins")))))
    two = Setting(
        num_prefill=1, num_decode=1, num_faults=0, room=1, pages_stay=True, cancels=False, guards=without("lease_pins")
    )
    assert_nothing_is_wrong(search(whole_pair(two)))


def test_the_product_sees_two_that_wait_for_each_other() -> None:
    setting = Setting(num_faults=0, cancels=False, room=1, guards=without("listed_first"))
    classes = classes_of(setting)
    assert "hangs" in search_product(setting, classes, len(classes)).violation


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


def test_a_counterexample_of_two_names_them() -> None:
    """Without the rule that D gives blocks last: B has those of D that A needs, and A those of P that B needs."""
    setting = Setting(num_prefill=1, num_decode=1, num_faults=0, room=1, cancels=False)
    lines = search(whole_pair(Absence("listed_first", setting, "").setting_without)).report().splitlines()
    assert "  A: P0 gives blocks to attempt 1" in [line[4:] for line in lines]
    assert "  B: D0 gives blocks to attempt 1" in [line[4:] for line in lines]
    assert lines[-1] == (
        "  =>  A: the request hangs: it is leased and nothing more happens; "
        "B: the request hangs: it is prefilling and nothing more happens"
    )
