"""Errors as google.rpc.Status, both ways: one table from error class to code, and the details that go with each.

INVALID_ARGUMENT carries BadRequest with the field, RESOURCE_EXHAUSTED RetryInfo with the delay, and every error carries
ErrorInfo with a reason in capitals.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import grpc
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message as Proto
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from duopool.core.errors import (
    DeadlineMissed,
    DuopoolError,
    InvalidRequest,
    ModelNotFound,
    OutOfBlocks,
    Overloaded,
    PromptTooLong,
    SlowReader,
    TransferFailed,
    Unauthenticated,
    Unavailable,
    UnsupportedModel,
    WorkerLost,
    WorkerNotFound,
)

DOMAIN = "duopool"
DEFAULT_RETRY_S = 1.0

CODES: dict[type[DuopoolError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    PromptTooLong: grpc.StatusCode.INVALID_ARGUMENT,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    ModelNotFound: grpc.StatusCode.NOT_FOUND,
    WorkerNotFound: grpc.StatusCode.NOT_FOUND,
    UnsupportedModel: grpc.StatusCode.FAILED_PRECONDITION,
    OutOfBlocks: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    SlowReader: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeadlineMissed: grpc.StatusCode.DEADLINE_EXCEEDED,
    WorkerLost: grpc.StatusCode.UNAVAILABLE,
    TransferFailed: grpc.StatusCode.UNAVAILABLE,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    DuopoolError: grpc.StatusCode.INTERNAL,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusDetails:
    """What a client can know of a failed call."""

    code: grpc.StatusCode
    message: str
    field: str | None = None
    """The request field that was refused."""
    retry_after_s: float | None = None
    reason: str | None = None
    """Name of the error class, such as WORKER_LOST."""


def code_of(error: DuopoolError) -> grpc.StatusCode:
    """The code of the nearest class in the table."""
    return next(CODES[kind] for kind in type(error).__mro__ if kind in CODES)


def grpc_status(error: DuopoolError) -> grpc.Status:
    """What `context.abort_with_status` takes."""
    code = code_of(error)
    number: int = code.value[0]
    details = [*(_packed(detail) for detail in _details(error, code)), _packed_info(reason_of(type(error)))]
    status = status_pb2.Status(code=number, message=str(error), details=details)
    return rpc_status.to_status(status)


def read_status(error: grpc.RpcError) -> StatusDetails:
    """What the server said, from the error that a sync or async gRPC client raised."""
    packed = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin")
    return read_trailers(error.code(), error.details() or "", packed)


def read_trailers(code: grpc.StatusCode, message: str, packed: bytes | None) -> StatusDetails:
    """The same from its parts; `packed` is a google.rpc.Status."""
    field = retry_after_s = reason = None
    if packed is not None:
        for detail in status_pb2.Status.FromString(packed).details:
            bad_request = error_details_pb2.BadRequest()
            retry = error_details_pb2.RetryInfo()
            info = error_details_pb2.ErrorInfo()
            if detail.Unpack(bad_request):
                field = bad_request.field_violations[0].field
            elif detail.Unpack(retry):
                retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
            elif detail.Unpack(info):
                reason = info.reason
    return StatusDetails(code=code, message=message, field=field, retry_after_s=retry_after_s, reason=reason)


def _details(error: DuopoolError, code: grpc.StatusCode) -> list[Proto]:
    """Those of this one error, besides what its class says."""
    if isinstance(error, InvalidRequest):
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        return [error_details_pb2.BadRequest(field_violations=[violation])]
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        delay = Duration()
        delay.FromNanoseconds(int(getattr(error, "retry_after_s", DEFAULT_RETRY_S) * 1e9))
        return [error_details_pb2.RetryInfo(retry_delay=delay)]
    return []


def reason_of(kind: type[DuopoolError]) -> str:
    """Name of an error class on the wire, such as WORKER_LOST."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).upper()


@cache
def _packed_info(reason: str) -> any_pb2.Any:
    return _packed(error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN))


def _packed(message: Proto) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
