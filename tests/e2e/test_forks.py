"""Clusters of tests start their nodes by forks of the test process, which has gRPC calls under way."""

from __future__ import annotations

import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest


def test_a_fork_beside_calls_runs_nothing_of_grpc(capfd: pytest.CaptureFixture[str]) -> None:
    """What gRPC has a child do crashes now and then, and says so in the parent whenever it must leave it out."""
    is_over = threading.Event()

    def answer(request: bytes, _: Any) -> bytes:
        is_over.wait(timeout=30)
        return request

    server = grpc.server(ThreadPoolExecutor(1))
    handlers = grpc.method_handlers_generic_handler("test", {"Wait": grpc.unary_unary_rpc_method_handler(answer)})
    server.add_generic_rpc_handlers((handlers,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, ThreadPoolExecutor(1) as caller:
        call = caller.submit(channel.unary_unary("/test/Wait"), b"?")
        try:
            for _ in range(20):
                subprocess.run(["true"], preexec_fn=threading.get_ident, check=True, timeout=30)
        finally:
            is_over.set()
        assert call.result() == b"?"
    server.stop(None).wait()
    assert "fork" not in capfd.readouterr().err
