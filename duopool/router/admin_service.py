"""The `Admin` service: how the pools stand, and how large they should be.

Owns no decision: sizes and drains go to the supervisor through the control service.
"""

from __future__ import annotations

from typing import Any

from duopool import __version__
from duopool.core.config import MAX_POOL_SIZE, RouterConfig
from duopool.core.errors import InvalidRequest, WorkerNotFound
from duopool.core.types import Role
from duopool.proto import control_pb2, inference_pb2
from duopool.proto import inference_pb2 as pb
from duopool.proto.audit_codec import audit_response, router_audit, worker_audit
from duopool.proto.process_resources import measure_resources
from duopool.proto.public_codec import worker_state
from duopool.router.audit import Auditor
from duopool.router.control_service import ControlService
from duopool.router.pools import Pools


class AdminService:
    def __init__(self, config: RouterConfig, *, model_id: str, pools: Pools, control: ControlService) -> None:
        self._config = config
        self._model_id = model_id
        self._pools = pools
        self._control = control
        self._auditor = Auditor(pools, config.handoff)

    async def ClusterState(self, request: pb.ClusterStateRequest, context: Any) -> pb.ClusterStateResponse:
        pools = self._pools
        return pb.ClusterStateResponse(
            model=self._model_id,
            version=__version__,
            pools=self._pool_states(),
            workers=[worker_state(info, load, state) for info, state, load in pools.worker_states()],
            requests=pools.num_requests,
            transport=self._config.handoff.transport,
        )

    async def Scale(self, request: pb.ScaleRequest, context: Any) -> pb.ScaleResponse:
        if not request.pools:
            raise InvalidRequest("pools", "must name at least one pool")
        for role, size in request.pools.items():
            if role not in tuple(Role):
                raise InvalidRequest("pools", f"{role[:64]!r} is no pool; {', '.join(Role)} are")
            if not 1 <= size <= MAX_POOL_SIZE:
                raise InvalidRequest(f"pools[{role}]", f"must be between 1 and {MAX_POOL_SIZE}, got {size}")
        scale = control_pb2.ScalePools(pools=dict(request.pools))
        await self._control.command(control_pb2.ClusterCommand(scale=scale))
        return inference_pb2.ScaleResponse(pools=self._pool_states())

    async def Drain(self, request: pb.DrainRequest, context: Any) -> pb.DrainResponse:
        worker = next((info for info in self._pools.members if info.worker_id == request.worker_id), None)
        if worker is None:
            raise WorkerNotFound(f"there is no worker {request.worker_id[:128]!r}")
        if request.incarnation not in (0, worker.incarnation):
            raise WorkerNotFound(f"worker {request.worker_id!r} has been replaced since")
        drain = control_pb2.DrainWorker(worker_id=worker.worker_id, incarnation=worker.incarnation)
        await self._control.command(control_pb2.ClusterCommand(drain=drain))
        return pb.DrainResponse()

    async def Restart(self, request: pb.RestartRequest, context: Any) -> pb.RestartResponse:
        restart = control_pb2.RestartWorkers(drain_first=request.drain_first)
        await self._control.command(control_pb2.ClusterCommand(restart=restart))
        return pb.RestartResponse()

    async def Audit(self, request: pb.AuditRequest, context: Any) -> pb.AuditResponse:
        audit = await self._auditor.audit(at_rest=request.at_rest)
        num_requests = self._pools.num_requests
        own = router_audit(measure_resources(num_streams=num_requests), num_requests=num_requests)
        return audit_response(audit.findings, [*(worker_audit(*one) for one in audit.ledgers), own])

    def _pool_states(self) -> list[pb.PoolState]:
        pools = self._pools
        return [pb.PoolState(role=role, wanted=pools.wanted.get(role, 0), ready=pools.num_ready(role)) for role in Role]
