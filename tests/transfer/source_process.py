"""A prefill worker's KV source as a process of its own; see `test_source_processes.py`.

usage: source_process.py TRANSPORT INCARNATION; prints its address, serves one lease over all pages, ends with stdin.
"""

from __future__ import annotations

import sys

from transfer_fakes import start_source

from duopool.engine.transfer.in_process import InProcessNetwork

if __name__ == "__main__":
    source = start_source(sys.argv[1], InProcessNetwork(), incarnation=int(sys.argv[2]))
    source.lease(1, list(range(source.store.num_blocks)))
    source.keeper.now -= 1000.0  # the tests are not about time
    print(source.address, flush=True)
    sys.stdin.readline()
    source.stop()
