"""A decode worker whose `check` counts what a full collection looks at: `python -m collecting_worker SOCKET`."""

from __future__ import annotations

import gc

from duopool.decode_worker.process import assemble
from duopool.engine import nursery
from duopool.engine.worker_process import WorkerProcess

MOST_OBJECTS = 20_000
"""Torch, transformers and the model are hundreds of thousands."""


def check(_: WorkerProcess) -> None:
    num_objects = len(gc.get_objects())
    assert num_objects < MOST_OBJECTS, f"a collection looks at {num_objects} objects"


if __name__ == "__main__":
    WorkerProcess.check = check  # type: ignore[method-assign]
    nursery.main(assemble)
