"""Assembles a decode worker over a real model, its reader, and a source for those that take over from it."""

from __future__ import annotations

from duopool.decode_worker.worker import DecodeWorker
from duopool.engine import nursery
from duopool.engine.transfer.factory import make_reader
from duopool.engine.transfer.source_service import SourceService
from duopool.engine.transfer.uploading_reader import UploadingReader
from duopool.engine.worker_process import Assembly, WorkerParts


def assemble(parts: WorkerParts) -> Assembly:
    """The worker, its reader and its KV source."""
    transport, pages = parts.config.handoff.transport, parts.pages
    reader = make_reader(
        transport, pages, worker_id=parts.worker_id, incarnation=parts.incarnation, access=parts.access
    )
    if parts.mirror is not None:
        reader = UploadingReader(reader, parts.mirror.upload)
    worker = DecodeWorker(
        config=parts.config,
        model=parts.model,
        manager=parts.manager,
        runner=parts.runner,
        reader=reader,
        identity=parts.identity,
        surroundings=parts.surroundings,
    )
    source = SourceService(transport, pages, worker, worker_id=parts.worker_id, incarnation=parts.incarnation)
    return Assembly(worker=worker, add_services=source.add_to)


if __name__ == "__main__":
    nursery.main(assemble)
