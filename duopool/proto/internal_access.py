"""Who may make internal calls: the cluster credential on every call, and mutual TLS where it is configured.

Owns how the credential travels and is compared, and what channels and ports of the internal services are made of. A
server refuses a call before it reads any message of it. Making the credential's file is the supervisor's.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import grpc

from duopool.core.config import InternalConfig
from duopool.core.errors import Unauthenticated
from duopool.proto import codec
from duopool.proto.secret_files import read_secret
from duopool.proto.status import grpc_status

CREDENTIAL_VARIABLE = "DUOPOOL_CREDENTIAL"
MIN_CREDENTIAL_CHARS = 16
TLS_NAME = "duopool.internal"
"""The name that internal certificates are for: one certificate serves every host, whatever its address."""
_HEADER = "authorization"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pem:
    certificate: bytes
    key: bytes
    ca: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class InternalAccess:
    """The credential and certificates of one process."""

    credential: str
    pem: _Pem | None = None

    @classmethod
    def load(cls, config: InternalConfig, environment: Mapping[str, str] = os.environ) -> Self:
        """Read what `config` names. Raises Unauthenticated if there is no credential, or its file is open to others."""
        credential = environment.get(CREDENTIAL_VARIABLE, "")
        if not credential and config.credential_file is not None:
            credential = read_secret(Path(config.credential_file))
        if not credential:
            raise Unauthenticated(
                f"there is no cluster credential: set {CREDENTIAL_VARIABLE} or name the file that 'duopool serve' made"
            )
        if len(credential) < MIN_CREDENTIAL_CHARS or not credential.isascii() or not credential.isprintable():
            raise Unauthenticated(f"the cluster credential must have {MIN_CREDENTIAL_CHARS} or more printable letters")
        return cls(credential=credential, pem=_read_pem(config))

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every internal call shows."""
        return ((_HEADER, f"Bearer {self.credential}"),)

    def stub(self, stub: Any, channel: Any) -> Any:
        """`stub` on `channel`, its methods showing the credential."""
        return _Shown(stub(channel), self.metadata)

    # ---- client side -----------------------------------------------------------------------------------------------

    def channel(self, address: str) -> Any:
        """A blocking channel to an internal port."""
        if self.pem is None:
            return grpc.insecure_channel(address, options=codec.INTERNAL_CHANNEL_OPTIONS)
        return grpc.secure_channel(address, self._channel_credentials(self.pem), options=_TLS_OPTIONS)

    def aio_channel(self, address: str) -> Any:
        """The same for asyncio."""
        if self.pem is None:
            return grpc.aio.insecure_channel(address, options=codec.INTERNAL_CHANNEL_OPTIONS)
        return grpc.aio.secure_channel(address, self._channel_credentials(self.pem), options=_TLS_OPTIONS)

    @staticmethod
    def _channel_credentials(pem: _Pem) -> Any:
        return grpc.ssl_channel_credentials(
            root_certificates=pem.ca, private_key=pem.key, certificate_chain=pem.certificate
        )

    # ---- server side -----------------------------------------------------------------------------------------------

    def server(self) -> grpc.aio.Server:
        """A server that refuses every call without the credential; give it ports with `add_port`."""
        return grpc.aio.server(options=codec.INTERNAL_CHANNEL_OPTIONS, interceptors=(_Guard(self.admits),))

    def add_port(self, server: grpc.aio.Server, address: str) -> int:
        """Have `server` listen at host:port; returns the port. RuntimeError if it cannot."""
        if self.pem is None:
            return int(server.add_insecure_port(address))
        pair = ((self.pem.key, self.pem.certificate),)
        credentials = grpc.ssl_server_credentials(pair, root_certificates=self.pem.ca, require_client_auth=True)
        return int(server.add_secure_port(address, credentials))

    def admits(self, metadata: Mapping[str, Any]) -> bool:
        """Whether a call shows the credential; takes the same time for every wrong one."""
        shown = metadata.get(_HEADER, "")
        return isinstance(shown, str) and hmac.compare_digest(
            shown.encode(errors="replace"), f"Bearer {self.credential}".encode()
        )


_TLS_OPTIONS = (*codec.INTERNAL_CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", TLS_NAME))


class _Shown:
    """A stub whose methods carry metadata."""

    def __init__(self, stub: Any, metadata: tuple[tuple[str, str], ...]) -> None:
        self._stub = stub
        self._metadata = metadata

    def __getattr__(self, name: str) -> Any:
        return partial(getattr(self._stub, name), metadata=self._metadata)


class _Guard(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Lets calls through whose metadata is admitted; an unknown method is refused like all others."""

    def __init__(self, admits: Callable[[Mapping[str, Any]], bool]) -> None:
        self._admits = admits
        self._refusal = grpc.stream_stream_rpc_method_handler(_refuse)

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        if self._admits(dict(details.invocation_metadata or ())):
            return await continuation(details)
        return self._refusal


async def _refuse(requests: Any, context: Any) -> None:
    await context.abort_with_status(grpc_status(Unauthenticated("internal calls need the cluster credential")))


def _read_pem(config: InternalConfig) -> _Pem | None:
    if config.tls is None or config.tls.ca is None:
        return None
    certificate, key, ca = (Path(name).read_bytes() for name in (config.tls.certificate, config.tls.key, config.tls.ca))
    return _Pem(certificate=certificate, key=key, ca=ca)
