"""The common shell of both workers: store, server, step loop and their start in one process, which ends with its host.

Owns no decisions and no request state: a role's `assemble` builds its worker, everything else is the same. gRPC is
imported when the process starts, not with this module.
"""

from __future__ import annotations

import gc
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from duopool.core.config import ModelConfig, WorkerConfig
from duopool.core.kv_manager import KVCacheManager
from duopool.core.messages import WorkerInfo
from duopool.core.types import Incarnation, LeaseId, Role, WorkerId
from duopool.core.worker import Worker
from duopool.engine import failpoints
from duopool.engine.checked_model import CheckedModel
from duopool.engine.kv_store import KVStore
from duopool.engine.leases import SourceIdentity
from duopool.engine.model_digest import model_digest, tokenizer_digest
from duopool.engine.model_source import resolve_model
from duopool.engine.page_mirror import PageMirror, mirror_of
from duopool.engine.runner import ModelRunner
from duopool.engine.served_model import ServedModel
from duopool.engine.step_loop import StepLoop
from duopool.engine.surroundings import Surroundings
from duopool.engine.transfer.digest import seal

if TYPE_CHECKING:
    from duopool.engine.smg.service import EngineServer
    from duopool.proto.internal_access import InternalAccess
    from duopool.proto.server_thread import ServerThread

log = logging.getLogger(__name__)

PREFILL_NICENESS = 4
"""Where pools share cores, a prefill step gets about 30 % of one that a decode step wants too, and all of it otherwise:
a token that is late is noticed more than a prompt that is. A weight of Linux' scheduler, 1.25 to this power."""
FATAL_FLUSH_S = 0.3
"""A dying process waits this long for its last words to reach the routers."""


class ManagedWorker(Worker, Protocol):
    """A worker that the shell can wire up and drain."""

    on_change: Callable[[], None]

    def drain(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerParts:
    """What a role's worker is assembled from."""

    config: WorkerConfig
    incarnation: Incarnation
    address: str
    """host:port that the process listens on."""
    runner: ModelRunner
    mirror: PageMirror | None
    """Of a store on a device."""
    manager: KVCacheManager
    model: ServedModel
    access: InternalAccess
    """What calls to other workers show."""
    clock: Callable[[], float]

    @property
    def worker_id(self) -> WorkerId:
        return WorkerId(self.config.worker_id)

    @property
    def identity(self) -> SourceIdentity:
        return SourceIdentity(worker_id=self.worker_id, incarnation=self.incarnation, source_address=self.address)

    @property
    def pages(self) -> KVStore:
        """The pages in host memory, as transports take them."""
        return self.runner.store if self.mirror is None else self.mirror.host

    @property
    def surroundings(self) -> Surroundings:
        return Surroundings(
            seal=partial(seal, self.pages) if self.mirror is None else self.mirror.seal,
            new_lease_id=lambda: LeaseId(secrets.randbits(63)),
            clock=self.clock,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembly:
    """A role's worker and what belongs to it."""

    worker: ManagedWorker
    add_services: Callable[[Any], None]
    """Registers the role's own services on the gRPC server, on its event loop."""


class WorkerProcess:
    """`start`, and serve until the process ends. A fatal engine error ends the whole operating-system process."""

    def __init__(self, config: WorkerConfig, assemble: Callable[[WorkerParts], Assembly], model: CheckedModel) -> None:
        self._config = config
        self._model = model
        self._assemble = assemble
        self._incarnation = Incarnation(secrets.randbits(63))
        self._clock = time.monotonic
        self._server: ServerThread | None = None
        self._assembly: Assembly | None = None
        self._steps: StepLoop | None = None
        self._info: WorkerInfo | None = None

    def start(self) -> WorkerInfo:
        """Make the KV store, listen, and begin to step; returns the registration."""
        from duopool.proto.internal_access import InternalAccess
        from duopool.proto.server_thread import ServerThread
        from duopool.proto.worker_service import WorkerService

        config = self._config
        failpoints.enable(config.worker_id)
        access = InternalAccess.load(config.internal)
        source = resolve_model(config.model.model)
        runner = ModelRunner.over(self._model, config.cache)
        runner.warm_up()
        digest = model_digest(source.folder, dtype=str(runner.store.layout.dtype))
        self._server = ServerThread(access)
        address = self._server.listen(config.host)
        manager = KVCacheManager(
            num_blocks=runner.num_blocks, block_size=config.cache.block_size, namespace=digest.encode()
        )
        model = ServedModel(
            vocab_size=runner.vocab_size, max_model_len=runner.max_model_len, eos_token_ids=runner.eos_token_ids
        )
        parts = WorkerParts(
            config=config,
            incarnation=self._incarnation,
            address=address,
            runner=runner,
            mirror=mirror_of(runner.store),
            manager=manager,
            model=model,
            access=access,
            clock=self._clock,
        )
        assembly = self._assembly = self._assemble(parts)
        steps = self._steps = StepLoop(
            assembly.worker,
            flush=lambda: service.flush(),
            on_fatal=_die,
            clock=self._clock,
            niceness=PREFILL_NICENESS if config.role is Role.PREFILL and config.shares_cores else 0,
        )
        service = WorkerService(
            assembly.worker,
            incarnation=self._incarnation,
            heartbeat_s=config.handoff.heartbeat_s,
            on_commands=steps.wake,
            clock=self._clock,
        )

        def on_change() -> None:
            service.flush()
            steps.wake()

        def add_services(server: Any) -> None:
            service.add_to(server)
            assembly.add_services(server)

        engine = self._listen_for_gateway(self._server)
        info = self._info = WorkerInfo(
            worker_id=parts.worker_id,
            role=config.role.value,
            incarnation=self._incarnation,
            address=address,
            model=config.model.served_model_name or config.model.model,
            model_digest=digest,
            layout_digest=runner.store.digest,
            block_size=config.cache.block_size,
            num_blocks=runner.num_blocks,
            max_model_len=runner.max_model_len,
            vocab_size=runner.vocab_size,
            dtype=runner.dtype,
            tokenizer_digest=tokenizer_digest(source.folder),
            notes=(
                *_weights(config.model),
                *_fallback(config, self._model),
                *runner.notes,
                *(() if engine is None else (engine.note,)),
            ),
            pid=os.getpid(),
        )

        assembly.worker.on_change = on_change
        self._server.serve(add_services, service.beat)
        if engine is not None:
            from duopool.engine.smg.service import Served

            load = assembly.worker.load
            served = Served(info=info, model=model, folder=source.folder, config=config, access=access, load=load)
            self._server.run_beside(engine.run(service, served))
        # What is here lives as long as the process: full collections need not look at it while streams wait.
        gc.collect()
        gc.freeze()
        steps.start()
        return info

    def _listen_for_gateway(self, server: ServerThread) -> EngineServer | None:
        """The port of the smg gateway's protocol, where it is wanted."""
        if self._config.smg_port is None:
            return None
        from duopool.engine.smg.service import EngineServer

        return server.call(EngineServer.listen(self._config.host, self._config.smg_port))

    def info(self) -> WorkerInfo | None:
        """The registration; None before `start` has ended."""
        return self._info

    def drain(self) -> None:
        """Take nothing new; what is here is finished."""
        if self._assembly is not None:
            self._assembly.worker.drain()

    def is_idle(self) -> bool:
        """True if the worker may end without anyone noticing."""
        return self._assembly is None or self._assembly.worker.is_idle

    def check(self) -> None:
        """Prove the worker's invariants; raise AssertionError naming what is wrong."""
        if self._assembly is not None:
            self._assembly.worker.check()


def _weights(model: ModelConfig) -> Iterator[str]:
    """What an operator is told of weights that are not the model's own."""
    if model.weights is not None:
        yield f"weights of {model.weights}"
    if model.quantization is not None:
        yield f"weights rounded to {model.quantization}"


def _fallback(config: WorkerConfig, model: CheckedModel) -> tuple[str, ...]:
    """`auto` is asked for only where Ray has a GPU for the worker."""
    is_without = config.device == "auto" and model.model.device.type == "cpu"
    return ("torch finds no CUDA device, so this worker computes on the CPU",) if is_without else ()


def _die(error: Exception) -> None:
    """Fail-stop: after a failed step nothing about the pages is certain any more."""
    time.sleep(FATAL_FLUSH_S)
    log.critical("the engine failed, the process ends: %s", error)
    logging.shutdown()
    os._exit(1)
