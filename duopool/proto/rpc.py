"""gRPC methods from a service's descriptor: requests parsed by us, errors answered with details.

Owns the two things every public method shares. Parsing happens here and not in gRPC, which answers INTERNAL to a
request that is not valid protobuf; a client that sends invalid UTF-8 gets INVALID_ARGUMENT naming the field instead.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.descriptor import Descriptor, MethodDescriptor, ServiceDescriptor

from duopool.core.errors import DuopoolError
from duopool.proto.public_codec import parse_request
from duopool.proto.status import grpc_status

log = logging.getLogger(__name__)

Unary = Callable[[Any, Any], Awaitable[Any]]


def service_handler(service: ServiceDescriptor, implementation: object) -> grpc.GenericRpcHandler:
    """Handlers for the methods of `service`, taken by name from `implementation`; the others are UNIMPLEMENTED.

    A unary method is `async (request, context) -> response`; a streaming one writes to the context and returns None.
    """
    handlers = {
        method.name: _handler(method, getattr(implementation, method.name))
        for method in service.methods
        if hasattr(implementation, method.name)
    }
    return grpc.method_handlers_generic_handler(service.full_name, handlers)


def _handler(method: MethodDescriptor, behaviour: Unary) -> grpc.RpcMethodHandler:
    make = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
    return make(
        _guarded(method.input_type, behaviour),
        request_deserializer=None,
        response_serializer=lambda response: response.SerializeToString(),
    )


def _guarded(kind: Descriptor, behaviour: Unary) -> Unary:
    async def call(data: bytes, context: Any) -> Any:
        try:
            return await behaviour(parse_request(data, kind), context)
        except DuopoolError as error:
            await _refuse(context, error)
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except grpc.aio.InternalError as failure:
            raise asyncio.CancelledError("the connection broke under a write") from failure
        except Exception:
            log.exception("a call failed in a way that nobody planned for")
            await _refuse(context, DuopoolError("internal error; the server's log has more"))

    return call


async def _refuse(context: Any, error: DuopoolError) -> None:
    try:
        await context.abort_with_status(grpc_status(error))
    except grpc.aio.InternalError as failure:
        raise asyncio.CancelledError("nobody is there to be told") from failure
