"""Logits that are no numbers end their request with a typed error, on either worker, and nobody else's."""

from __future__ import annotations

import pytest
from worker_fakes import expected_stream, make_pair

from duopool.core.messages import NackReason
from duopool.core.step import NOT_NUMBERS


@pytest.mark.parametrize("bad_length", [6, 9], ids=["in prefill", "in decode"])
def test_a_request_without_numbers_ends_and_its_neighbour_goes_on(bad_length: int) -> None:
    pair = make_pair()
    poisoned = pair.request("poisoned", range(6), max_tokens=8, ignore_eos=True)
    healthy = pair.request("healthy", range(20, 35), max_tokens=8, ignore_eos=True)
    pair.prefill_runner.bad_length = pair.decode_runner.bad_length = bad_length
    pair.send(poisoned)
    pair.send(healthy)
    pair.run()
    (nack,) = [nack for nack in pair.nacks() if nack.reason is NackReason.INTERNAL]
    assert (nack.request_id, nack.detail) == ("poisoned", NOT_NUMBERS)
    assert pair.streams.get("poisoned", []) == expected_stream(range(6), poisoned.params)[: bad_length - 6]
    assert pair.streams["healthy"] == expected_stream(range(20, 35), healthy.params)
    pair.cancel("poisoned")
    pair.run()
    pair.assert_nothing_is_held()
