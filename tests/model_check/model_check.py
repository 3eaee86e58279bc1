"""`make model-check`: two requests in one system, to the last state.

    2 prefill and 2 decode workers, each with room for the blocks of one request at a time (or of two); two requests
    that are prefilled in two chunks and decoded; any two faults out of: a message twice, a message late, a session that
    ends, a worker that dies, a lease that runs out, a read that fails or is damaged, a verdict that is lost or late, a
    worker that is busy

1. All that one request may do, while others do what they like with the workers and the room there (`model_world.py`).
2. What others cannot tell apart is made one (`model_quotient.py`).
3. All that two of these may do together (`model_product.py`): nobody waits for ever, everything is given back.
4. Every guard of the protocol is taken away, and the search must see it (`model_guards.py`).
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from model_guards import ABSENCES
from model_pair import whole_pair
from model_part import WholePart
from model_product import search_product
from model_quotient import Quotient
from model_search import search
from model_setting import Setting, Violation
from model_world import World

SEARCHES = {
    "2 faults, D reads": Setting(num_faults=2, cancels=False, room=1),
    "1 fault and a client that may go away, D reads": Setting(num_faults=1, room=1),
    "1 fault and a client that may go away, D reads, room for two": Setting(num_faults=1, room=2),
    "2 of: a heartbeat that asks, a message late or twice, a session that ends": Setting(
        num_faults=2, cancels=False, room=1, faults=frozenset({"ask", "delay", "double", "break"})
    ),
    "1 fault and a client that may go away, P serves": Setting(num_faults=1, room=1, one_sided=False),
    "1 fault and a client that may go away, prefixes computed on either side": Setting(
        num_faults=1, room=1, local_prefill=True
    ),
}
WHOLE = {
    "1 fault that one request sees, both with all their states": Setting(
        room=1, cancels=False, faults=frozenset({"double", "delay", "ttl", "read", "validate", "busy"})
    ),
    "1 fault that both see, 1 prefill worker, both with all their states": Setting(
        num_prefill=1, room=1, cancels=False, faults=frozenset({"crash", "break"})
    ),
}
"""As far as two requests can be searched without steps 1 and 2."""


def check(name: str) -> tuple[bool, str]:
    """One search: whether nothing is wrong, and the report."""
    gc.disable()  # millions of states and no rings among them
    if name in WHOLE:
        result = search(whole_pair(WHOLE[name]))
        return not result.violation, f"{name}\n  two requests: {result.report()}"
    setting, began_at = SEARCHES[name], time.monotonic()
    try:
        one = Quotient(WholePart(World(setting)))
    except Violation as violation:
        return False, f"{name}: {violation}\n{_way(setting)}"
    seconds = time.monotonic() - began_at
    both = search_product(setting, one, len(one))
    lines = [
        name,
        f"  one request:  {one.num_states:,} states, {one.num_steps:,} steps, {seconds:.1f} s; "
        f"{len(one):,} that others can tell apart",
        f"  two requests: {both.report()}",
    ]
    if both.violation:
        lines.append(_way(setting))
    return not both.violation, "\n".join(lines)


def _way(setting: Setting) -> str:
    """The shortest way to what is wrong, if it is not too far."""
    return search(whole_pair(setting), max_states=5_000_000).report()


def main() -> int:
    """Run the searches; 1 if one found something, or if the absence of a guard is not seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*SEARCHES, *WHOLE], help="one search")
    parser.add_argument("--guards", action="store_true", help="only take guards away, and show every counterexample")
    parser.add_argument("--jobs", type=int, default=2, help="searches at a time")
    options = parser.parse_args()
    is_good = True
    for absence in ABSENCES:
        result = absence.search()
        is_seen = absence.wrong in result.violation
        is_good = is_good and is_seen
        print(f"without {absence.names}, {absence.num_requests} request(s): ", end="")
        print(result.report() if options.guards or not is_seen else f"{len(result.trace)} steps, {result.violation}")
    if not options.guards:
        names = [name for name in (*SEARCHES, *WHOLE) if options.only in (None, name)]
        with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
            for is_right, report in pool.map(check, names):
                is_good = is_good and is_right
                print(report, flush=True)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
