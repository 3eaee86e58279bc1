"""What a call's end looks like to gRPC."""

from __future__ import annotations

import asyncio
import logging

import pytest

from duopool.core.errors import DeadlineMissed
from duopool.proto import inference_pb2 as pb
from duopool.router.rpc import service_handler

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"]


class Late:
    """Every method fails."""

    async def _fail(self, request: object, context: object) -> None:
        raise DeadlineMissed("too late")

    Generate = Tokenize = Detokenize = ListModels = _fail


class Gone:
    """A context whose connection has broken."""

    async def abort_with_status(self, status: object) -> None:
        raise RuntimeError("Failed execute_batch")


class Details:
    method = f"/{SERVICE.full_name}/Generate"
    invocation_metadata = ()


def test_a_client_that_vanished_before_its_error_is_no_failure_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    handler = service_handler(SERVICE, Late()).service(Details())
    assert handler is not None
    with caplog.at_level(logging.INFO), pytest.raises(asyncio.CancelledError):
        asyncio.run(handler.unary_stream(b"", Gone()))
    assert caplog.records == []
