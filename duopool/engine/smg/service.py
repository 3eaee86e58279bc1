"""The VllmEngine service of one worker, on a port of its own that asks for no credential, as the protocol knows none.

Owns the port and the calls; what a request means is in `legs.py`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from smg_grpc_proto import vllm_engine_pb2 as wire

from duopool.core.config import WorkerConfig
from duopool.core.errors import Unavailable
from duopool.core.messages import WorkerInfo, WorkerLoad
from duopool.core.types import Role
from duopool.engine.served_model import ServedModel
from duopool.engine.smg import facts
from duopool.engine.smg.asked import read_asked
from duopool.engine.smg.exchange import Exchange
from duopool.engine.smg.handle import HandleSeal
from duopool.engine.smg.legs import DecodeLeg, Leg, PrefillLeg
from duopool.proto.codec import REFUSE_AT_ONCE
from duopool.proto.internal_access import InternalAccess
from duopool.proto.rpc import service_handler
from duopool.proto.worker_service import WorkerService

log = logging.getLogger(__name__)

_SERVICE = wire.DESCRIPTOR.services_by_name["VllmEngine"]
_SEED_BITS = 31


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """The worker that is served."""

    info: WorkerInfo
    model: ServedModel
    folder: Path
    """Of its checkpoint."""
    config: WorkerConfig
    access: InternalAccess
    load: Callable[[], WorkerLoad]


class VllmEngine:
    """One method per call of the protocol."""

    def __init__(self, served: Served, exchange: Exchange, leg: Leg) -> None:
        self._served = served
        self._exchange = exchange
        self._leg = leg
        self._started_at = time.monotonic()

    async def Generate(self, request: Any, context: Any) -> None:
        asked = read_asked(request, self._served.model, seed=secrets.randbits(_SEED_BITS))
        await self._leg(asked, context.time_remaining(), context.write)

    async def Abort(self, request: Any, context: Any) -> Any:
        for alias in request.request_ids:
            self._exchange.abort(alias)
        return wire.AbortResponse()

    async def HealthCheck(self, request: Any, context: Any) -> Any:
        return wire.HealthCheckResponse(healthy=True)

    async def GetModelInfo(self, request: Any, context: Any) -> Any:
        return await asyncio.to_thread(facts.model_info, self._served.info, self._served.model, self._served.folder)

    async def GetServerInfo(self, request: Any, context: Any) -> Any:
        return facts.server_info(
            self._served.info,
            num_requests=self._exchange.num_requests,
            uptime_s=time.monotonic() - self._started_at,
            max_num_seqs=self._served.config.scheduler.max_num_seqs,
        )

    async def GetTokenizer(self, request: Any, context: Any) -> None:
        for chunk in await asyncio.to_thread(lambda: list(facts.tokenizer_chunks(self._served.folder))):
            await context.write(chunk)

    async def GetLoads(self, request: Any, context: Any) -> Any:
        load, block_size = self._served.load(), self._served.info.block_size
        num_used_blocks = load.num_blocks - load.num_free_blocks - load.num_cached_blocks
        return wire.GetLoadsResponse(
            timestamp=datetime.now(UTC).isoformat(),
            dp_rank_count=1,
            loads=[
                wire.SchedulerLoad(
                    num_running_reqs=load.num_running,
                    num_waiting_reqs=load.num_waiting,
                    num_total_reqs=load.num_running + load.num_waiting,
                    num_used_tokens=num_used_blocks * block_size,
                    max_total_num_tokens=load.num_blocks * block_size,
                    token_usage=num_used_blocks / max(1, load.num_blocks),
                    max_running_requests=self._served.config.scheduler.max_num_seqs,
                    num_waiting_uncached_tokens=load.num_pending_tokens,
                )
            ],
        )


class EngineServer:
    """`listen`, then `run`; both on the event loop of the worker's own service."""

    def __init__(self, server: grpc.aio.Server, address: str) -> None:
        self.address = address
        """host:port"""
        self.note = f"VllmEngine for the smg gateway at {address}"
        self._server = server

    @classmethod
    async def listen(cls, host: str, port: int) -> Self:
        """Take the port; 0 lets the system choose. Raises Unavailable."""
        server = grpc.aio.server(options=(("grpc.so_reuseport", 0), REFUSE_AT_ONCE))
        address = f"[{host}]" if ":" in host else host
        try:
            port = server.add_insecure_port(f"{address}:{port}")
        except RuntimeError as error:
            raise Unavailable(f"cannot listen on {address}:{port} for the smg gateway: {error}") from error
        return cls(server, f"{address}:{port}")

    async def run(self, service: WorkerService, served: Served) -> None:
        """Answer until cancelled."""
        try:
            with service.local_session() as session:
                await self._serve(Exchange(session, heartbeat_s=served.config.handoff.heartbeat_s), served)
        except Exception:
            log.exception("the smg gateway is not served any more")

    async def _serve(self, exchange: Exchange, served: Served) -> None:
        seal = HandleSeal(served.access.credential, model_digest=served.info.model_digest)
        is_prefill = served.config.role is Role.PREFILL
        leg: Leg = PrefillLeg(exchange, seal) if is_prefill else DecodeLeg(exchange, seal, served.model)
        self._server.add_generic_rpc_handlers((service_handler(_SERVICE, VllmEngine(served, exchange, leg)),))
        healthy = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(healthy, self._server)
        for name in ("", _SERVICE.full_name):
            await healthy.set(name, health_pb2.HealthCheckResponse.SERVING)
        await self._server.start()
        try:
            await exchange.run()
        finally:
            await self._server.stop(None)
