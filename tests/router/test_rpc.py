"""What a call's end looks like to gRPC."""

from __future__ import annotations

import asyncio
import logging

import grpc
import pytest

from duopool.core.errors import DeadlineMissed
from duopool.proto import inference_pb2 as pb
from duopool.proto.rpc import service_handler

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"]


class Late:
    """Every method fails."""

    async def _fail(self, request: object, context: object) -> None:
        raise DeadlineMissed("too late")

    Generate = Tokenize = Detokenize = ListModels = _fail


class Broken:
    """Every method finds that its client is gone."""

    async def _fail(self, request: object, context: object) -> None:
        raise grpc.aio.InternalError("Failed execute_batch")

    Generate = Tokenize = Detokenize = ListModels = _fail


class Gone:
    """A context whose connection has broken."""

    async def abort_with_status(self, status: object) -> None:
        raise grpc.aio.InternalError("Failed execute_batch")


class Details:
    method = f"/{SERVICE.full_name}/Generate"
    invocation_metadata = ()


@pytest.mark.parametrize("methods", [Late(), Broken()])
def test_a_client_that_vanished_is_no_failure_of_ours(methods: object, caplog: pytest.LogCaptureFixture) -> None:
    handler = service_handler(SERVICE, methods).service(Details())
    assert handler is not None
    with caplog.at_level(logging.INFO), pytest.raises(asyncio.CancelledError):
        asyncio.run(handler.unary_stream(b"", Gone()))
    assert caplog.records == []
