"""Assembles a decode worker over a real model: its reader is the only thing that it needs besides."""

from __future__ import annotations

from duopool.core.config import WorkerConfig
from duopool.decode_worker.worker import DecodeWorker
from duopool.engine.transfer.factory import make_reader
from duopool.engine.worker_process import Assembly, WorkerParts, WorkerProcess


def decode_process(config: WorkerConfig) -> WorkerProcess:
    """A decode worker that is ready to be started in this process."""
    return WorkerProcess(config, assemble)


def assemble(parts: WorkerParts) -> Assembly:
    """The worker and its reader."""
    reader = make_reader(
        parts.config.handoff.transport,
        parts.runner.store,
        worker_id=parts.worker_id,
        incarnation=parts.incarnation,
        access=parts.access,
    )
    worker = DecodeWorker(
        config=parts.config,
        model=parts.model,
        manager=parts.manager,
        runner=parts.runner,
        reader=reader,
        clock=parts.clock,
    )
    return Assembly(worker=worker, add_services=lambda server: None, close=reader.close)
