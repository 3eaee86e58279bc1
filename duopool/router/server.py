"""The router's servers: gRPC and HTTP for clients, an internal gRPC port for supervisor and operators.

Owns how the parts are put together, health and shutdown; the parts own everything else.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from random import Random

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from duopool.core.config import RouterConfig
from duopool.core.types import Role
from duopool.proto import inference_pb2
from duopool.proto.codec import REFUSE_AT_ONCE
from duopool.proto.internal_access import InternalAccess
from duopool.proto.rpc import service_handler
from duopool.router.admin_service import AdminService
from duopool.router.connection import connector
from duopool.router.control_service import COMMAND_TIMEOUT_S, ControlService
from duopool.router.evacuation import Evacuation
from duopool.router.generation import Generation
from duopool.router.http.app import make_app
from duopool.router.http.gate import Gate
from duopool.router.http.server import HttpServer
from duopool.router.inference_service import InferenceService
from duopool.router.live import LiveView
from duopool.router.metrics import Metrics
from duopool.router.pools import Pools
from duopool.router.public_access import PublicAccess
from duopool.router.request_life import ROUTE_WAIT_S
from duopool.router.tokenizer import Tokenizer
from duopool.router.traces import make_traces
from duopool.router.watch import Watches

NUM_TOKENIZER_THREADS = 2
STOP_GRACE_S = 2.0
KEEPALIVE_MS = 20_000
_INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"]
_ADMIN = inference_pb2.DESCRIPTOR.services_by_name["Admin"]


class RouterServer:
    """One router: `start`, then `stop`. `pools` takes the membership."""

    def __init__(
        self,
        config: RouterConfig,
        tokenizer: Tokenizer,
        *,
        random: Random | None = None,
        clock: Callable[[], float] = time.monotonic,
        route_wait_s: float = ROUTE_WAIT_S,
        command_timeout_s: float = COMMAND_TIMEOUT_S,
    ) -> None:
        self._config = config
        self.port = 0
        self.http_port = 0
        """0 without an HTTP face."""
        self.internal_port = 0
        self._public_access = PublicAccess.load(config)
        self._access = InternalAccess.load(config.internal)
        self.pools = Pools(config, connect=connector(self._access), clock=clock)
        self._executor = ThreadPoolExecutor(NUM_TOKENIZER_THREADS, thread_name_prefix="tokenizer")
        self._health = health.aio.HealthServicer()
        self._tasks: tuple[asyncio.Task[None], ...] = ()
        self._has_stopped = False
        self._health_wake = asyncio.Event()
        self._evacuation = Evacuation(self.pools, clock=clock)
        model_id = config.model.served_model_name or config.model.model
        control = ControlService(self.pools, command_timeout_s=command_timeout_s)
        self.metrics = Metrics(self.pools, model_id=model_id, prefix=config.metrics_prefix)
        self._traces = make_traces()
        self.live = LiveView(self.pools, model_id=model_id, clock=clock)
        self.generation = Generation(
            config,
            model_id=model_id,
            tokenizer=tokenizer,
            pools=self.pools,
            executor=self._executor,
            random=random or Random(),
            clock=clock,
            route_wait_s=route_wait_s,
            watch=Watches([watch for watch in (self.metrics, self.live, self._traces) if watch is not None]),
        )
        inference = InferenceService(self.generation, self._public_access)
        admin = AdminService(config, model_id=model_id, pools=self.pools, control=control)
        self._public = self._make_public(inference)
        self._http: HttpServer | None = None
        if config.http_port is not None:
            app = make_app(self.generation, self.metrics, self.live, max_body_bytes=config.max_message_bytes)
            gate = Gate(app, public=self._public_access, internal=self._access)
            self._http = HttpServer(gate, host=config.host, port=config.http_port, tls=config.tls, grace_s=STOP_GRACE_S)
        self._internal = self._access.server()
        self._internal.add_generic_rpc_handlers((service_handler(_ADMIN, admin),))
        control.add_to(self._internal)

    async def start(self) -> None:
        """Listen on all ports. OSError, and nothing is left, when one is taken."""
        try:
            await self._listen()
        except OSError:
            await self.stop(0)
            raise

    async def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """Take nothing new, let streams end for a while, then close everything. Safe to call twice."""
        if self._has_stopped:
            return
        self._has_stopped = True
        await self._health.enter_graceful_shutdown()
        faces = [self._public.stop(grace_s)]
        if self._http is not None:
            faces.append(self._http.stop())
        await asyncio.gather(*faces)
        await self.pools.close()
        await self._internal.stop(0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._executor.shutdown(wait=True, cancel_futures=True)
        if self._traces is not None:
            self._traces.close()

    async def _listen(self) -> None:
        config = self._config
        # First: a gRPC server that is bound and never started makes noise when it goes.
        if self._http is not None:
            await self._http.start()
            self.http_port = self._http.port
        address = f"{config.host}:{config.port}"
        try:
            self.port = self._public_access.add_port(self._public, address)
            address = f"{config.internal_host}:{config.internal_port}"
            self.internal_port = self._access.add_port(self._internal, address)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: the port is taken, or the host is not this machine") from error
        self.pools.on_change = self._on_change
        self._on_change()
        self._tasks = (asyncio.create_task(self._tell_health()), asyncio.create_task(self._evacuation.run()))
        await self._internal.start()
        await self._public.start()

    def _make_public(self, inference: InferenceService) -> grpc.aio.Server:
        server = grpc.aio.server(
            interceptors=(self._public_access.guard((_INFERENCE.full_name,)),),
            options=(
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", self._config.max_message_bytes),
                REFUSE_AT_ONCE,
                # A client whose machine vanished is noticed although nothing arrives from it.
                ("grpc.keepalive_time_ms", KEEPALIVE_MS),
                ("grpc.keepalive_timeout_ms", KEEPALIVE_MS // 2),
            ),
        )
        server.add_generic_rpc_handlers((service_handler(_INFERENCE, inference),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (_INFERENCE.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        return server

    def _on_change(self) -> None:
        self._health_wake.set()
        self._evacuation.wake()

    async def _tell_health(self) -> None:
        """Serving means that at least one worker of each role takes requests."""
        while True:
            await self._health_wake.wait()
            self._health_wake.clear()
            serving = all(self.pools.num_ready(role) for role in Role)
            status = health_pb2.HealthCheckResponse.ServingStatus
            for name in ("", _INFERENCE.full_name):
                await self._health.set(name, status.SERVING if serving else status.NOT_SERVING)
