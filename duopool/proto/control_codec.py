"""The control wire: members and the ends of commands, to and from core values."""

from __future__ import annotations

import msgspec

from duopool.core.errors import DuopoolError, InvalidRequest, Unavailable, WorkerNotFound
from duopool.core.messages import WorkerInfo
from duopool.proto import control_pb2
from duopool.proto.codec import decoder
from duopool.proto.status import reason_of

_decode_info = decoder(WorkerInfo)


def read_members(update: control_pb2.ClusterUpdate) -> list[WorkerInfo]:
    """The membership of an update; InvalidRequest names the member that cannot be read."""
    members = []
    for place, member in enumerate(update.members):
        try:
            members.append(_decode_info(member.info))
        except msgspec.DecodeError as error:
            raise InvalidRequest(f"members[{place}].info", str(error)) from error
    return members


def result_of(command_id: int, error: DuopoolError | None) -> control_pb2.CommandResult:
    """How a command ended, as the supervisor says it."""
    if error is None:
        return control_pb2.CommandResult(command_id=command_id)
    field, text = (error.field, error.message) if isinstance(error, InvalidRequest) else ("", str(error))
    return control_pb2.CommandResult(command_id=command_id, error=text, reason=reason_of(type(error)), field=field)


def error_of(result: control_pb2.CommandResult) -> DuopoolError:
    """What the operator is told of a command that failed: his mistake by its name, all else as Unavailable."""
    match result.reason:
        case "INVALID_REQUEST":
            return InvalidRequest(result.field, result.error)
        case "WORKER_NOT_FOUND":
            return WorkerNotFound(result.error)
        case _:
            return Unavailable(f"the supervisor did not do it: {result.error}")
