"""The KV source on a gRPC server: Describe, Read and Validate as plain byte methods.

A Read answers with one message per page, the page's bytes and nothing else, in the order that was asked for; the
layout's digest goes ahead in the initial metadata. A refusal is FAILED_PRECONDITION with the reason, never data.
"""

from __future__ import annotations

import msgspec
from grpc import (
    GenericRpcHandler,
    StatusCode,
    aio,
    method_handlers_generic_handler,
    unary_stream_rpc_method_handler,
    unary_unary_rpc_method_handler,
)

from duopool.core.types import Incarnation
from duopool.engine.transfer.page_store import PageStore
from duopool.engine.transfer.source import KvSource, RemoteReadable
from duopool.engine.transfer.transport import LeaseKeeper
from duopool.proto import codec

LAYOUT_METADATA_KEY = "duopool-layout"


def add_kv_source(
    server: aio.Server,
    *,
    keeper: LeaseKeeper,
    store: PageStore,
    incarnation: Incarnation,
    nixl: RemoteReadable | None = None,
) -> None:
    """Serve the pages of `store` on `server`, before it is started.

    The server should carry `codec.INTERNAL_SERVER_OPTIONS`: a page may be larger than gRPC's default message.
    """
    source = KvSource(keeper=keeper, store=store, incarnation=incarnation, nixl=nixl)
    server.add_generic_rpc_handlers((_handlers(source),))


def _handlers(source: KvSource) -> GenericRpcHandler:
    async def describe(request: bytes, context: aio.ServicerContext) -> bytes:
        try:
            asked = codec.decode_describe(request)
        except msgspec.DecodeError as error:
            await context.abort(StatusCode.INVALID_ARGUMENT, str(error))
        return codec.encode(source.describe(asked.transport))

    async def validate(request: bytes, context: aio.ServicerContext) -> bytes:
        try:
            asked = codec.decode_validate(request)
        except msgspec.DecodeError as error:
            await context.abort(StatusCode.INVALID_ARGUMENT, str(error))
        return codec.encode(source.validate(asked))

    async def read(request: bytes, context: aio.ServicerContext) -> None:
        # A coroutine that writes, not an async generator: its `finally` runs at once when the client goes away.
        try:
            asked = codec.decode_read(request)
        except msgspec.DecodeError as error:
            await context.abort(StatusCode.INVALID_ARGUMENT, str(error))
        refusal = source.begin_read(asked)
        if refusal:
            await context.abort(StatusCode.FAILED_PRECONDITION, refusal)
        try:
            await context.send_initial_metadata(((LAYOUT_METADATA_KEY, source.store.digest),))
            for block in asked.blocks:
                await context.write(bytes(source.store.page(block.block_id)))
        finally:
            source.end_read(asked.lease_id)

    methods = {
        codec.DESCRIBE_METHOD: unary_unary_rpc_method_handler(describe),
        codec.READ_METHOD: unary_stream_rpc_method_handler(read),
        codec.VALIDATE_METHOD: unary_unary_rpc_method_handler(validate),
    }
    return method_handlers_generic_handler(
        codec.KV_SOURCE_SERVICE, {path.rpartition("/")[2]: handler for path, handler in methods.items()}
    )
