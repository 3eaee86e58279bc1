"""Who may make internal calls: the cluster credential on every call, and mutual TLS where it is configured.

Owns how the credential travels and is compared, and what channels and ports of the internal services are made of. A
server refuses a call before it reads any message of it. Making the credential's file is the supervisor's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import grpc

from duopool.core.config import InternalConfig
from duopool.core.errors import Unauthenticated
from duopool.proto import codec
from duopool.proto.bearer import HEADER, Guard, Metadata, ShownStub, bearer, digest_of, find_secret, shown_secret
from duopool.proto.secret_files import read_secret

CREDENTIAL_VARIABLE = "DUOPOOL_CREDENTIAL"
MIN_CREDENTIAL_CHARS = 16
TLS_NAME = "duopool.internal"
"""The name that internal certificates are for: one certificate serves every host, whatever its address."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pem:
    certificate: bytes
    key: bytes
    ca: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class InternalAccess:
    """The credential and certificates of one process."""

    credential: str = field(repr=False)
    pem: _Pem | None = field(default=None, repr=False)

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
    def metadata(self) -> Metadata:
        """What every internal call shows."""
        return bearer(self.credential)

    def stub(self, stub: Any, channel: Any) -> Any:
        """`stub` on `channel`, its methods showing the credential."""
        return ShownStub(stub(channel), self.metadata)

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
        guard = Guard(lambda _, metadata: self.admits(metadata), "internal calls need the cluster credential")
        return grpc.aio.server(options=codec.INTERNAL_SERVER_OPTIONS, interceptors=(guard,))

    def add_port(self, server: grpc.aio.Server, address: str) -> int:
        """Have `server` listen at host:port; returns the port. RuntimeError if it cannot."""
        if self.pem is None:
            return int(server.add_insecure_port(address))
        pair = ((self.pem.key, self.pem.certificate),)
        credentials = grpc.ssl_server_credentials(pair, root_certificates=self.pem.ca, require_client_auth=True)
        return int(server.add_secure_port(address, credentials))

    def admits(self, metadata: Mapping[str, Any]) -> bool:
        """Whether a call shows the credential."""
        known = ((digest_of(self.credential), "cluster"),)
        return find_secret(shown_secret(metadata.get(HEADER)), known) is not None


_TLS_OPTIONS = (*codec.INTERNAL_CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", TLS_NAME))


def _read_pem(config: InternalConfig) -> _Pem | None:
    if config.tls is None or config.tls.ca is None:
        return None
    certificate, key, ca = (Path(name).read_bytes() for name in (config.tls.certificate, config.tls.key, config.tls.ca))
    return _Pem(certificate=certificate, key=key, ca=ca)
