"""The system under test: a router process and a process with two workers, supervised from here."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

import msgspec

from duopool.cluster.membership import ClusterView
from duopool.cluster.router_link import RouterLink
from duopool.core.config import InternalConfig
from duopool.core.errors import Unavailable
from duopool.core.messages import WorkerInfo
from duopool.core.types import Role
from duopool.proto import control_pb2, inference_pb2_grpc
from duopool.proto import inference_pb2 as pb
from duopool.proto.control_codec import result_of
from duopool.proto.internal_access import CREDENTIAL_VARIABLE, InternalAccess

START_TIMEOUT_S = 120.0
REST_TIMEOUT_S = 30.0
ROOT = Path(__file__).resolve().parents[2]


class Target:
    """Starts on entry; `check` proves that it lives and holds nothing."""

    def __init__(self, model: Path) -> None:
        self._model = model
        self._processes: list[subprocess.Popen[str]] = []
        self._credential = secrets.token_urlsafe(32)
        self.access = InternalAccess.load(InternalConfig(), {CREDENTIAL_VARIABLE: self._credential})

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._kill()
            raise
        return self

    def _start(self) -> None:
        environment = {
            **os.environ,
            CREDENTIAL_VARIABLE: self._credential,
            "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))),
            "GRPC_VERBOSITY": "NONE",
        }
        router = {"port": 0, "http_port": 0, "model": {"model": str(self._model), "served_model_name": "tiny"}}
        self.workers_process = self._spawn(environment, "tests.fuzz.workers", str(self._model))
        self.router_process = self._spawn(environment, "duopool.router.main", "--config", json.dumps(router))
        ports = json.loads(self._line(self.router_process))
        self.address = f"127.0.0.1:{ports['port']}"
        self.http_port = int(ports["http_port"])
        self.internal_address = f"127.0.0.1:{ports['internal_port']}"
        infos = msgspec.json.decode(self._line(self.workers_process), type=tuple[WorkerInfo, ...])
        self.workers = {info.role: info for info in infos}
        view = ClusterView(members=infos, wanted={Role.PREFILL: 1, Role.DECODE: 1})
        self._link = RouterLink(self.internal_address, view, access=self.access, on_command=self._refuse)
        self._channel = self.access.channel(self.internal_address)
        self._admin = self.access.stub(inference_pb2_grpc.AdminStub, self._channel)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not all(pool.ready for pool in self.state().pools):
            assert time.monotonic() < deadline, "the router does not find its workers"
            time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        self._link.close()
        self._channel.close()
        self._kill()

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    @property
    def exits(self) -> int:
        """Processes that have ended."""
        return sum(process.poll() is not None for process in (self.router_process, self.workers_process))

    def state(self) -> pb.ClusterStateResponse:
        answer: pb.ClusterStateResponse = self._admin.ClusterState(
            pb.ClusterStateRequest(), timeout=START_TIMEOUT_S, wait_for_ready=True
        )
        return answer

    def come_to_rest(self) -> list[str]:
        """What audits still find when everything should be over, then what the workers' own checks say."""
        deadline = time.monotonic() + REST_TIMEOUT_S
        while findings := list(self._admin.Audit(pb.AuditRequest(at_rest=True), timeout=10).findings):
            if time.monotonic() > deadline:
                return [str(finding) for finding in findings]
            time.sleep(0.1)
        assert self.workers_process.stdin is not None
        self.workers_process.stdin.close()
        status = self.workers_process.wait(timeout=REST_TIMEOUT_S)
        return [] if status == 0 else [f"the workers' process ended with {status}"]

    def _refuse(self, command: control_pb2.ClusterCommand) -> None:
        self._link.answer(result_of(command.command_id, Unavailable("nothing is scaled here")))

    def _spawn(self, environment: dict[str, str], module: str, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        self._processes.append(process)
        return process

    @staticmethod
    def _line(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"a process ended at its start with {process.wait()}"
        return line
