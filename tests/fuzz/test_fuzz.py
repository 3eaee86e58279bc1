"""A few of the cases of `make fuzz`, every day: real processes, a real engine over a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from .__main__ import fuzz
from .tiny import make_tiny_model

NUM_CASES = 300
HANG_S = 15.0
"""Time proves nothing on a busy machine; `make fuzz` has the limit of one second."""


@pytest.mark.timeout(240)
def test_wrong_input_ends_nothing_and_changes_nothing(tmp_path: Path) -> None:
    report = fuzz(NUM_CASES, seed=3, hang_s=HANG_S, model=make_tiny_model(tmp_path / "tiny"))
    assert report.is_good, str(report)
    assert sum(report.codes.values()) == NUM_CASES
    assert report.num_streams > 0
