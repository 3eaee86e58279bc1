"""A prefill and a decode worker in one process, with a real engine over a tiny model; ends when its stdin does.

`python -m tests.fuzz.workers MODEL_FOLDER` prints their registrations as one line of JSON. A fatal engine error ends
the process as in production; at the end both prove their invariants, and the exit status says so.
"""

from __future__ import annotations

import os
import sys

import msgspec

from duopool.core.config import CacheConfig, HandoffConfig, ModelConfig, SchedulerConfig, WorkerConfig
from duopool.core.types import Role
from duopool.decode_worker.process import assemble as assemble_decode
from duopool.engine.checked_model import CheckedModel
from duopool.engine.worker_process import WorkerProcess
from duopool.prefill_worker.process import assemble as assemble_prefill


def main(folder: str) -> None:
    processes = []
    for role, assemble in ((Role.PREFILL, assemble_prefill), (Role.DECODE, assemble_decode)):
        config = WorkerConfig(
            role=role,
            worker_id=f"{role}-0",
            model=ModelConfig(model=folder, served_model_name="tiny", dtype="float32"),
            cache=CacheConfig(num_blocks=256, block_size=16),
            scheduler=SchedulerConfig(max_num_seqs=32),
            handoff=HandoffConfig(transport="grpc"),
            num_threads=1,
        )
        processes.append(WorkerProcess(config, assemble, CheckedModel.load(config.model, config.cache)))
    infos = [process.start() for process in processes]
    print(msgspec.json.encode(infos).decode(), flush=True)
    sys.stdin.read()
    for process in processes:
        process.check()


if __name__ == "__main__":
    main(sys.argv[1])
    # Workers end with their process, whatever their threads are doing.
    os._exit(0)
