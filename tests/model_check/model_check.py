"""`make model-check`: the whole system around a request, to the last state.

    2 prefill and 2 decode workers, one request that is prefilled in two chunks and decoded, any two faults
    out of: a message twice, a message late, a session that ends, a worker that dies, a lease that runs out,
    a read that fails or is damaged, a verdict that is lost or late, a worker that is busy

Why one request stands for all: requests meet only in blocks, in crashes and in the number of faults. Tombstones,
leases, slots and the router's state are kept per request. Blocks of another request are, to this one, blocks that
somebody may take and overwrite as soon as they are not held: the search takes them as overwritten at once, and a read
that writes into one as a violation. A crash is a step of this search. What another request uses up of the faults leaves
fewer here. That no request waits for ever for blocks that another holds is not said by this; see docs/reliability.md.
"""

from __future__ import annotations

import argparse
import sys

from model_search import search
from model_setting import Setting
from model_world import World

SEARCHES = {
    "1 fault, D reads": Setting(num_faults=1),
    "1 fault, P serves": Setting(num_faults=1, one_sided=False),
    "1 fault, prefixes computed on either side": Setting(num_faults=1, local_prefill=True, cancels=False),
    "2 faults, D reads": Setting(num_faults=2, cancels=False),
}


def main() -> int:
    """Run the searches; 1 if one found something or came to no end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most-states", type=int, default=20_000_000, help="give a search up after so many states")
    parser.add_argument("--only", choices=SEARCHES, help="one search")
    options = parser.parse_args()
    is_good = True
    for name, setting in SEARCHES.items():
        if options.only not in (None, name):
            continue
        print(f"{name}: ", end="", flush=True)
        result = search(World(setting), max_states=options.most_states)
        print(result.report(), flush=True)
        is_good = is_good and result.is_complete and not result.violation
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
