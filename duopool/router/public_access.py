"""Who may call the public ports, and as which tenant: API keys and TLS, the same for gRPC and HTTP.

Owns what a key is (only digests of keys stay in memory) and what separates tenants: the salt of their cached blocks.
Without keys everybody is the one anonymous tenant. A keys file has one `TENANT KEY` a line; a tenant may have several
keys. The file may change while the router runs (`key_file.py`), keys in the environment may not.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self

import grpc

from duopool.core.config import RouterConfig, TlsFiles
from duopool.core.errors import InvalidRequest, Unauthenticated
from duopool.proto.bearer import HEADER, Guard, digest_of, find_secret, shown_secret
from duopool.router.key_file import Digests, KeyFile

KEYS_VARIABLE = "DUOPOOL_API_KEYS"
MIN_KEY_CHARS = 16
MAX_TENANT_CHARS = 128
_SALT_BYTES = 32


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whose call it is."""

    name: str

    def salt(self, cache_salt: bytes) -> bytes:
        """The salt of this call's block keys: tenants share no cached prefix, whatever salt they name."""
        if not self.name:
            return cache_salt
        return blake2b(cache_salt, digest_size=_SALT_BYTES, key=blake2b(self.name.encode()).digest()).digest()


ANONYMOUS = Tenant("")


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicAccess:
    """What the public ports ask of callers."""

    digests: Digests = ()
    """None means that no key is asked for, unless there is a file."""
    file: KeyFile | None = None
    tls: TlsFiles | None = None

    @classmethod
    def load(cls, config: RouterConfig, environment: Mapping[str, str] = os.environ) -> Self:
        """Keys from DUOPOOL_API_KEYS, else from the file. Raises Unauthenticated or InvalidRequest naming the line."""
        text = environment.get(KEYS_VARIABLE, "")
        if not text and config.api_keys_file is not None:
            return cls(file=KeyFile(Path(config.api_keys_file), parse_keys), tls=config.tls)
        digests = parse_keys(text)
        if text and not digests:
            raise InvalidRequest("api_keys", "keys are wanted, but there is no key")
        return cls(digests=digests, tls=config.tls)

    @property
    def asks_for_keys(self) -> bool:
        return bool(self.digests) or self.file is not None

    def tenant(self, authorization: object) -> Tenant:
        """Whose key this value of the `authorization` header shows. Raises Unauthenticated."""
        if not self.asks_for_keys:
            return ANONYMOUS
        digests = self.digests if self.file is None else self.file.digests()
        name = find_secret(shown_secret(authorization), digests)
        if name is None:
            raise Unauthenticated("the call needs an API key: 'authorization: Bearer KEY'")
        return Tenant(name)

    def guard(self, services: Sequence[str]) -> Guard:
        """For a gRPC server: calls of these services need a key."""
        prefixes = tuple(f"/{service}/" for service in services)

        def admits(method: str, metadata: Mapping[str, Any]) -> bool:
            if not method.startswith(prefixes):
                return True
            try:
                self.tenant(metadata.get(HEADER))
            except Unauthenticated:
                return False
            return True

        return Guard(admits, "the call needs an API key: 'authorization: Bearer KEY'")

    def add_port(self, server: grpc.aio.Server, address: str) -> int:
        """Have a gRPC server listen at host:port; returns the port. RuntimeError if it cannot."""
        if self.tls is None:
            return int(server.add_insecure_port(address))
        key, certificate = Path(self.tls.key).read_bytes(), Path(self.tls.certificate).read_bytes()
        ca = None if self.tls.ca is None else Path(self.tls.ca).read_bytes()
        credentials = grpc.ssl_server_credentials(
            ((key, certificate),), root_certificates=ca, require_client_auth=ca is not None
        )
        return int(server.add_secure_port(address, credentials))


def parse_keys(text: str) -> Digests:
    """`TENANT KEY` pairs, one a line or separated by commas; `#` begins a comment. InvalidRequest names the line."""
    found: dict[bytes, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        for pair in filter(str.strip, line.partition("#")[0].split(",")):
            digest, tenant = _read_pair(pair, field=f"api_keys[{number}]")
            if found.setdefault(digest, tenant) != tenant:
                raise InvalidRequest(f"api_keys[{number}]", f"the key of {tenant!r} is another tenant's too")
    return tuple(found.items())


def _read_pair(pair: str, *, field: str) -> tuple[bytes, str]:
    words = pair.split()
    if len(words) != 2:
        raise InvalidRequest(field, "must be 'TENANT KEY'")
    tenant, key = words
    if len(tenant) > MAX_TENANT_CHARS:
        raise InvalidRequest(field, f"the tenant's name may have {MAX_TENANT_CHARS} characters")
    if len(key) < MIN_KEY_CHARS or not key.isascii():
        raise InvalidRequest(field, f"the key must have {MIN_KEY_CHARS} or more ASCII characters")
    return digest_of(key), tenant
