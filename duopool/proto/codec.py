"""The internal wire: messages of `core/messages.py` as msgpack, checked against their types on arrival.

Owns the names of the internal methods too. The public wire (protobuf) is translated in `public_codec.py`. A message
that does not fit its type raises `msgspec.DecodeError`; the call is answered INVALID_ARGUMENT and nothing reaches a
worker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import msgspec

from duopool.core.messages import (
    CommandBatch,
    DescribeSource,
    ReadBlocks,
    SourceDescription,
    StepReport,
    Validate,
    Verdict,
)

WORKER_SERVICE = "duopool.internal.v1.Worker"
SESSION_METHOD = f"/{WORKER_SERVICE}/Session"
KV_SOURCE_SERVICE = "duopool.internal.v1.KvSource"
DESCRIBE_METHOD = f"/{KV_SOURCE_SERVICE}/Describe"
READ_METHOD = f"/{KV_SOURCE_SERVICE}/Read"
VALIDATE_METHOD = f"/{KV_SOURCE_SERVICE}/Validate"

MAX_INTERNAL_MESSAGE_BYTES = 256 << 20
"""What a worker may say at once: a page, or all that it has cached."""
MAX_COMMANDS_BYTES = 16 << 20
"""What a worker takes at once: reading it holds the process up. Prompts of three million tokens fit."""
_BOTH_ENDS = (
    ("grpc.max_send_message_length", MAX_INTERNAL_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),
    ("grpc.use_local_subchannel_pool", 1),
)
INTERNAL_CHANNEL_OPTIONS = (("grpc.max_receive_message_length", MAX_INTERNAL_MESSAGE_BYTES), *_BOTH_ENDS)
REFUSE_AT_ONCE = ("grpc.http.tarpit", 0)
"""Option of every server. By default gRPC keeps who sends too large a message waiting for 0.1 to 1 s."""
INTERNAL_SERVER_OPTIONS = (("grpc.max_receive_message_length", MAX_COMMANDS_BYTES), REFUSE_AT_ONCE, *_BOTH_ENDS)
"""A larger message is refused with RESOURCE_EXHAUSTED, unread."""

T = TypeVar("T")


def decoder(kind: type[T]) -> Callable[[bytes], T]:
    """Reads messages of one type; raises msgspec.DecodeError for everything that is none."""
    decode = msgspec.msgpack.Decoder(kind).decode

    def checked(data: bytes) -> T:
        try:
            return decode(data)
        except (UnicodeDecodeError, RecursionError) as error:
            raise msgspec.DecodeError(str(error)) from error

    return checked


encode = msgspec.msgpack.Encoder().encode
decode_commands = decoder(CommandBatch)
decode_report = decoder(StepReport)
decode_describe = decoder(DescribeSource)
decode_description = decoder(SourceDescription)
decode_read = decoder(ReadBlocks)
decode_validate = decoder(Validate)
decode_verdict = decoder(Verdict)


def encode_commands(batch: CommandBatch, *, max_bytes: int = MAX_COMMANDS_BYTES) -> Iterator[bytes]:
    """The batch in as many messages as it takes for each to be read; one command is never cut."""
    data = encode(batch)
    if len(data) <= max_bytes or len(batch.commands) == 1:
        yield data
        return
    middle = len(batch.commands) // 2
    for part in (batch.commands[:middle], batch.commands[middle:]):
        yield from encode_commands(CommandBatch(commands=part), max_bytes=max_bytes)
