"""Chooses a transport by name and by what is installed; nothing is imported before it is chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from duopool.core.config import TransportName
from duopool.core.errors import Unavailable
from duopool.core.types import Incarnation, WorkerId
from duopool.engine.transfer import nixl_library
from duopool.engine.transfer.page_store import PageStore
from duopool.engine.transfer.transport import BlockReader

if TYPE_CHECKING:
    from duopool.engine.transfer.nixl_source import NixlSource
    from duopool.proto.internal_access import InternalAccess


def available_transports() -> tuple[TransportName, ...]:
    """What can be made here, best first. Imports NIXL, if it is there, to be sure."""
    return ("nixl", "grpc") if nixl_library.can_load() else ("grpc",)


def choose_transport(transport: TransportName) -> TransportName:
    """`auto` is the best that is available. Raises Unavailable if what is asked for is not."""
    available = available_transports() if transport != "grpc" else ("grpc",)
    if transport == "auto":
        return available[0]
    if transport not in available:
        raise Unavailable(f"transport {transport} is not installed here; available: {', '.join(available)}")
    return transport


def make_reader(
    transport: TransportName,
    store: PageStore,
    *,
    worker_id: WorkerId,
    incarnation: Incarnation,
    access: InternalAccess | None = None,
    read_timeout_s: float = 5.0,
    confirm_timeout_s: float = 2.0,
) -> BlockReader:
    """D's reader into the pages of `store`. Raises Unavailable or TransferFailed.

    `access` is what sources ask for. A `nixl` reader reads a source that has no NIXL agent over gRPC.
    """
    if choose_transport(transport) == "nixl":
        from duopool.engine.transfer.nixl_reader import NixlReader

        return NixlReader(
            store,
            worker_id=worker_id,
            incarnation=incarnation,
            access=access,
            read_timeout_s=read_timeout_s,
            confirm_timeout_s=confirm_timeout_s,
        )
    from duopool.engine.transfer.grpc_reader import GrpcReader

    return GrpcReader(store, access=access, read_timeout_s=read_timeout_s, confirm_timeout_s=confirm_timeout_s)


def make_nixl_source(
    transport: TransportName, store: PageStore, *, worker_id: WorkerId, incarnation: Incarnation
) -> NixlSource | None:
    """P's registered pages, for `add_kv_source`; None if the transport is gRPC. Raises Unavailable, TransferFailed."""
    if choose_transport(transport) != "nixl":
        return None
    from duopool.engine.transfer.nixl_source import NixlSource

    return NixlSource(store, worker_id=worker_id, incarnation=incarnation)
