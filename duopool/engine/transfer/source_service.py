"""A worker's pages for other workers to read, by every way that its transport knows. Both roles offer theirs."""

from __future__ import annotations

from typing import Any

from duopool.core.config import TransportName
from duopool.core.types import Incarnation, WorkerId
from duopool.engine.transfer.factory import make_nixl_source
from duopool.engine.transfer.page_store import PageStore
from duopool.engine.transfer.transport import LeaseKeeper


class SourceService:
    """Holds what was opened for it. Raises Unavailable or TransferFailed."""

    def __init__(
        self,
        transport: TransportName,
        store: PageStore,
        keeper: LeaseKeeper,
        *,
        worker_id: WorkerId,
        incarnation: Incarnation,
    ) -> None:
        self._store = store
        self._keeper = keeper
        self._incarnation = incarnation
        self._nixl = make_nixl_source(transport, store, worker_id=worker_id, incarnation=incarnation)

    def add_to(self, server: Any) -> None:
        """Register on a gRPC server, before it is started."""
        from duopool.engine.transfer.grpc_source import add_kv_source

        add_kv_source(server, keeper=self._keeper, store=self._store, incarnation=self._incarnation, nixl=self._nixl)
