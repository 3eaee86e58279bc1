"""`python -m tests.simulation`: many seeds, one seed with its history, or the search for the planted bugs."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence

from . import runs
from .planted_bugs import PLANTS
from .simulation import Outcome

LINES_AT_A_BREACH = 120


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many seeds")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--processes", type=int, default=2, help="processes at once")
    parser.add_argument("--seed", type=int, help="run this seed alone and print its whole history")
    parser.add_argument("--bug", choices=sorted(PLANTS), help="with this bug planted, together with --seed")
    parser.add_argument("--bugs", action="store_true", help="look for every planted bug, within --seeds seeds each")
    given = parser.parse_args()
    runs.quiet()
    if given.seed is not None:
        outcome = runs.run(given.seed, given.bug)
        show(outcome, bug=given.bug)
        return not outcome.is_good
    seeds = range(given.first, given.first + given.seeds)
    return find_bugs(seeds, given.processes) if given.bugs else run_all(seeds, given.processes)


def run_all(seeds: Sequence[int], num_processes: int) -> int:
    """Run seeds until the first breach; tell what they were like."""
    began_at, endings, faults = time.monotonic(), Counter[str](), Counter[str]()
    virtual_s = 0.0
    for outcome in runs.run_all(seeds, num_processes):
        virtual_s += outcome.virtual_s
        endings.update(outcome.endings)
        faults.update(type(planned.fault).__name__ for planned in outcome.plan)
        if not outcome.is_good:
            show(runs.run(outcome.seed), num_lines=LINES_AT_A_BREACH)
            return 1
    wall_s = time.monotonic() - began_at
    print(f"{len(seeds)} seeds, {virtual_s:.0f} virtual seconds in {wall_s:.1f} s: no law was broken")
    print("  endings: " + ", ".join(f"{count} {name}" for name, count in endings.most_common()))
    print("  faults:  " + ", ".join(f"{count} {name}" for name, count in faults.most_common()))
    return 0


def find_bugs(seeds: Sequence[int], num_processes: int) -> int:
    """For every planted bug the first seed that gives it away."""
    began_at, num_found = time.monotonic(), 0
    print(f"{'planted bug':<28} {'found after':>12}  by")
    for bug, outcome in zip(PLANTS, runs.find_all(list(PLANTS), seeds, num_processes), strict=True):
        if outcome is None:
            print(f"{bug:<28} {'NOT FOUND':>12}  in {len(seeds)} seeds", flush=True)
        else:
            num_found += 1
            num_seeds = outcome.seed - seeds[0] + 1
            print(f"{bug:<28} {num_seeds:>6} seeds  seed {outcome.seed}: {outcome.breaches[0]}", flush=True)
    print(f"{num_found} of {len(PLANTS)} planted bugs found in {time.monotonic() - began_at:.0f} s")
    return num_found < len(PLANTS)


def show(outcome: Outcome, *, bug: str | None = None, num_lines: int | None = None) -> None:
    """The history or its last lines, what is wrong with it, and how to see it again."""
    lines = list(outcome.history.lines())
    if num_lines is not None and len(lines) > num_lines:
        print(f"... {len(lines) - num_lines} lines before these ...")
        lines = lines[-num_lines:]
    print("\n".join(lines))
    print(f"seed {outcome.seed}, history {outcome.digest}, {outcome.virtual_s:.2f} virtual seconds")
    for planned in outcome.plan:
        print(f"  planned: {planned.fault}, {planned.when}")
    print("  requests ended: " + "; ".join(outcome.endings))
    for breach in outcome.breaches:
        print(f"  BROKEN {breach}")
    with_bug = "" if bug is None else f" --bug {bug}"
    print(f"replay: python -m tests.simulation --seed {outcome.seed}{with_bug}")


if __name__ == "__main__":
    sys.exit(main())
