"""Damaged pages never show; `make corrupt` puts in 10,000 faults."""

from __future__ import annotations

import pytest
from corruption import corrupt
from damage import Damage

from duopool.engine.transfer import grpc_reader
from duopool.engine.transfer.factory import available_transports


def skip_without(transport: str) -> None:
    if transport not in available_transports():
        pytest.skip(f"{transport} is not installed")


@pytest.mark.parametrize("transport", ["grpc", "nixl", "shared_memory"])
def test_no_damage_goes_unseen_or_unmended(transport: str) -> None:
    skip_without(transport)
    result = corrupt(transport, num_faults=150)
    assert result.is_good, result.report()
    assert set(result.saboteur.num_done) == set(Damage), result.report()


def test_without_digests_damage_is_seen_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bed can tell: with the check taken away, damage reaches a decode worker's batch."""
    monkeypatch.setattr(grpc_reader.ops, "crc32", lambda page: 0)
    with pytest.raises(AssertionError, match="KV of another prefix"):
        corrupt("grpc", num_faults=150)
