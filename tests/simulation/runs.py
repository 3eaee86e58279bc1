"""Runs seeds: one, many over several processes, or as many as it takes to find a planted bug."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from multiprocessing import get_context

from .planted_bugs import PLANTS
from .simulation import Outcome, simulate

CHUNK = 10
"""Seeds that a process takes at a time."""


def run(seed: int, bug: str | None = None) -> Outcome:
    """One seed, with a bug planted if one is named."""
    with nullcontext() if bug is None else PLANTS[bug]():
        return simulate(seed)


def run_all(seeds: Sequence[int], num_processes: int = 1) -> Iterator[Outcome]:
    """Outcomes in the order of the seeds, without their histories."""
    with _processes(num_processes) as pool:
        yield from pool.map(_run_apart, seeds, chunksize=CHUNK)


def find_all(bugs: Sequence[str], seeds: Sequence[int], num_processes: int = 1) -> Iterator[Outcome | None]:
    """For every bug the first outcome that gives it away, without its history; None if no seed does."""
    with _processes(num_processes) as pool:
        yield from pool.map(partial(first_breach, seeds=seeds), bugs)


def first_breach(bug: str, seeds: Sequence[int]) -> Outcome | None:
    """The first seed that breaks a law with the bug and none without it."""
    broken = (outcome for seed in seeds if not (outcome := run(seed, bug)).is_good)
    return next((outcome.without_history() for outcome in broken if run(outcome.seed).is_good), None)


def quiet() -> None:
    """What production logs of lost workers is what a simulation is made of."""
    logging.getLogger("duopool").addHandler(logging.NullHandler())
    logging.getLogger("duopool").propagate = False


@contextmanager
def _processes(count: int) -> Iterator[ProcessPoolExecutor]:
    pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=quiet)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _run_apart(seed: int) -> Outcome:
    return run(seed).without_history()
