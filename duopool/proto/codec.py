"""The internal wire: messages of `core/messages.py` as msgpack, checked against their types on arrival.

Owns the names of the internal methods too. The public wire (protobuf) is translated in `public_codec.py`. A message
that does not fit its type raises `msgspec.ValidationError`; gRPC answers such a call with INTERNAL and nothing reaches
a worker.
"""

from __future__ import annotations

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
INTERNAL_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_INTERNAL_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_INTERNAL_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),
    ("grpc.use_local_subchannel_pool", 1),
)

encode = msgspec.msgpack.Encoder().encode
decode_commands = msgspec.msgpack.Decoder(CommandBatch).decode
decode_report = msgspec.msgpack.Decoder(StepReport).decode
decode_describe = msgspec.msgpack.Decoder(DescribeSource).decode
decode_description = msgspec.msgpack.Decoder(SourceDescription).decode
decode_read = msgspec.msgpack.Decoder(ReadBlocks).decode
decode_validate = msgspec.msgpack.Decoder(Validate).decode
decode_verdict = msgspec.msgpack.Decoder(Verdict).decode
