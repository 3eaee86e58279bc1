"""Every state of a small system, searched over the production transitions; `make model-check` searches more of them."""

from __future__ import annotations

from model_search import search
from model_setting import Setting
from model_world import World


def test_no_way_is_wrong_when_the_client_goes_away() -> None:
    result = search(World(Setting(num_faults=0)))
    assert result.is_complete, result.report()
    assert not result.violation, result.report()


def test_no_way_with_one_fault_is_wrong() -> None:
    result = search(World(Setting(num_faults=1, cancels=False)))
    assert result.is_complete, result.report()
    assert not result.violation, result.report()
