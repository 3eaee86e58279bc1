"""A few of the cases of `make fuzz`, every day: real processes, a real engine over a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from duopool.engine.transfer.factory import available_transports

from .__main__ import fuzz
from .liars import lie_to_router
from .lying_source import lie_to_reader
from .tiny import make_tiny_model

NUM_CASES = 150
HANG_S = 15.0
"""Time proves nothing on a busy machine; `make fuzz` has the limit of one second."""


@pytest.mark.timeout(240)
def test_wrong_input_ends_nothing_and_changes_nothing(tmp_path: Path) -> None:
    report = fuzz(NUM_CASES, seed=3, hang_s=HANG_S, model=make_tiny_model(tmp_path / "tiny"))
    assert report.is_good, str(report)
    assert sum(report.codes.values()) == NUM_CASES
    assert report.num_streams > 0


@pytest.mark.parametrize("serves", [False, True])
def test_a_worker_that_lies_costs_its_own_requests_at_most(serves: bool) -> None:
    told = lie_to_router(32, seed=2, serves=serves)
    assert told.is_good, str(told)
    assert told.num_lies > 10


@pytest.mark.parametrize("transport", ["grpc", "nixl", "shared_memory"])
def test_a_source_that_lies_costs_its_own_reads_at_most(transport: str) -> None:
    if transport not in available_transports():
        pytest.skip(f"{transport} is not installed")
    told = lie_to_reader(12, seed=3, transport=transport)
    assert told.is_good, str(told)
