"""Chooses a transport by name and by what is installed; nothing is imported before it is chosen."""

from __future__ import annotations

import os
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
    shared: tuple[TransportName, ...] = ("shared_memory",) if _has_shared_memory() else ()
    nixl: tuple[TransportName, ...] = ("nixl",) if nixl_library.can_load() else ()
    return (*shared, *nixl, "grpc")


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

    `access` is what sources ask for. Every reader leaves what it cannot reach to a slower one, in the end to gRPC.
    """
    ways = _ways(transport, store)
    from duopool.engine.transfer.grpc_reader import GrpcReader
    from duopool.engine.transfer.source_client import SourceClient

    client = SourceClient(access, confirm_timeout_s=confirm_timeout_s)
    reader: BlockReader
    if "nixl" in ways:
        from duopool.engine.transfer.nixl_reader import NixlReader

        reader = NixlReader(
            store, worker_id=worker_id, incarnation=incarnation, client=client, read_timeout_s=read_timeout_s
        )
    else:
        reader = GrpcReader(store, client=client, read_timeout_s=read_timeout_s)
    if "shared_memory" in ways:
        from duopool.engine.transfer.shared_memory_reader import SharedMemoryReader

        reader = SharedMemoryReader(store, client=client, others=reader, read_timeout_s=read_timeout_s)
    return reader


def make_nixl_source(
    transport: TransportName, store: PageStore, *, worker_id: WorkerId, incarnation: Incarnation
) -> NixlSource | None:
    """P's registered pages, for `add_kv_source`; None where NIXL is not used. Raises Unavailable, TransferFailed."""
    if "nixl" not in _ways(transport, store):
        return None
    from duopool.engine.transfer.nixl_source import NixlSource

    return NixlSource(store, worker_id=worker_id, incarnation=incarnation)


def _ways(transport: TransportName, store: PageStore) -> tuple[TransportName, ...]:
    """What is tried in turn: for `auto` all there is. Raises Unavailable if what is asked for is not to be had."""
    if transport == "grpc":
        return ("grpc",)
    available = available_transports()
    if store.shared_memory is None:
        available = tuple(way for way in available if way != "shared_memory")
    if transport == "auto":
        return available
    if transport not in available:
        raise Unavailable(f"transport {transport} is not to be had here; available: {', '.join(available)}")
    return (transport, "grpc")


def _has_shared_memory() -> bool:
    """True where memory can be shared without a path, and another process's end be waited for: Linux."""
    return all(hasattr(os, call) for call in ("memfd_create", "pidfd_open", "eventfd"))
