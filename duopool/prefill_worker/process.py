"""Assembles a prefill worker over a real model, and the source of its blocks."""

from __future__ import annotations

from duopool.engine import nursery
from duopool.engine.transfer.source_service import SourceService
from duopool.engine.worker_process import Assembly, WorkerParts
from duopool.prefill_worker.worker import PrefillWorker


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
        parts.pages,
        worker,
        worker_id=parts.worker_id,
        incarnation=parts.incarnation,
    )
    return Assembly(worker=worker, add_services=source.add_to)


if __name__ == "__main__":
    nursery.main(assemble)
