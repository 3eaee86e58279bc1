"""Pools in which few requests fit: nobody waits for ever for blocks that another one holds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from duopool.core.config import HandoffConfig, SchedulerConfig
from duopool.core.sampling_params import SamplingParams

from .scenario import FAST, Ask, Scenario
from .simulation import Simulation


def ask(at: float, num_prompt_tokens: int, max_tokens: int, *, timeout_s: float | None = None) -> Ask:
    return Ask(
        at=at,
        prompt=tuple((num_prompt_tokens + 3 * place) % 20 + 8 for place in range(num_prompt_tokens)),
        params=SamplingParams(max_tokens=max_tokens, seed=num_prompt_tokens, temperature=0.0, ignore_eos=True),
        salt=b"",
        timeout_s=timeout_s,
        cancel_after_s=None,
        cancel_after_tokens=None,
    )


def scenario(asks: tuple[Ask, ...]) -> Scenario:
    return Scenario(
        seed=1,
        timers=HandoffConfig(**FAST, local_prefill_max_tokens=0),
        scheduler=SchedulerConfig(max_num_batched_tokens=64, max_num_seqs=8),
        routers=("router-0",),
        prefill=("prefill-0",),
        decode=("decode-0",),
        num_prefill_blocks=12,
        num_decode_blocks=12,
        step_s=0.03,
        one_sided=True,
        has_digests=True,
        keeps_addresses=False,
        asks=asks,
        plan=(),
    )


def test_room_on_one_worker_is_not_kept_for_who_waits_for_room_on_the_other() -> None:
    """The second holds the prefill pool and waits for the decode pool; the third, more urgent, arrives behind it."""
    first, second = ask(0.3, 8, 12), ask(0.35, 40, 4)
    urgent = ask(0.5, 24, 4, timeout_s=25.0)
    simulation = Simulation(scenario((first, second, urgent)))
    outcome = simulation.run()
    assert outcome.breaches == ()
    assert outcome.endings == ("finished",) * 3
    assert max(simulation.laws.ended_at.values()) < 3.0


def test_a_prefill_worker_without_room_is_not_taken_for_a_stalled_one(caplog: pytest.LogCaptureFixture) -> None:
    """Its blocks are leased to who waits for a long stream to end, so it cannot step for many watchdog times."""
    asks = ask(0.3, 8, 36), ask(0.35, 40, 4), ask(0.5, 24, 4)
    simulation = Simulation(replace(scenario(asks), step_s=0.25))
    outcome = simulation.run()
    assert outcome.breaches == ()
    assert outcome.endings == ("finished",) * 3
    assert max(simulation.laws.ended_at.values()) > 6.0
    assert "is lost" not in caplog.text
