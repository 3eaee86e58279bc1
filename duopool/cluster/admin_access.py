"""How an operator's command finds a router's internal port and the cluster credential.

Owns the credential's default file and one small record per running router, both in Duopool's own folder and readable by
their owner alone. On the machine that serves, the public address is enough; elsewhere the address must be that of the
internal port, and the credential comes from DUOPOOL_CREDENTIAL or a copy of the file.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from duopool.core.config import InternalConfig
from duopool.engine.model_source import cache_folder
from duopool.proto import inference_pb2_grpc
from duopool.proto.internal_access import CREDENTIAL_VARIABLE, InternalAccess
from duopool.proto.secret_files import make_secret

_NAME = socket.gethostname()
"""Homes may be shared between hosts."""
_LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]")


class RouterRecord(BaseModel):
    """Where one router takes operators' commands."""

    model_config = ConfigDict(frozen=True)

    internal_address: str
    internal: InternalConfig
    system: str = ""
    """Name of the system that it belongs to, drawn at its start; empty if it belongs to none."""


def prepare(internal: InternalConfig) -> InternalConfig:
    """Name the credential's file and make it if there is none; a credential in the environment needs no file."""
    if os.environ.get(CREDENTIAL_VARIABLE):
        return internal
    file = Path(internal.credential_file or default_credential_file()).expanduser().absolute()
    make_secret(file, lambda: secrets.token_urlsafe(32))
    return internal.model_copy(update={"credential_file": str(file)})


def default_credential_file() -> Path:
    """Shared by all systems that a user starts."""
    return cache_folder() / "credential"


def announce(port: int, record: RouterRecord) -> None:
    """Keep the record of the router whose public port this is."""
    path = _record_path(port)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, draft = tempfile.mkstemp(dir=path.parent)  # mode 0600
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(record.model_dump_json())
    os.replace(draft, path)


def withdraw(port: int) -> None:
    """Forget the router."""
    with contextlib.suppress(OSError):
        _record_path(port).unlink()


@contextmanager
def admin_stub(address: str) -> Iterator[Any]:
    """Blocking `Admin` calls to the router at this host:port. Raises Unauthenticated without a credential."""
    record = find(address) or RouterRecord(
        internal_address=address, internal=InternalConfig(credential_file=str(default_credential_file()))
    )
    access = InternalAccess.load(record.internal)
    with access.channel(record.internal_address) as channel:
        yield access.stub(inference_pb2_grpc.AdminStub, channel)


def find(address: str) -> RouterRecord | None:
    """The record of the router with this public address, if it runs on this machine."""
    host, _, port = address.rpartition(":")
    if host not in (*_LOCAL_HOSTS, _NAME) or not port.isdecimal():
        return None
    try:
        return RouterRecord.model_validate_json(_record_path(int(port)).read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return None


def routers_beside(address: str) -> list[str]:
    """Public addresses of the other routers of the same system, as far as they run on this machine."""
    own = find(address)
    if own is None or not own.system:
        return []
    ports = sorted(int(path.stem.rpartition("-")[2]) for path in _record_path(0).parent.glob(f"{_NAME}-*.json"))
    beside = (f"{_LOCAL_HOSTS[0]}:{port}" for port in ports if port != int(address.rpartition(":")[2]))
    return [other for other in beside if (record := find(other)) is not None and record.system == own.system]


def _record_path(port: int) -> Path:
    return cache_folder() / "run" / f"{_NAME}-{port}.json"
