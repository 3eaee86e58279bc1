"""Short ways to ask a running system."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import Self

from duopool.cluster.admin_access import admin_stub
from duopool.cluster.completions import Completion, complete_all
from duopool.proto import inference_pb2 as pb

TIMEOUT_S = 120.0
REST_TIMEOUT_S = 20.0


def greedy_request(prompt: Sequence[int], *, max_tokens: int, salt: bytes = b"") -> pb.GenerateRequest:
    sampling = pb.SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling, cache_salt=salt)


def complete(address: str, requests: Sequence[pb.GenerateRequest]) -> list[Completion]:
    """All at once; every one must finish."""
    records = asyncio.run(asyncio.wait_for(complete_all(address, requests), TIMEOUT_S))
    assert [record.error for record in records] == [None] * len(records)
    assert all(record.finished is not None for record in records)
    return records


def state(address: str) -> pb.ClusterStateResponse:
    with admin_stub(address) as admin:
        return admin.ClusterState(pb.ClusterStateRequest(), timeout=10)


def scale(address: str, **pools: int) -> None:
    with admin_stub(address) as admin:
        admin.Scale(pb.ScaleRequest(pools=pools), timeout=30)


def wait_for(address: str, is_so: Callable[[pb.ClusterStateResponse], bool]) -> pb.ClusterStateResponse:
    """The first state of which this is so."""
    deadline = time.monotonic() + TIMEOUT_S
    while not is_so(now := state(address)):
        assert time.monotonic() < deadline, f"it did not happen: {now}"
        time.sleep(0.1)
    return now


def has_workers(wanted: set[str]) -> Callable[[pb.ClusterStateResponse], bool]:
    """True of a state with exactly these workers, all ready."""
    return lambda now: {worker.worker_id: worker.state for worker in now.workers} == dict.fromkeys(wanted, "ready")


def is_at_rest(now: pb.ClusterStateResponse) -> bool:
    """No worker holds anything but its cache."""
    return now.requests == 0 and all(
        worker.running == worker.waiting == worker.leases == 0
        and worker.free_blocks + worker.cached_blocks == worker.blocks
        for worker in now.workers
    )


def audit(address: str, *, at_rest: bool = False) -> pb.AuditResponse:
    with admin_stub(address) as admin:
        return admin.Audit(pb.AuditRequest(at_rest=at_rest), timeout=10)


def wait_for_rest(address: str) -> None:
    """Until an audit finds nothing wrong and nothing held."""
    deadline = time.monotonic() + REST_TIMEOUT_S
    while findings := audit(address, at_rest=True).findings:
        assert time.monotonic() < deadline, f"the audit still finds {findings}"
        time.sleep(0.1)


class Load:
    """Sends the same prompts at once, over and over, each turn without a cache; keeps what went wrong."""

    def __init__(self, address: str, prompts: list[tuple[int, ...]], expected: list[tuple[int, ...]]) -> None:
        self.wrong: list[str] = []
        self._served_by: set[str] = set()
        self._address = address
        self._asked = list(zip(prompts, expected, strict=True))
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def wait_until_served_by(self, workers: set[str]) -> None:
        """Until each of these had a part in some request."""
        deadline = time.monotonic() + TIMEOUT_S
        while not workers <= self._served_by:
            assert self.wrong == []
            assert time.monotonic() < deadline, f"only {self._served_by} served"
            time.sleep(0.1)

    def _run(self) -> None:
        turn = 0
        while not self._is_over.is_set() and not self.wrong:
            turn += 1
            requests = [
                greedy_request(prompt, max_tokens=len(tokens), salt=b"load %d" % turn) for prompt, tokens in self._asked
            ]
            for record, (_, tokens) in zip(
                asyncio.run(complete_all(self._address, requests)), self._asked, strict=True
            ):
                if record.finished is None or tuple(record.token_ids) != tokens:
                    self.wrong.append(f"turn {turn}: {record.error or record.token_ids}")
                    continue
                self._served_by |= {record.finished.prefill_worker, record.finished.decode_worker}
