"""The simulation itself: the same seed gives the same history, no law is broken, and planted bugs are seen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .planted_bugs import PLANTS
from .runs import first_breach, run

ROOT = Path(__file__).resolve().parents[2]
FOUND_EARLY = ("index_out_of_order", "generation_reused", "cancel_lost", "silence_accepted", "newest_block_shared")


@pytest.mark.parametrize("first", range(0, 40, 10))
def test_no_law_is_broken(first: int) -> None:
    for seed in range(first, first + 10):
        outcome = run(seed)
        assert outcome.is_good, f"{outcome.breaches}; replay: python -m tests.simulation --seed {seed}"


@pytest.mark.parametrize("seed", [1, 7])
def test_one_seed_is_one_history(seed: int) -> None:
    """Also in a process where sets and dicts of strings are laid out differently."""
    outcome = run(seed)
    assert len(outcome.history) > 100
    assert run(seed).digest == outcome.digest
    apart = subprocess.run(
        [sys.executable, "-m", "tests.simulation", "--seed", str(seed)],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": str(seed + 1)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert f"seed {seed}, history {outcome.digest}," in apart.stdout


@pytest.mark.parametrize("bug", FOUND_EARLY)
def test_a_planted_bug_is_found(bug: str) -> None:
    assert first_breach(bug, range(10)) is not None


@pytest.mark.slow
@pytest.mark.parametrize("bug", [bug for bug in PLANTS if bug not in FOUND_EARLY])
@pytest.mark.timeout(900)
def test_every_planted_bug_is_found(bug: str) -> None:
    assert first_breach(bug, range(1000)) is not None
