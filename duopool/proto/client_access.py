"""How a client of ours reaches a public port: its API key and TLS, from arguments or the environment.

DUOPOOL_API_KEY is the key; DUOPOOL_TLS_CA names the PEM file of the authority that signed the server's certificate
(`system` means those that the machine trusts) and turns TLS on; DUOPOOL_TLS_CERTIFICATE and DUOPOOL_TLS_KEY are what
the client shows where servers ask for it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import grpc

from duopool.proto.bearer import Metadata, ShownStub, bearer

MAX_MESSAGE_BYTES = 64 << 20
_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
)
SYSTEM_CA = "system"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientAccess:
    """Makes channels and stubs."""

    api_key: str = field(default="", repr=False)
    tls_ca: str = ""
    """A PEM file, or `system`; empty means no TLS."""
    tls_certificate: str = ""
    tls_key: str = ""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """What the variables say."""
        return cls(
            api_key=environment.get("DUOPOOL_API_KEY", ""),
            tls_ca=environment.get("DUOPOOL_TLS_CA", ""),
            tls_certificate=environment.get("DUOPOOL_TLS_CERTIFICATE", ""),
            tls_key=environment.get("DUOPOOL_TLS_KEY", ""),
        )

    @property
    def metadata(self) -> Metadata:
        """What every call shows."""
        return bearer(self.api_key)

    def channel(self, address: str) -> Any:
        """A blocking channel. OSError when a file cannot be read."""
        if not self.tls_ca:
            return grpc.insecure_channel(address, options=_OPTIONS)
        return grpc.secure_channel(address, self._credentials(), options=_OPTIONS)

    def aio_channel(self, address: str) -> Any:
        """The same for asyncio."""
        if not self.tls_ca:
            return grpc.aio.insecure_channel(address, options=_OPTIONS)
        return grpc.aio.secure_channel(address, self._credentials(), options=_OPTIONS)

    def stub(self, stub: Any, channel: Any) -> Any:
        """`stub` on `channel`, its methods showing the key."""
        return ShownStub(stub(channel), self.metadata)

    def _credentials(self) -> Any:
        return grpc.ssl_channel_credentials(
            root_certificates=None if self.tls_ca == SYSTEM_CA else Path(self.tls_ca).read_bytes(),
            private_key=Path(self.tls_key).read_bytes() if self.tls_key else None,
            certificate_chain=Path(self.tls_certificate).read_bytes() if self.tls_certificate else None,
        )
