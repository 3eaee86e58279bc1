"""One life of a worker or a router: the production parts, put together in a simulated process as their mains do it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

from duopool.core.config import ModelConfig, RouterConfig, WorkerConfig
from duopool.core.kv_manager import KVCacheManager
from duopool.core.messages import WorkerInfo
from duopool.core.step import StepPlan
from duopool.core.types import Incarnation, LeaseId, Role, WorkerId
from duopool.decode_worker.worker import DecodeWorker
from duopool.engine.leases import SourceIdentity
from duopool.engine.served_model import ServedModel
from duopool.engine.step_loop import StepLoop
from duopool.engine.surroundings import Surroundings
from duopool.engine.transfer.digest import seal
from duopool.engine.transfer.source import KvSource
from duopool.prefill_worker.worker import PrefillWorker
from duopool.proto import inference_pb2
from duopool.proto.rpc import service_handler
from duopool.proto.worker_service import WorkerService
from duopool.router.evacuation import Evacuation
from duopool.router.generation import Generation
from duopool.router.inference_service import InferenceService
from duopool.router.pools import Pools
from duopool.router.public_access import PublicAccess

from .client import character_tokenizer
from .laws import Laws, WatchedWorker
from .model import BLOCK_SIZE, EOS, PAGE_BYTES, VOCAB_SIZE, Pages, SimulatedRunner
from .network import Network
from .scenario import Scenario
from .sessions import connector
from .threads import StepThread
from .transport import Exchange, SimulatedReader, Source
from .virtual_time import Process

MAX_MODEL_LEN = 4096
ROUTE_WAIT_S = 8.0
FATAL_FLUSH_S = 0.3
MODEL = "simulated"


@dataclass(slots=True, kw_only=True)
class WorkerLife:
    process: Process
    info: WorkerInfo
    worker: PrefillWorker | DecodeWorker
    watched: WatchedWorker
    manager: KVCacheManager


@dataclass(slots=True, kw_only=True)
class RouterLife:
    process: Process
    pools: Pools


def start_worker(
    scenario: Scenario,
    process: Process,
    address: str,
    *,
    network: Network,
    exchange: Exchange,
    laws: Laws,
    random: Random,
) -> WorkerLife:
    """A worker that listens at `address`; the process's place is its name."""
    place = process.place
    role = Role.PREFILL if place in scenario.prefill else Role.DECODE
    num_blocks = scenario.num_prefill_blocks if role is Role.PREFILL else scenario.num_decode_blocks
    config = WorkerConfig(role=role, worker_id=place, scheduler=scenario.scheduler, handoff=scenario.timers)
    incarnation = Incarnation(random.getrandbits(63))
    pages = Pages(num_blocks)
    manager = KVCacheManager(num_blocks=num_blocks, block_size=BLOCK_SIZE, namespace=MODEL.encode())
    model = ServedModel(vocab_size=VOCAB_SIZE, max_model_len=MAX_MODEL_LEN, eos_token_ids=frozenset({EOS}))

    def step_s(plan: StepPlan) -> float:
        return scenario.step_s * (1 + plan.num_tokens // 16) * (0.5 + random.random())

    runner = SimulatedRunner(
        pages,
        step_s=step_s,
        pause=lambda for_s: thread.pause(for_s),
        watch=lambda chunk: watched.computes(chunk),
    )
    identity = SourceIdentity(worker_id=WorkerId(place), incarnation=incarnation, source_address=address)
    surroundings = Surroundings(
        seal=partial(seal, pages), new_lease_id=lambda: LeaseId(random.getrandbits(63)), clock=process.clock
    )
    worker: PrefillWorker | DecodeWorker
    if role is Role.PREFILL:
        worker = PrefillWorker(
            config=config, identity=identity, model=model, manager=manager, runner=runner, surroundings=surroundings
        )
    else:
        worker = DecodeWorker(
            config=config,
            model=model,
            manager=manager,
            runner=runner,
            reader=SimulatedReader(process, pages, exchange),
            identity=identity,
            surroundings=surroundings,
        )
    exchange.listen(address, Source(process, KvSource(keeper=worker, store=pages, incarnation=incarnation), pages))
    watched = WatchedWorker(worker, place, laws)

    def on_fatal(error: Exception) -> None:
        laws.breach(f"{place} a step failed: {error!r}")
        process.time.at(process.time.now + FATAL_FLUSH_S, lambda: process.die(says_goodbye=True))

    steps = StepLoop(watched, flush=lambda: service.flush(), on_fatal=on_fatal, clock=process.clock)
    thread = StepThread(process, steps.turn, on_fatal=on_fatal)
    service = WorkerService(
        watched,
        incarnation=incarnation,
        heartbeat_s=scenario.timers.heartbeat_s,
        on_commands=thread.wake,
        clock=process.clock,
    )

    def on_change() -> None:
        service.flush()
        thread.wake()

    worker.on_change = on_change
    server = network.listen(address, process)

    def start() -> None:
        service.add_to(server)  # type: ignore[arg-type]
        process.loop.create_task(service.beat())
        thread.start()

    process.start(start)
    info = WorkerInfo(
        worker_id=WorkerId(place),
        role=role.value,
        incarnation=incarnation,
        address=address,
        model=MODEL,
        model_digest=MODEL,
        layout_digest=f"{PAGE_BYTES}",
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        max_model_len=MAX_MODEL_LEN,
        vocab_size=VOCAB_SIZE,
    )
    return WorkerLife(process=process, info=info, worker=worker, watched=watched, manager=manager)


def start_router(
    scenario: Scenario,
    process: Process,
    *,
    network: Network,
    laws: Laws,
    random: Random,
    members: Callable[[], list[WorkerInfo]],
) -> RouterLife:
    """A router at port 1 of its place, with the membership as it is then."""
    config = RouterConfig(model=ModelConfig(model=MODEL), handoff=scenario.timers, block_size=BLOCK_SIZE)
    pools = Pools(config, connect=connector(network, process, laws), clock=process.clock)
    executor: Any = None  # prompts come as tokens: nothing is encoded
    generation = Generation(
        config,
        model_id=MODEL,
        tokenizer=character_tokenizer(),
        pools=pools,
        executor=executor,
        random=random,
        clock=process.clock,
        route_wait_s=ROUTE_WAIT_S,
    )
    server = network.listen(f"{process.place}:1", process)
    described = inference_pb2.DESCRIPTOR.services_by_name["Inference"]
    server.add_generic_rpc_handlers((service_handler(described, InferenceService(generation, PublicAccess())),))
    evacuation = Evacuation(pools, clock=process.clock)

    def start() -> None:
        pools.on_change = evacuation.wake
        process.loop.create_task(evacuation.run())
        pools.update(members())

    process.start(start)
    return RouterLife(process=process, pools=pools)
