"""Assembles a prefill worker over a real model: lease ids, sealing and the KV source service."""

from __future__ import annotations

import secrets
from functools import partial
from typing import Any

from duopool.core.config import WorkerConfig
from duopool.core.types import LeaseId
from duopool.engine.transfer.digest import seal
from duopool.engine.transfer.factory import make_nixl_source
from duopool.engine.worker_process import Assembly, WorkerParts, WorkerProcess
from duopool.prefill_worker.leases import SourceIdentity
from duopool.prefill_worker.worker import PrefillWorker, Surroundings


def prefill_process(config: WorkerConfig) -> WorkerProcess:
    """A prefill worker that is ready to be started in this process."""
    return WorkerProcess(config, assemble)


def assemble(parts: WorkerParts) -> Assembly:
    """The worker and its KV source."""
    store = parts.runner.store
    worker = PrefillWorker(
        config=parts.config,
        identity=SourceIdentity(worker_id=parts.worker_id, incarnation=parts.incarnation, source_address=parts.address),
        model=parts.model,
        manager=parts.manager,
        runner=parts.runner,
        surroundings=Surroundings(
            seal=partial(seal, store), new_lease_id=lambda: LeaseId(secrets.randbits(63)), clock=parts.clock
        ),
    )
    nixl = make_nixl_source(
        parts.config.handoff.transport, store, worker_id=parts.worker_id, incarnation=parts.incarnation
    )

    def add_services(server: Any) -> None:
        from duopool.engine.transfer.grpc_source import add_kv_source

        add_kv_source(server, keeper=worker, store=store, incarnation=parts.incarnation, nixl=nixl)

    def close() -> None:
        if nixl is not None:
            nixl.close()

    return Assembly(worker=worker, add_services=add_services, close=close)
