"""A worker of either role whose store has a mirror wherever it lies: `python -m mirrored_worker SOCKET`, a nursery."""

from __future__ import annotations

from duopool.core.types import Role
from duopool.decode_worker.process import assemble as assemble_decode
from duopool.engine import nursery, worker_process
from duopool.engine.page_mirror import PageMirror
from duopool.engine.worker_process import Assembly, WorkerParts
from duopool.prefill_worker.process import assemble as assemble_prefill


def assemble(parts: WorkerParts) -> Assembly:
    return (assemble_prefill if parts.config.role is Role.PREFILL else assemble_decode)(parts)


if __name__ == "__main__":
    worker_process.mirror_of = PageMirror
    nursery.main(assemble)
