"""A KV source that lies: pages of wrong sizes and numbers, verdicts and descriptions that are none, and silence.

The readers are production. Whatever comes, every read and every question ends once, with an error or with the pages
that were sealed; no other page is touched; and an honest source is read afterwards as if nothing had been.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import grpc
from grpc import aio

sys.path += [str(Path(__file__).parents[1] / "transfer")]

from transfer_fakes import FakeStore, start_source

from duopool.core.messages import LeaseRef, SealedBlock, SharedMemory, SourceDescription, Verdict
from duopool.core.types import BlockId, Incarnation, LeaseId, WorkerId
from duopool.engine.transfer.digest import seal
from duopool.engine.transfer.factory import make_nixl_source, make_reader
from duopool.engine.transfer.grpc_source import LAYOUT_METADATA_KEY
from duopool.engine.transfer.in_process import InProcessNetwork
from duopool.engine.transfer.transport import BlockReader
from duopool.proto import codec

from .garbage import EDGES, TEXTS, mutated_bytes, mutated_message, raw_bytes
from .liars import Lies

PATIENCE_S = 20.0
READ_TIMEOUT_S = 0.5
NUM_BLOCKS = 16
LIFE = Incarnation(7)


class LyingSource:
    """Answers each call anew with whatever comes to its mind."""

    def __init__(self, store: FakeStore, random: Random, agent_metadata: bytes) -> None:
        self._store = store
        self._random = random
        self._agent_metadata = agent_metadata

    def add_to(self, server: aio.Server) -> None:
        methods = {
            codec.DESCRIBE_METHOD: grpc.unary_unary_rpc_method_handler(self._describe),
            codec.VALIDATE_METHOD: grpc.unary_unary_rpc_method_handler(self._validate),
            codec.READ_METHOD: grpc.unary_stream_rpc_method_handler(self._read),
        }
        named = {method.rpartition("/")[2]: handler for method, handler in methods.items()}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(codec.KV_SOURCE_SERVICE, named),))

    async def _describe(self, request: bytes, context: Any) -> bytes:
        random = self._random
        description = SourceDescription(
            incarnation=random.choice((LIFE, LIFE, LIFE, Incarnation(random.choice(EDGES)))),
            layout_digest=random.choice((self._store.digest, self._store.digest, random.choice(TEXTS))),
            num_blocks=random.choice((NUM_BLOCKS, NUM_BLOCKS, random.choice(EDGES))),
            page_bytes=random.choice((self._store.page_bytes, self._store.page_bytes, random.choice(EDGES))),
            base_address=random.choice((self._store.base_address, random.choice(EDGES))),
            agent_metadata=random.choice((self._agent_metadata, self._agent_metadata, b"\x00", random.randbytes(200))),
            memory=random.choice((self._store.shared_memory, self._store.shared_memory, self._no_memory(), None)),
        )
        return await self._spoilt(context, description)

    def _no_memory(self) -> SharedMemory:
        """A file of this process that is no pages, or of none at all."""
        random = self._random
        return SharedMemory(
            pid=random.choice((os.getpid(), 1, random.choice(EDGES))),
            file=random.choice((*range(40), random.choice(EDGES))),
            name=random.choice(TEXTS),
        )

    async def _validate(self, request: bytes, context: Any) -> bytes:
        return await self._spoilt(context, Verdict(ok=self._random.random() < 0.5, reason=self._random.choice(TEXTS)))

    async def _read(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        random = self._random
        if random.random() < 0.5:
            layout = random.choice((self._store.digest, self._store.digest, "another", "x" * 2000))
            await context.send_initial_metadata(((LAYOUT_METADATA_KEY, layout),))
        asked = codec.decode_read(request).blocks
        rate = random.choice((0.0, 0.3))
        for block in asked[: random.choice((len(asked), len(asked), len(asked), 0, 1))]:
            page = bytes(self._store.page(block.block_id))
            wrong = random.choice((page[:-1], page + b"x", b"", random.randbytes(len(page))))
            yield wrong if random.random() < rate else page
        for _ in range(random.choice((0, 0, 0, 1, 40))):
            yield random.randbytes(random.choice((0, self._store.page_bytes)))
        await self._end_badly(context)

    async def _spoilt(self, context: Any, message: Any) -> bytes:
        random = self._random
        await self._end_badly(context)
        honest = codec.encode(message)
        return random.choice(
            (honest, honest, mutated_message(random, message), mutated_bytes(random, honest), raw_bytes(random))
        )

    async def _end_badly(self, context: Any) -> None:
        match self._random.randrange(12):
            case 0:
                await context.abort(self._random.choice(list(grpc.StatusCode)[1:]), self._random.choice(TEXTS[2:5]))
            case 1:
                await asyncio.sleep(4 * READ_TIMEOUT_S)
            case 2:
                raise RuntimeError("a lie")
            case _:
                pass


@contextmanager
def lying_source(store: FakeStore, random: Random, *, transport: str) -> Iterator[str]:
    """Its address; a gRPC server on a thread of its own."""
    loop, started, ended = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    ports: list[int] = []
    agent = make_nixl_source(transport, store, worker_id=WorkerId("liar"), incarnation=LIFE)  # type: ignore[arg-type]

    async def serve() -> None:
        server = aio.server(options=codec.INTERNAL_SERVER_OPTIONS)
        LyingSource(store, random, b"" if agent is None else agent.agent_metadata).add_to(server)
        ports.append(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        started.set()
        await ended.wait()
        await server.stop(None)
        await asyncio.sleep(0.05)

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), name="lying-source")
    thread.start()
    try:
        assert started.wait(PATIENCE_S)
        yield f"127.0.0.1:{ports[0]}"
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(PATIENCE_S)
        loop.close()
        if agent is not None:
            agent.close()


def lie_to_reader(num_reads: int, seed: int, *, transport: str) -> Lies:
    """Reads and questions of one decode worker to a source that lies, then an honest read."""
    report, random = Lies(), Random(seed)
    theirs, own = FakeStore(num_blocks=NUM_BLOCKS, seed=1), FakeStore(num_blocks=NUM_BLOCKS, seed=2)
    reader = make_reader(
        transport,  # type: ignore[arg-type]
        own,
        worker_id=WorkerId("decode-0"),
        incarnation=Incarnation(1),
        read_timeout_s=READ_TIMEOUT_S,
        confirm_timeout_s=READ_TIMEOUT_S,
    )
    try:
        with lying_source(theirs, random, transport=transport) as address:
            for number in range(num_reads):
                _read_once(report, reader, theirs, own, address, number, random)
        _read_honestly(report, reader, own)
    finally:
        reader.close()
    return report


def _read_once(
    report: Lies, reader: BlockReader, theirs: FakeStore, own: FakeStore, address: str, number: int, random: Random
) -> None:
    report.num_lies += 1
    ids = [BlockId(block) for block in random.sample(range(NUM_BLOCKS), random.choice((1, 3, 6)))]
    targets = [BlockId(block) for block in random.sample(range(NUM_BLOCKS), len(ids))]
    blocks = list(seal(theirs, ids, [1] * len(ids)))
    if random.random() < 0.2:
        blocks[0] = SealedBlock(BlockId(random.choice((0, 5))), random.choice(EDGES), random.choice(EDGES))
    lease = LeaseRef(
        lease_id=LeaseId(random.choice(EDGES)),
        worker_id=WorkerId(f"prefill-{number}"),  # known to nobody: it is asked to describe itself
        incarnation=LIFE,
        source_address=address if random.random() < 0.9 else random.choice(TEXTS),
    )
    before = {block: bytes(own.page(BlockId(block))) for block in range(NUM_BLOCKS) if block not in targets}
    outcome = _once(report, f"read {number}", lambda done: reader.read(lease, 1, blocks, targets, done))
    if outcome is not None:
        report.codes["good read" if not outcome.error else "refused read"] += 1
        same = [block.digest for block in blocks] == [one.digest for one in seal(own, targets, [1] * len(targets))]
        if not outcome.error and not same:
            report.wrong.append(f"read {number} is called good, and its pages are not what was sealed")
    if any(bytes(own.page(BlockId(block))) != page for block, page in before.items()):
        report.wrong.append(f"read {number} wrote into pages that it was not for")
    verdict = _once(report, f"question {number}", lambda done: reader.confirm(lease, 1, done))
    report.codes["verdict" if verdict is not None else "no verdict"] += 1


def _read_honestly(report: Lies, reader: BlockReader, own: FakeStore) -> None:
    source = start_source("grpc", InProcessNetwork(), worker_id="honest", incarnation=LIFE)
    try:
        lease, blocks = source.lease(1, [3, 4, 5])
        outcome = _once(
            report, "the honest read", lambda done: reader.read(lease, 1, blocks, [BlockId(n) for n in range(3)], done)
        )
        if outcome is None or outcome.error:
            report.wrong.append(f"an honest source is not read any more: {outcome}")
    finally:
        source.stop()


def _once(report: Lies, what: str, begin: Callable[[Callable[[Any], None]], None]) -> Any:
    """What the call answers; a breach if that is nothing, or comes twice."""
    answers: list[Any] = []
    answered = threading.Event()

    def done(answer: Any) -> None:
        answers.append(answer)
        answered.set()

    try:
        begin(done)
    except Exception as error:
        report.wrong.append(f"{what} fails: {error!r}")
        return None
    if not answered.wait(PATIENCE_S):
        report.wrong.append(f"{what} never ends")
        return None
    if len(answers) > 1:
        report.wrong.append(f"{what} ends {len(answers)} times")
    return answers[0]
