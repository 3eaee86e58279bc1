"""Failpoints: off unless the environment says so; an armed one ends the process once, after the passes it was given."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from duopool.core.types import Role
from duopool.engine import failpoints
from duopool.engine.failpoints import FAILPOINTS, FOLDER_VARIABLE, Failpoint, arm, reach


@pytest.fixture(autouse=True)
def kills(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Signals that would have been sent; the process's own name is forgotten in the end."""
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    yield sent
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    failpoints.enable("nobody")


def test_an_armed_failpoint_kills_once_after_its_passes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kills: list[tuple[int, int]]
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    failpoints.enable("decode-1")
    arm(tmp_path, "decode-1", Failpoint.DECODING, passes=2)
    arm(tmp_path, "decode-0", Failpoint.READING)
    for _ in range(2):
        reach(Failpoint.DECODING)
        reach(Failpoint.READING)
    assert kills == []
    reach(Failpoint.DECODING)
    assert kills == [(os.getpid(), signal.SIGKILL)]
    reach(Failpoint.DECODING)
    assert len(kills) == 1


def test_without_the_variable_nothing_is_looked_for(tmp_path: Path, kills: list[tuple[int, int]]) -> None:
    failpoints.enable("decode-1")
    arm(tmp_path, "decode-1", Failpoint.DECODING)
    reach(Failpoint.DECODING)
    assert kills == []


def test_every_failpoint_belongs_to_one_role() -> None:
    listed = [point for role in Role for point in FAILPOINTS[role]]
    assert sorted(listed) == sorted(Failpoint)
