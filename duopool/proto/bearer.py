"""Secrets in call metadata: `authorization: Bearer SECRET`, as OpenAI's API and gRPC's own credentials have it.

Owns the header, the comparison in constant time and the guard in front of a server's methods. Which secrets there are
is `internal_access.py`'s and `router/public_access.py`'s.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from hashlib import sha256
from typing import Any

import grpc

from duopool.core.errors import Unauthenticated
from duopool.proto.status import grpc_status

HEADER = "authorization"
_SCHEME = "bearer "

Metadata = tuple[tuple[str, str], ...]


def bearer(secret: str) -> Metadata:
    """What a caller shows; nothing for an empty secret."""
    return ((HEADER, f"Bearer {secret}"),) if secret else ()


def shown_secret(header: object) -> str:
    """The secret in the value of an `authorization` header; empty if there is none."""
    if not isinstance(header, str) or header[: len(_SCHEME)].lower() != _SCHEME:
        return ""
    return header[len(_SCHEME) :].strip()


def find_secret(shown: str, digests: Iterable[tuple[bytes, str]]) -> str | None:
    """The name beside the digest of `shown`. Looks at every digest, whichever fits: time tells nothing."""
    digest = digest_of(shown)
    found = None
    for known, name in digests:
        if hmac.compare_digest(known, digest):
            found = name
    return found


def digest_of(secret: str) -> bytes:
    """What is kept of a secret that only has to be recognised."""
    return sha256(secret.encode(errors="surrogateescape")).digest()


class ShownStub:
    """A stub whose methods carry metadata."""

    def __init__(self, stub: Any, metadata: Metadata) -> None:
        self._stub = stub
        self._metadata = metadata

    def __getattr__(self, name: str) -> Any:
        return partial(getattr(self._stub, name), metadata=self._metadata)


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses a call with UNAUTHENTICATED, before any message of it is read, unless `admits` its method and metadata.

    An unknown method is refused like all others.
    """

    def __init__(self, admits: Callable[[str, Mapping[str, Any]], bool], refusal: str) -> None:
        self._admits = admits
        status = grpc_status(Unauthenticated(refusal))

        async def refuse(requests: Any, context: Any) -> None:
            await context.abort_with_status(status)

        # As a handler of streams it answers calls of every kind.
        self._refuse = grpc.stream_stream_rpc_method_handler(refuse)

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        if self._admits(details.method, dict(details.invocation_metadata or ())):
            return await continuation(details)
        return self._refuse
