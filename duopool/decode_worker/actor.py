"""The Ray shell of a decode worker: no decisions, no state of its own. Tokens and blocks never pass through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import msgspec
import ray

from duopool.core.config import WorkerConfig
from duopool.core.messages import WorkerInfo
from duopool.engine.nursed_process import NursedProcess

Method = TypeVar("Method", bound=Callable[..., Any])


def _control(method: Method) -> Method:
    """Calls in this group are answered while `start` runs."""
    return cast("Method", ray.method(concurrency_group="control")(method))


@ray.remote(concurrency_groups={"control": 4})
class DecodeActor:
    """Hosts one decode worker after another."""

    def __init__(self, config: WorkerConfig) -> None:
        host = ray.util.get_node_ip_address() if config.host == "auto" else config.host
        self._process = NursedProcess(config.model_copy(update={"host": host}), "duopool.decode_worker.process")

    def start(self) -> WorkerInfo:
        """Start a worker, or another one after it has died; returns the registration once it serves."""
        return msgspec.structs.replace(self._process.start(), node_id=ray.get_runtime_context().get_node_id())

    @_control
    def info(self) -> WorkerInfo | None:
        return self._process.info()

    @_control
    def drain(self) -> None:
        """Take nothing new."""
        self._process.drain()

    @_control
    def is_idle(self) -> bool:
        return self._process.is_idle()

    @_control
    def check(self) -> None:
        """Raise AssertionError if an invariant is broken."""
        self._process.check()
