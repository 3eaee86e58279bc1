from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class MemberUpdate(_message.Message):
    __slots__ = ("info",)
    INFO_FIELD_NUMBER: _ClassVar[int]
    info: bytes
    def __init__(self, info: _Optional[bytes] = ...) -> None: ...

class ClusterUpdate(_message.Message):
    __slots__ = ("members", "wanted", "results")
    class WantedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    members: _containers.RepeatedCompositeFieldContainer[MemberUpdate]
    wanted: _containers.ScalarMap[str, int]
    results: _containers.RepeatedCompositeFieldContainer[CommandResult]
    def __init__(self, members: _Optional[_Iterable[_Union[MemberUpdate, _Mapping]]] = ..., wanted: _Optional[_Mapping[str, int]] = ..., results: _Optional[_Iterable[_Union[CommandResult, _Mapping]]] = ...) -> None: ...

class CommandResult(_message.Message):
    __slots__ = ("command_id", "error", "reason", "field")
    COMMAND_ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    command_id: int
    error: str
    reason: str
    field: str
    def __init__(self, command_id: _Optional[int] = ..., error: _Optional[str] = ..., reason: _Optional[str] = ..., field: _Optional[str] = ...) -> None: ...

class ClusterCommand(_message.Message):
    __slots__ = ("command_id", "scale", "drain", "restart")
    COMMAND_ID_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    RESTART_FIELD_NUMBER: _ClassVar[int]
    command_id: int
    scale: ScalePools
    drain: DrainWorker
    restart: RestartWorkers
    def __init__(self, command_id: _Optional[int] = ..., scale: _Optional[_Union[ScalePools, _Mapping]] = ..., drain: _Optional[_Union[DrainWorker, _Mapping]] = ..., restart: _Optional[_Union[RestartWorkers, _Mapping]] = ...) -> None: ...

class ScalePools(_message.Message):
    __slots__ = ("pools",)
    class PoolsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    POOLS_FIELD_NUMBER: _ClassVar[int]
    pools: _containers.ScalarMap[str, int]
    def __init__(self, pools: _Optional[_Mapping[str, int]] = ...) -> None: ...

class DrainWorker(_message.Message):
    __slots__ = ("worker_id", "incarnation")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: int
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[int] = ...) -> None: ...

class RestartWorkers(_message.Message):
    __slots__ = ("drain_first",)
    DRAIN_FIRST_FIELD_NUMBER: _ClassVar[int]
    drain_first: bool
    def __init__(self, drain_first: _Optional[bool] = ...) -> None: ...
