"""A prefill worker on a real port, as production serves it: sessions and block reads behind one credential."""

from __future__ import annotations

import time
from itertools import count
from typing import Any

import transfer_fakes
from worker_fakes import BLOCK_SIZE, EOS, VOCAB_SIZE, FakeRunner, FakeStore, worker_config

from duopool.core.kv_manager import KVCacheManager
from duopool.core.types import Incarnation, LeaseId, Role, WorkerId
from duopool.engine.leases import SourceIdentity
from duopool.engine.served_model import ServedModel
from duopool.engine.step_loop import StepLoop
from duopool.engine.surroundings import Surroundings
from duopool.engine.transfer.grpc_source import add_kv_source
from duopool.prefill_worker.worker import PrefillWorker
from duopool.proto.internal_access import InternalAccess
from duopool.proto.server_thread import ServerThread
from duopool.proto.worker_service import WorkerService

INCARNATION = Incarnation(77)
NUM_BLOCKS = 32


class ServedPrefill:
    """`stop` it in the end."""

    def __init__(self, access: InternalAccess) -> None:
        tokens = FakeStore(NUM_BLOCKS)
        pages = transfer_fakes.FakeStore(num_blocks=NUM_BLOCKS)
        lease_ids = count(1)
        self.server = ServerThread(access)
        self.address = self.server.listen("127.0.0.1")
        self.worker = PrefillWorker(
            config=worker_config(Role.PREFILL),
            identity=SourceIdentity(worker_id=WorkerId("p"), incarnation=INCARNATION, source_address=self.address),
            model=ServedModel(vocab_size=VOCAB_SIZE, max_model_len=1000, eos_token_ids=frozenset({EOS})),
            manager=KVCacheManager(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE),
            runner=FakeRunner(tokens),
            surroundings=Surroundings(
                seal=tokens.seal, new_lease_id=lambda: LeaseId(next(lease_ids)), clock=time.monotonic
            ),
        )
        self.errors: list[Exception] = []
        self.steps = StepLoop(self.worker, flush=lambda: self.service.flush(), on_fatal=self.errors.append)
        self.service = WorkerService(self.worker, incarnation=INCARNATION, heartbeat_s=0.1, on_commands=self.steps.wake)

        def add_services(server: Any) -> None:
            self.service.add_to(server)
            add_kv_source(server, keeper=self.worker, store=pages, incarnation=INCARNATION)

        self.server.serve(add_services, self.service.beat)
        self.steps.start()

    def stop(self) -> None:
        self.steps.stop()
        self.server.stop()
        assert self.errors == []
        self.worker.check()
