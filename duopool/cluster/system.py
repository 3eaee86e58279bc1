"""A whole serving system in one object: Ray, workers, router and the thread that looks after them.

1. Ray is started or joined while the model's folder is prepared.
2. The router process starts; the supervisor asks Ray for the workers; both load at the same time.
3. The supervisor thread attaches to the router and keeps ticking: workers, router, operators' commands.
4. `stop` takes everything down in the opposite order and leaves nothing behind.
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from duopool.cluster.admin_access import prepare
from duopool.cluster.config import ClusterConfig
from duopool.cluster.gpus import plan_gpus
from duopool.cluster.launch import LOOPBACK, RayCluster, available_cpus, launch
from duopool.cluster.membership import ClusterView
from duopool.cluster.placement import actor_options, has_pool_nodes
from duopool.cluster.router_place import RouterPlace
from duopool.cluster.supervisor import Supervisor
from duopool.cluster.worker_process import RayWorkerProcess
from duopool.core.config import TransportName
from duopool.core.errors import DuopoolError, Unavailable
from duopool.core.types import Role, WorkerId
from duopool.engine.model_source import ModelSource, resolve_model
from duopool.proto import control_pb2
from duopool.proto.control_codec import result_of
from duopool.proto.internal_access import InternalAccess

logger = logging.getLogger(__name__)

Report = Callable[[str, str], None]
"""Called with a stage (`model`, `ray`, `workers`, `router`) and a line of text."""

START_POLL_S = 0.05
START_REMINDER_S = 10.0
"""How often an operator is told what a start still waits for."""


class StartFailed(DuopoolError):
    """The system could not be started; nothing of it is left."""


class System:
    """Start with `System.start`; end with `stop`, or use it in a `with` block."""

    def __init__(self, config: ClusterConfig, ray_cluster: RayCluster, *, asked: ClusterConfig) -> None:
        self._config = config
        # Folders of this machine mean nothing on other nodes; workers there look checkpoints up by their names.
        self._checkpoints = config if ray_cluster.is_local else asked
        self._ray = ray_cluster
        self._is_pinned = config.pin_pools
        """Once true always true: a pool whose last node is gone waits for one of its own kind."""
        self._gpus = plan_gpus(
            config.devices,
            config.wanted,
            num_gpus=ray_cluster.num_gpus,
            share=config.num_gpus_per_worker,
            waits_for_nodes=config.pin_pools,
        )
        self._commands: queue.SimpleQueue[tuple[RouterPlace, control_pb2.ClusterCommand]] = queue.SimpleQueue()
        access, name = InternalAccess.load(config.internal), secrets.token_hex(8)
        self.routers = tuple(
            RouterPlace(config.router(number), access, on_command=lambda *asked: self._commands.put(asked), system=name)
            for number in range(config.routers)
        )
        self._is_complete = threading.Event()
        self._is_stopping = threading.Event()
        self._fatal: Exception | None = None
        self._view = ClusterView(members=(), wanted=config.wanted)
        self._supervisor = Supervisor(
            config=config.supervisor, spawn=self._spawn, publish=self._publish, wanted=config.wanted
        )
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    @classmethod
    def start(cls, config: ClusterConfig, *, report: Report = lambda stage, text: None) -> Self:
        """Start everything and return once all workers and the router serve. Raises DuopoolError."""
        report("model", f"preparing {config.model.model}")
        asked = config
        config = _with_model_folders(config, report).model_copy(update={"internal": prepare(config.internal)})
        report("ray", "starting a local Ray" if config.ray_address is None else f"joining {config.ray_address}")
        ray_cluster = launch(config.ray_address)
        try:
            system = cls(config, ray_cluster, asked=asked)
        except BaseException:
            ray_cluster.stop()
            raise
        try:
            report("workers", f"starting {config.prefill} prefill and {config.decode} decode workers")
            system._thread.start()
            system._wait(report)
        except BaseException:
            system.stop()
            raise
        return system

    @property
    def address(self) -> str:
        """host:port at which clients on this machine reach the first router."""
        return self.routers[0].address

    @property
    def addresses(self) -> list[str]:
        """The same of every router; give a client all of them."""
        return [router.address for router in self.routers]

    @property
    def transport(self) -> TransportName:
        """The transport that was asked for."""
        return self._config.handoff.transport

    @property
    def control_plane_pid(self) -> int:
        """Process id of the control plane of a local Ray; 0 for one that was joined."""
        return 0 if self._ray.control_plane is None else self._ray.control_plane.pid

    @property
    def view(self) -> ClusterView:
        """The membership as last published."""
        return self._view

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the system is stopped or its supervisor failed; False if the time passed first."""
        return self._is_stopping.wait(timeout_s)

    def check(self) -> None:
        """Have every worker prove its invariants; raises AssertionError naming what is wrong."""
        self._supervisor.check(timeout_s=30.0)

    def stop(self) -> None:
        """Take everything down. Safe to call twice."""
        self._is_stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=60)
        for router in self.routers:
            router.stop()
        self._ray.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _wait(self, report: Report) -> None:
        """Until all serve. The first worker that fails ends the start: its reason will hold for the next one too."""
        began_at = time.monotonic()
        reported: set[str] = set()
        next_reminder_s = START_REMINDER_S
        while True:
            is_complete = self._is_complete.is_set() and all(router.is_listening for router in self.routers)
            if self._fatal is not None:
                raise self._fatal
            if self._supervisor.num_failures > 0:
                raise StartFailed(self._supervisor.last_error)
            for stage, text in self._news():
                if text not in reported:
                    reported.add(text)
                    report(stage, text)
            if is_complete:
                return
            waited_s = time.monotonic() - began_at
            if waited_s > next_reminder_s:
                next_reminder_s += START_REMINDER_S
                report("waiting", f"{waited_s:.0f} s for {' and '.join(self._missing())}")
            time.sleep(START_POLL_S)

    def _news(self) -> Iterator[tuple[str, str]]:
        """What an operator should hear of the start so far; each text is told once."""
        for info in self.view.members:
            yield "workers", f"{info.worker_id} ready, {info.dtype}, {info.num_blocks:,} KV blocks"
            for note in info.notes:
                yield "workers", note
        for router in self.routers:
            if router.is_listening:
                yield "router", " and ".join(filter(None, (f"listening on {router.address}", router.http_url)))

    def _missing(self) -> Iterator[str]:
        for role, wanted in self._config.wanted.items():
            num_there = sum(info.role == role for info in self.view.members)
            if num_there < wanted:
                yield f"{wanted - num_there} of {wanted} {role} workers (Ray starts them, they load the model)"
        if not all(router.is_listening for router in self.routers):
            yield "the router (it loads the tokenizer)"

    # ---- supervisor thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            for router in self.routers:
                router.launch(time.monotonic())
            while not self._is_stopping.wait(self._config.supervisor.tick_s):
                self._tick(time.monotonic())
        except Exception as error:
            logger.exception("the supervisor failed")
            self._fatal = error if isinstance(error, DuopoolError) else StartFailed(repr(error))
            self._is_stopping.set()
        finally:
            self._end()

    def _tick(self, now: float) -> None:
        if self._ray.control_plane is not None:
            self._ray.control_plane.tick()
        while not self._commands.empty():
            self._execute(*self._commands.get(), now)
        self._supervisor.tick(now)
        for router in self.routers:
            router.tick(self._view, now)
        if self._supervisor.is_complete:
            self._is_complete.set()

    def _execute(self, router: RouterPlace, command: control_pb2.ClusterCommand, now: float) -> None:
        error: DuopoolError | None = None
        try:
            match command.WhichOneof("command"):
                case "scale":
                    self._supervisor.scale(dict(command.scale.pools))
                case "drain":
                    self._supervisor.drain(command.drain.worker_id, command.drain.incarnation, now)
                case "restart":
                    self._supervisor.restart(drain_first=command.restart.drain_first)
                case other:
                    error = Unavailable(f"command {other!r} is unknown")
        except DuopoolError as problem:
            error = problem
        self._publish(self._supervisor.view)
        router.answer(result_of(command.command_id, error))

    def _end(self) -> None:
        """Routers first, so that no client sees its worker vanish under it."""
        for router in self.routers:
            router.stop()
        self._supervisor.stop_all()

    def _publish(self, view: ClusterView) -> None:
        self._view = view
        for router in self.routers:
            router.publish(view)

    def _spawn(self, worker_id: WorkerId, role: Role) -> RayWorkerProcess:
        import ray

        num_threads = self._config.num_threads or available_cpus()
        num_gpus = self._gpus.num_gpus(role)
        self._is_pinned = self._is_pinned or has_pool_nodes(ray.cluster_resources())
        options = actor_options(role, is_pinned=self._is_pinned, num_threads=num_threads, num_gpus=num_gpus)
        # A worker on another node must be reached from everywhere; its actor finds out its node's address.
        host = LOOPBACK if self._ray.is_local else NODE_ADDRESS
        worker = self._config.worker(
            worker_id,
            role,
            host=host,
            num_threads=num_threads,
            shares_cores=not self._gpus.uses_gpus and not self._is_pinned,
            device=self._gpus.devices[role],
            gpu_share=num_gpus or 1.0,
        )
        checkpoints: dict[str, str | None] = {"model": self._checkpoints.model.model}
        if role is Role.DECODE:
            checkpoints["weights"] = self._checkpoints.decode_model
        model = worker.model.model_copy(update=checkpoints)
        return RayWorkerProcess(worker.model_copy(update={"model": model}), options=options)


NODE_ADDRESS = "auto"
"""Worker host that stands for the address by which its Ray node is known."""


def _with_model_folders(config: ClusterConfig, report: Report) -> ClusterConfig:
    """Prepare checkpoints once, before workers do it at the same time, and fix the name the model is served by."""

    def found(name: str) -> ModelSource:
        return resolve_model(name, lambda text: report("model", text))

    source = found(config.model.model)
    decode_model = None if config.decode_model is None else str(found(config.decode_model).folder)
    name = config.model.served_model_name or source.name
    model = config.model.model_copy(update={"model": str(source.folder), "served_model_name": name})
    return config.model_copy(update={"model": model, "decode_model": decode_model})
