"""A router's place: the process in it may die, its address stays."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from duopool.cluster.admin_access import find
from duopool.cluster.membership import ClusterView
from duopool.cluster.router_place import RouterPlace
from duopool.cluster.router_process import RouterFailed
from duopool.core.config import InternalConfig, ModelConfig, RouterConfig
from duopool.core.types import Role
from duopool.engine.model_source import resolve_model
from duopool.proto.internal_access import InternalAccess

VIEW = ClusterView(members=(), wanted=dict.fromkeys(Role, 1))


def place_of(tmp_path: Path, *, folder: str) -> RouterPlace:
    credential = tmp_path / "credential"
    credential.write_text("a credential of a test, long enough to pass\n")
    credential.chmod(0o600)
    internal = InternalConfig(credential_file=str(credential))
    config = RouterConfig(model=ModelConfig(model=folder), internal=internal, port=0)
    return RouterPlace(config, InternalAccess.load(internal), on_command=lambda place, command: None)


def tick_until(place: RouterPlace, is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < deadline
        place.tick(VIEW, time.monotonic())
        time.sleep(0.05)


def test_a_killed_router_comes_back_at_its_address(tmp_path: Path) -> None:
    place = place_of(tmp_path, folder=str(resolve_model("smollm2").folder))
    try:
        place.launch(time.monotonic())
        tick_until(place, lambda: place.is_listening)
        address, victim = place.address, place.pid
        record = find(address)
        os.kill(victim, signal.SIGKILL)
        tick_until(place, lambda: place.pid not in (0, victim))
        tick_until(place, lambda: find(address) != record)
        assert place.address == address
    finally:
        place.stop()
    assert find(address) is None


def test_a_router_that_never_listens_ends_the_start(tmp_path: Path) -> None:
    place = place_of(tmp_path, folder=str(tmp_path))
    try:
        place.launch(time.monotonic())
        with pytest.raises(RouterFailed, match="tokenizer"):
            tick_until(place, lambda: place.is_listening)
    finally:
        place.stop()
