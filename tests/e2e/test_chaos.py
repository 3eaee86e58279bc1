"""Processes that die or stop while 16 streams run, each stream compared token for token with its unfaulted run."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from calls import is_at_rest, wait_for
from remains import Remains

from duopool.cluster.chaos.command import chaos_config, run
from duopool.cluster.system import System
from duopool.core.types import Role
from duopool.engine.failpoints import FOLDER_VARIABLE

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

NUM_STREAMS = 16


@pytest.fixture(scope="module")
def failpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("failpoints")
    os.environ[FOLDER_VARIABLE] = str(folder)
    yield folder
    del os.environ[FOLDER_VARIABLE]


@pytest.fixture(scope="module")
def system(failpoints: Path, nothing_remains: Remains) -> Iterator[System]:
    with System.start(chaos_config("smollm2", workers=2)) as running:
        nothing_remains.watch(running.address)
        yield running


def test_no_token_is_lost_doubled_or_changed_when_workers_are_killed(system: System, failpoints: Path) -> None:
    tally, deaths = run(system, failpoints, [Role.PREFILL, Role.DECODE] * 10, streams=NUM_STREAMS, seed=1)
    assert tally.complaints == []
    assert (tally.lost, tally.doubled, tally.changed) == (0, 0, 0)
    assert tally.retried > 0
    assert Counter(kill.role for kill in deaths) == {Role.PREFILL: 10, Role.DECODE: 10}
    wait_for(system.address, is_at_rest)
