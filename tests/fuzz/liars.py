"""Workers that lie: to the router about requests of their own and of others, to decode workers about their pages.

Router and readers are production; a liar is a fake worker whose reports are mutated, forged or no reports at all, and a
KV source that sends what it likes. What is told a liar may be lost; everybody else must not notice.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import grpc

sys.path += [str(Path(__file__).parents[1] / "router")]

from router_fakes import NUM_BLOCKS, FakeCluster, FakeWorker, eventually, expected_output

from duopool.core.ledger import BlockLedger, Holder, Owner, WorkerLedger
from duopool.core.messages import (
    Accepted,
    BlocksReady,
    Copied,
    Event,
    Joined,
    KvChanged,
    KvSnapshot,
    KvStoredSegment,
    LeaseRef,
    LedgerReport,
    Nack,
    NackReason,
    Prefill,
    Reserve,
    Reserved,
    SealedBlock,
    StepReport,
    Tokens,
    WorkerLoad,
)
from duopool.core.types import BlockId, BlockKey, FinishReason, Incarnation, LeaseId, RequestId, WorkerId
from duopool.proto import codec
from duopool.proto import inference_pb2 as pb
from duopool.proto.status import read_status

from .garbage import EDGES, FLOATS, TEXTS, mutated_bytes, mutated_message, raw_bytes

NUM_AT_ONCE = 8
AUDIT_EVERY = 64
NUM_TOKENS = 12
DEADLINE_S = 5.0
"""Who is served by a liar that simply keeps silent is ended by this: it cannot be told from a slow worker."""
ENDING_S = 20.0
"""A request that has not ended by then hangs."""
TYPED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.INVALID_ARGUMENT)
"""How a request that is lost to a liar may end; INTERNAL too, if the liar says that the request broke its step."""


@dataclass(slots=True)
class Lies:
    """What came of one run."""

    codes: Counter[str] = field(default_factory=Counter)
    num_lies: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        return not self.wrong

    def __str__(self) -> str:
        codes = ", ".join(f"{code} {count}" for code, count in self.codes.most_common())
        return "\n".join((f"{self.num_lies} lies: {len(self.wrong)} things wrong; requests: {codes}", *self.wrong[:12]))


class Liar(FakeWorker):
    """Lies in a share of its reports; honest again once `rate` is 0."""

    def __init__(self, worker_id: str, role: str, random: Random, neighbours: Sequence[FakeWorker]) -> None:
        super().__init__(worker_id, role)
        self.rate = 0.2
        self.num_lies = 0
        self._random = random
        self._neighbours = neighbours

    def encode(self, report: StepReport) -> bytes:
        random = self._random
        if random.random() >= self.rate:
            return super().encode(report)
        self.num_lies += 1
        forged = tuple(self._forge() for _ in range(random.choice((0, 1, 1, 3))))
        match random.randrange(40):
            case 0:
                return raw_bytes(random)
            case 1:
                return mutated_bytes(random, codec.encode(report))
            case 2:
                return mutated_message(random, StepReport(events=(*report.events, *forged)))
            case _:
                return codec.encode(StepReport(events=(*report.events, *forged)))

    def _forge(self) -> Event:
        """Something about a request that is or was here, is a neighbour's, or does not exist."""
        random = self._random
        known = [
            (command.request.request_id, command.attempt)
            for worker in (self, *self._neighbours)
            for command in worker.commands[-20:]
            if isinstance(command, Prefill | Reserve)
        ]
        request_id, attempt = random.choice(known) if known and random.random() < 0.9 else (RequestId("0" * 32), 1)
        about: dict[str, Any] = {"request_id": request_id, "attempt": random.choice((attempt, attempt, attempt + 1, 0))}
        is_absurd = random.random() < 0.1
        number = random.choice(EDGES[:9] if is_absurd else range(NUM_TOKENS + 2))
        seconds = random.choice(FLOATS if is_absurd else (0.0, 0.5))
        token_ids = random.choice(((), (1,), (97, 98), (2**31 - 1,), (-1,) if is_absurd else (98,), tuple(range(300))))
        tokens = Tokens(
            **about,
            index=number,
            token_ids=token_ids,
            finish_reason=random.choice((None, None, FinishReason.STOP, FinishReason.LENGTH)),
            stop_token_id=random.choice((None, 0, number)),
        )
        lease = LeaseRef(
            lease_id=LeaseId(random.choice(EDGES)),
            worker_id=WorkerId(random.choice(TEXTS)),
            incarnation=Incarnation(random.choice(EDGES)),
            source_address=random.choice(TEXTS),
        )
        key = BlockKey(random.randbytes(random.choice((0, 16, 16, 5))))
        events: list[Event] = [
            tokens,
            tokens,
            BlocksReady(
                **about,
                lease=lease,
                first_block=number,
                blocks=(SealedBlock(BlockId(number), number, number),) * random.choice((0, 1, 700)),
                first_token=random.choice((None, tokens)),
                first_tokens=(tokens,) * random.choice((0, 0, 1, 3)),
                queue_s=seconds,
                num_cached_tokens=number,
            ),
            Nack(
                **about,
                reason=random.choice(list(NackReason)),
                detail=random.choice(TEXTS),
                retry_after_s=seconds,
            ),
            Accepted(**about, num_cached_tokens=number),
            Reserved(**about, num_cached_tokens=number),
            Joined(**about, num_pulled_blocks=number, num_pulled_bytes=number, transfer_s=seconds),
            Copied(**about, num_blocks=number),
            KvChanged(sequence=number, stored=(KvStoredSegment(key, (key, key)),), removed=(key,)),
            KvSnapshot(sequence=number, paths=((key,), (key, key))),
            LedgerReport(audit_id=number, ledger=self._ledger(number)),
            WorkerLoad(num_waiting=number, num_free_blocks=number, num_blocks=number, step_s=seconds),
        ]
        return random.choice(events)

    def _ledger(self, number: int) -> WorkerLedger:
        random = self._random
        ids = tuple(BlockId(random.choice((0, 1, number, *EDGES))) for _ in range(random.choice((0, 3))))
        blocks = BlockLedger(
            num_blocks=random.choice((NUM_BLOCKS, number, 2**31 - 1)),
            free=ids,
            cached=ids,
            ref_counts=dict.fromkeys(ids, number),
            tables={RequestId(random.choice(TEXTS)): ids},
            pins=dict.fromkeys(ids, number),
        )
        holder = Holder(
            request_id=RequestId(random.choice(TEXTS)),
            attempt=number,
            phase=random.choice(("waiting", "leased", "ended", "x")),
            table=RequestId(random.choice(TEXTS)),
            owner=random.choice(list(Owner)),
            silent_s=random.choice(FLOATS),
        )
        return WorkerLedger(blocks=blocks, holders=(holder,) * random.choice((0, 1, 3)), fault=random.choice(TEXTS))


class _Errors(logging.Handler):
    """What is logged as an error is a mistake of ours, whatever the liars said."""

    def __init__(self, report: Lies) -> None:
        super().__init__(logging.ERROR)
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        self._report.wrong.append(f"logged: {record.getMessage()}: {error!r}")


def lie_to_router(num_requests: int, seed: int, *, serves: bool) -> Lies:
    """Requests beside liars that only speak of them, or (`serves`) get some of them too."""
    report = Lies()
    errors = _Errors(report)
    logging.getLogger("duopool").addHandler(errors)
    try:
        asyncio.run(_lie_to_router(report, num_requests, Random(seed), serves=serves))
    finally:
        logging.getLogger("duopool").removeHandler(errors)
    return report


async def _lie_to_router(report: Lies, num_requests: int, random: Random, *, serves: bool) -> None:
    honest = [FakeWorker(f"{role}-0", role, step_s=0.002) for role in ("prefill", "decode")]
    liars = [Liar(f"{role}-1", role, random, honest) for role in ("prefill", "decode")]
    async with FakeCluster([*honest, *liars], route_wait_s=10.0) as cluster:
        if not serves:
            for liar in liars:
                liar.draining = True
            cluster.tell_members()
        chatter = asyncio.create_task(_chatter(liars))
        names = {worker.worker_id for worker in honest}
        for start in range(0, num_requests, NUM_AT_ONCE):
            numbers = range(start, min(start + NUM_AT_ONCE, num_requests))
            asks = (_ask(report, cluster, number, names, serves=serves) for number in numbers)
            audits = [_audit(report, cluster)] if start % AUDIT_EVERY == 0 else []
            await asyncio.gather(*audits, *asks)
        chatter.cancel()
        report.num_lies = sum(liar.num_lies for liar in liars)
        for liar in liars:
            liar.rate = 0.0
        await eventually(lambda: cluster.router.pools.num_requests == 0, within_s=ENDING_S)
        await eventually(lambda: cluster.router.pools.num_ready("decode") == 1 + serves, within_s=ENDING_S)
        await _ask(report, cluster, 0, {worker.worker_id for worker in cluster.workers}, serves=False)


async def _chatter(liars: Sequence[Liar]) -> None:
    """Have them speak all the time, not only when they are asked something."""
    while True:
        await asyncio.sleep(0.001)
        for liar in liars:
            liar.say(WorkerLoad())


async def _audit(report: Lies, cluster: FakeCluster) -> None:
    """Whatever ledgers say, the audit answers."""
    try:
        await cluster.admin.Audit(pb.AuditRequest(), timeout=ENDING_S)
    except grpc.aio.AioRpcError as error:
        report.wrong.append(f"audit: {error.code().name} {error.details()}")


async def _ask(report: Lies, cluster: FakeCluster, number: int, honest: set[WorkerId], *, serves: bool) -> None:
    """One stream. If no liar had a part in it, it must be what it always is."""
    prompt = [number % 200, 7, number // 200, 3, 1]
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt),
        sampling=pb.SamplingParams(max_tokens=NUM_TOKENS, seed=number, logprobs=number % 3 or None),
    )
    token_ids: list[int] = []
    finished: pb.Finished | None = None
    try:
        async with asyncio.timeout(ENDING_S):
            async for response in cluster.inference.Generate(request, timeout=DEADLINE_S):
                if response.HasField("tokens"):
                    if response.tokens.index != len(token_ids):
                        report.wrong.append(f"request {number}: index {response.tokens.index} of {len(token_ids)}")
                    token_ids += response.tokens.token_ids
                elif response.HasField("finished"):
                    finished = response.finished
    except TimeoutError:
        report.codes["HANG"] += 1
        report.wrong.append(f"request {number} hangs after {len(token_ids)} tokens")
        return
    except grpc.aio.AioRpcError as error:
        report.codes[error.code().name] += 1
        status = read_status(error)
        is_told = error.code() is grpc.StatusCode.INTERNAL and "router's log" not in status.message
        is_typed = error.code() in TYPED or is_told
        is_late = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # by the client's own clock: without details
        if not serves or not is_typed or not (status.reason or is_late):
            report.wrong.append(f"request {number}: {error.code().name} {status.reason} {status.message[:200]}")
        return
    report.codes["OK"] += 1
    if finished is None:
        report.wrong.append(f"request {number} ended without a last message")
        return
    is_alone = not serves or finished.attempts == 1  # else a liar may have had an earlier attempt
    is_honest = is_alone and {finished.prefill_worker, finished.decode_worker} <= honest | {""}
    if not serves and not is_honest:
        report.wrong.append(f"request {number} ran on {finished.prefill_worker} and {finished.decode_worker}")
    if is_honest and token_ids != expected_output(prompt, NUM_TOKENS):
        report.wrong.append(f"request {number}: {token_ids}")
