"""Assembles a prefill worker over a real model, and the source of its blocks."""

from __future__ import annotations

from duopool.core.config import WorkerConfig
from duopool.engine.transfer.source_service import SourceService
from duopool.engine.worker_process import Assembly, WorkerParts, WorkerProcess
from duopool.prefill_worker.worker import PrefillWorker


def prefill_process(config: WorkerConfig) -> WorkerProcess:
    """A prefill worker that is ready to be started in this process."""
    return WorkerProcess(config, assemble)


def assemble(parts: WorkerParts) -> Assembly:
    """The worker and its KV source."""
    worker = PrefillWorker(
        config=parts.config,
        identity=parts.identity,
        model=parts.model,
        manager=parts.manager,
        runner=parts.runner,
        surroundings=parts.surroundings,
    )
    source = SourceService(
        parts.config.handoff.transport,
        parts.runner.store,
        worker,
        worker_id=parts.worker_id,
        incarnation=parts.incarnation,
    )
    return Assembly(worker=worker, add_services=source.add_to, close=source.close)
