"""What a prefill worker gives the gateway for the decode worker: JSON to the gateway, sealed blocks to us.

It names an address that the decode worker will call with the cluster's credential, and pages that will be taken for
this very prompt: so it is authenticated with that credential and bound to the prompt.
"""

from __future__ import annotations

import hmac
import json
from base64 import b64decode, b64encode
from collections.abc import Sequence
from hashlib import blake2b

import msgspec

from duopool.core.errors import InvalidRequest
from duopool.core.messages import LeaseRef, SealedBlock, Tokens

FIELD = "kv_transfer_params_json"
_CONTEXT = b"duopool smg handle"


class Handle(msgspec.Struct, frozen=True, kw_only=True):
    """A prefilled prompt on its way to a decode worker. Its blocks are leased to attempt 1."""

    prompt_digest: bytes
    """Of the model too."""
    lease: LeaseRef
    blocks: tuple[SealedBlock, ...]
    first_token: Tokens
    """Without regard to the client's stop tokens, which the gateway keeps from the prefill worker."""
    seed: int
    """The request's, drawn by the prefill worker if the client named none."""
    num_cached_tokens: int


class HandleSeal:
    """Makes and reads handles for one model of one cluster."""

    def __init__(self, credential: str, *, model_digest: str) -> None:
        self._key = credential.encode()
        self._model_digest = model_digest

    def digest_of(self, prompt_token_ids: Sequence[int]) -> bytes:
        """Names a prompt of this model."""
        text = ",".join(map(str, (self._model_digest, *prompt_token_ids)))
        return blake2b(text.encode(), digest_size=16).digest()

    def to_json(self, handle: Handle) -> str:
        """As the gateway carries it."""
        data = msgspec.msgpack.encode(handle)
        return json.dumps(
            {
                "do_remote_prefill": True,
                "do_remote_decode": False,
                "remote_engine_id": handle.lease.worker_id,
                "duopool_handle": b64encode(data).decode(),
                "duopool_seal": self._seal(data),
            }
        )

    def from_json(self, text: str, prompt_token_ids: Sequence[int]) -> Handle | None:
        """The handle for this prompt; None if the parameters carry none. Raises InvalidRequest."""
        try:
            params = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(FIELD, "must be JSON") from error
        if not isinstance(params, dict):
            raise InvalidRequest(FIELD, "must be a JSON object")
        if "duopool_handle" not in params:
            return None
        try:
            data = b64decode(str(params["duopool_handle"]), validate=True)
        except ValueError as error:
            raise InvalidRequest(FIELD, "is damaged") from error
        if not hmac.compare_digest(self._seal(data).encode(), str(params.get("duopool_seal")).encode()):
            raise InvalidRequest(FIELD, "was not made by a prefill worker of this cluster")
        try:
            handle = msgspec.msgpack.decode(data, type=Handle)
        except msgspec.DecodeError as error:
            raise InvalidRequest(FIELD, "is of another version") from error
        if handle.prompt_digest != self.digest_of(prompt_token_ids):
            raise InvalidRequest(FIELD, "belongs to another prompt or model")
        return handle

    def _seal(self, data: bytes) -> str:
        return hmac.new(self._key, _CONTEXT + data, "sha256").hexdigest()
