"""Fake workers that speak the real session wire, a tiny tokenizer, and a whole router in one process.

The fake model is a function of the prefix alone, as the real one is: so what a stream must be can be computed, also
after a worker is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Sequence
from random import Random

import grpc
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from duopool.core.config import HandoffConfig, ModelConfig, RouterConfig
from duopool.core.ledger import BlockLedger, Holder, WorkerLedger
from duopool.core.messages import (
    Accepted,
    BlocksReady,
    Cancel,
    Command,
    Copied,
    Event,
    GenerationRequest,
    Heartbeat,
    Joined,
    KvSnapshot,
    LeaseRef,
    LedgerReport,
    LedgerWanted,
    Migrate,
    Nack,
    NackReason,
    Prefill,
    Rebind,
    Reserve,
    Reserved,
    SealedBlock,
    SnapshotWanted,
    StepReport,
    Tokens,
    WorkerInfo,
    WorkerLoad,
)
from duopool.core.types import BlockId, FinishReason, Incarnation, LeaseId, TokenLogprob, WorkerId
from duopool.proto import codec
from duopool.proto.inference_pb2_grpc import AdminStub, InferenceStub
from duopool.proto.internal_access import InternalAccess
from duopool.router.server import RouterServer
from duopool.router.tokenizer import Tokenizer as RouterTokenizer

VOCAB_SIZE = 300
BLOCK_SIZE = 4
NUM_BLOCKS = 256
MAX_MODEL_LEN = 512
END_ID = 257
TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """One token per byte (ids 0..255 in byte order), and two special ones."""
    alphabet = _byte_characters()
    tokenizer = Tokenizer(models.BPE(vocab={character: byte for byte, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return tokenizer


def router_tokenizer() -> RouterTokenizer:
    return RouterTokenizer(byte_tokenizer(), chat_template=TEMPLATE, eos_token_ids=frozenset({END_ID}))


def _byte_characters() -> list[str]:
    """GPT-2's character for every byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(spare)) for byte in range(256)]


def next_token(prefix: Sequence[int]) -> int:
    """The fake model: any letter, decided by the whole prefix."""
    digest = hashlib.blake2b(repr(tuple(prefix)).encode(), digest_size=2).digest()
    return ord("a") + int.from_bytes(digest) % 26


def expected_output(prompt: Sequence[int], num_tokens: int) -> list[int]:
    prefix = list(prompt)
    for _ in range(num_tokens):
        prefix.append(next_token(prefix))
    return prefix[len(prompt) :]


class FakeWorker:
    """A worker of either role without a model; `step_s` is the time between two tokens."""

    def __init__(self, worker_id: str, role: str, *, step_s: float = 0.0, tokens_per_step: int = 1) -> None:
        self.worker_id = WorkerId(worker_id)
        self.role = role
        self.step_s = step_s
        self.tokens_per_step = tokens_per_step
        self.incarnation = Incarnation(Random(worker_id).getrandbits(63))
        self.address = ""
        self.commands: list[Command] = []
        self.refuse: NackReason | None = None
        self.mute = False
        """Take commands, answer nothing (but heartbeats go on)."""
        self.frozen = False
        """Say nothing at all."""
        self.stalled = False
        """Say only that the step goes on."""
        self.is_forgetful = False
        """Lose every request that comes, and say so when it is asked."""
        self.draining = False
        self.drain_s = 0.0
        self.holders: list[Holder] = []
        """What it says that it holds when it is audited."""
        self.running: dict[str, asyncio.Task[None]] = {}
        self._reserved: dict[tuple[str, int], GenerationRequest] = {}
        self._moving_here: set[str] = set()
        self._outputs: dict[str, list[int]] = {}
        """Tokens of the requests that decode here."""
        self._num_ticks = 0
        self._sessions: list[asyncio.Queue[Event]] = []
        self._homes: dict[str, asyncio.Queue[Event]] = {}
        """Per request the session that it came from."""
        self._server: grpc.aio.Server | None = None

    @property
    def info(self) -> WorkerInfo:
        return WorkerInfo(
            worker_id=self.worker_id,
            role=self.role,
            incarnation=self.incarnation,
            address=self.address,
            model="tiny",
            model_digest="digest",
            layout_digest="layout",
            block_size=BLOCK_SIZE,
            num_blocks=NUM_BLOCKS,
            max_model_len=MAX_MODEL_LEN,
            vocab_size=VOCAB_SIZE,
            draining=self.draining,
            drain_s=self.drain_s,
        )

    def received(self, kind: type) -> list:
        return [command for command in self.commands if isinstance(command, kind)]

    async def start(self) -> None:
        self._server = grpc.aio.server()
        handler = grpc.stream_stream_rpc_method_handler(
            self._session, request_deserializer=codec.decode_commands, response_serializer=self.encode
        )
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(codec.WORKER_SERVICE, {"Session": handler}),)
        )
        port = self._server.add_insecure_port(self.address or "127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"
        await self._server.start()

    async def stop(self) -> None:
        for task in list(self.running.values()):
            task.cancel()
        if self._server is not None:
            await self._server.stop(0)
            self._server = None

    def encode(self, report: StepReport) -> bytes:
        return codec.encode(report)

    def say(self, event: Event) -> None:
        if (self.mute or self.stalled) and not isinstance(event, WorkerLoad | KvSnapshot | LedgerReport):
            return
        home = self._homes.get(getattr(event, "request_id", ""))
        for queue in self._sessions if home is None else [home]:
            queue.put_nowait(event)

    async def _session(self, commands: AsyncIterator, context: grpc.aio.ServicerContext) -> AsyncIterator[StepReport]:
        metadata = dict(context.invocation_metadata())
        if metadata["incarnation"] != str(self.incarnation):
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "another incarnation")
        queue: asyncio.Queue[Event] = asyncio.Queue()
        self._sessions.append(queue)
        queue.put_nowait(KvSnapshot(sequence=0, paths=()))
        queue.put_nowait(self._load())
        reader = asyncio.create_task(self._read(commands, queue))
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    event = await asyncio.wait_for(queue.get(), 0.1)
                    if not self.frozen:
                        yield StepReport(events=(event, self._load()))
                    continue
                if not self.frozen:
                    yield StepReport(events=(self._load(),))
        finally:
            self._sessions.remove(queue)
            reader.cancel()
            for task in list(self.running.values()):
                task.cancel()

    async def _read(self, commands: AsyncIterator, queue: asyncio.Queue[Event]) -> None:
        with contextlib.suppress(asyncio.CancelledError, grpc.RpcError, Exception):
            async for batch in commands:
                for command in batch.commands:
                    self.commands.append(command)
                    if isinstance(command, Prefill | Reserve):
                        named = (command.request, *command.request.outputs)
                        self._homes.update({request.request_id: queue for request in named})
                    self._handle(command)

    def _load(self) -> WorkerLoad:
        self._num_ticks += not self.stalled
        return WorkerLoad(
            num_running=len(self.running),
            num_blocks=NUM_BLOCKS,
            num_free_blocks=NUM_BLOCKS,
            num_ticks=self._num_ticks,
        )

    def _handle(self, command: Command) -> None:
        match command:
            case Prefill() | Reserve() if self.refuse is not None:
                self.say(
                    Nack(
                        request_id=command.request.request_id,
                        attempt=command.attempt,
                        reason=self.refuse,
                        detail="refused",
                        retry_after_s=0.02,
                    )
                )
            case Prefill() | Reserve() if self.is_forgetful:
                pass
            case Heartbeat(attempts=attempts) if self.is_forgetful:
                for one in attempts:
                    self.say(Nack(request_id=one.request_id, attempt=one.attempt, reason=NackReason.UNKNOWN))
            case Prefill(request=request, attempt=attempt):
                self.say(Accepted(request_id=request.request_id, attempt=attempt, num_cached_tokens=0))
                self._run(request, self._prefill(request, attempt))
            case Reserve(request=request, attempt=attempt, local_prefill=local):
                self.say(Reserved(request_id=request.request_id, attempt=attempt, num_cached_tokens=0))
                self._reserved[request.request_id, attempt] = request
                if command.is_moving:
                    self._moving_here.add(request.request_id)
                if local:
                    for output in request.outputs:
                        self._run(output, self._decode(output, attempt, request.output_token_ids))
            case BlocksReady(request_id=request_id, attempt=attempt, first_token=first):
                request = self._reserved.get((request_id, attempt))
                if request is not None and first is not None:
                    for output, token in zip(request.outputs, command.first_tokens or (first,), strict=True):
                        self._run(output, self._join(output, attempt, command.output, token))
                elif request is not None and request_id in self._moving_here:
                    num_blocks = command.num_listed
                    self.say(Copied(request_id=request_id, attempt=attempt, num_blocks=num_blocks))
            case Migrate(request_id=request_id, to_attempt=to_attempt):
                self.say(self._listing(request_id, to_attempt, None))
            case Copied(request_id=request_id, attempt=attempt) if request_id in self.running:
                self.running.pop(request_id).cancel()
                output = self._outputs[request_id]
                last = Tokens(
                    request_id=request_id, attempt=attempt, index=len(output) - 1, token_ids=tuple(output[-1:])
                )
                self.say(self._listing(request_id, attempt, last))
            case Cancel(request_id=request_id):
                task = self.running.pop(request_id, None)
                if task is not None:
                    task.cancel()
            case LedgerWanted(audit_id=audit_id):
                blocks = BlockLedger(
                    num_blocks=NUM_BLOCKS,
                    free=tuple(BlockId(n) for n in range(NUM_BLOCKS)),
                    cached=(),
                    ref_counts={},
                    tables={},
                    pins={},
                )
                ledger = WorkerLedger(blocks=blocks, holders=tuple(self.holders))
                self.say(LedgerReport(audit_id=audit_id, ledger=ledger))
            case Rebind() | Heartbeat() | SnapshotWanted() | BlocksReady():
                pass

    def _run(self, request: GenerationRequest, work) -> None:
        task = asyncio.create_task(work)
        self.running[request.request_id] = task
        task.add_done_callback(
            lambda done: (
                self.running.pop(request.request_id, None) if self.running.get(request.request_id) is done else None
            )
        )

    async def _prefill(self, request: GenerationRequest, attempt: int) -> None:
        await asyncio.sleep(self.step_s)
        num_blocks = -(-len(request.token_ids) // BLOCK_SIZE)
        lease = LeaseRef(
            lease_id=LeaseId(hash((request.request_id, attempt)) % 2**63),
            worker_id=self.worker_id,
            incarnation=self.incarnation,
            source_address=self.address,
        )
        token_id = next_token(request.token_ids)
        index = len(request.output_token_ids)
        is_last = index + 1 >= request.params.max_tokens
        first_tokens = tuple(
            Tokens(
                request_id=output.request_id,
                attempt=attempt,
                index=index,
                token_ids=(token_id,),
                finish_reason=FinishReason.LENGTH if is_last else None,
                logprobs=_logprobs([token_id], request.params.logprobs),
                prompt_logprobs=_logprobs(request.prompt_token_ids[1:], request.params.prompt_logprobs),
            )
            for output in request.outputs
        )
        marker = Tokens(request_id=request.request_id, attempt=attempt, index=index, token_ids=())
        self.say(
            BlocksReady(
                request_id=request.request_id,
                attempt=attempt,
                lease=lease,
                first_block=0,
                blocks=tuple(SealedBlock(BlockId(n), 1, 0) for n in range(num_blocks)),
                first_token=marker if request.choices else first_tokens[0],
                first_tokens=first_tokens if request.choices else (),
                queue_s=0.001,
                prefill_s=0.002,
            )
        )

    def _listing(self, request_id: str, attempt: int, last: Tokens | None) -> BlocksReady:
        """One block before the last listing, and one with it."""
        lease = LeaseRef(
            lease_id=LeaseId(attempt),
            worker_id=self.worker_id,
            incarnation=self.incarnation,
            source_address=self.address,
        )
        number = int(last is not None)
        return BlocksReady(
            request_id=request_id,
            attempt=attempt,
            lease=lease,
            first_block=number,
            blocks=(SealedBlock(BlockId(number), 1, 0),),
            first_token=last,
        )

    async def _join(self, request: GenerationRequest, attempt: int, output: Sequence[int], first: Tokens) -> None:
        self.say(
            Joined(
                request_id=request.request_id,
                attempt=attempt,
                num_pulled_blocks=3,
                num_pulled_bytes=3000,
                transfer_s=0.001,
            )
        )
        await self._decode(request, attempt, (*request.output_token_ids, *output, *first.token_ids))

    async def _decode(self, request: GenerationRequest, attempt: int, output: Sequence[int]) -> None:
        output = self._outputs[request.request_id] = list(output)
        while len(output) < request.params.max_tokens:
            await asyncio.sleep(self.step_s)
            new = []
            while len(new) < self.tokens_per_step and len(output) + len(new) < request.params.max_tokens:
                new.append(next_token([*request.prompt_token_ids, *output, *new]))
            index = len(output)
            output += new
            is_last = len(output) >= request.params.max_tokens
            self.say(
                Tokens(
                    request_id=request.request_id,
                    attempt=attempt,
                    index=index,
                    token_ids=tuple(new),
                    finish_reason=FinishReason.LENGTH if is_last else None,
                    logprobs=_logprobs(new, request.params.logprobs),
                )
            )


def _logprobs(token_ids: Sequence[int], num_top: int | None) -> tuple[TokenLogprob, ...]:
    if num_top is None:
        return ()
    top = tuple((other, -0.5 * other) for other in range(num_top))
    return tuple(TokenLogprob(token_id, -0.25, 1, top) for token_id in token_ids)


class FakeCluster:
    """A router with fake workers; `async with` starts and stops all of it."""

    def __init__(
        self,
        workers: Sequence[FakeWorker] | None = None,
        *,
        route_wait_s: float = 2.0,
        **settings: object,
    ) -> None:
        if workers is None:
            workers = (FakeWorker("prefill-0", "prefill"), FakeWorker("decode-0", "decode"))
        self.workers = list(workers)
        settings.setdefault(
            "handoff", HandoffConfig(heartbeat_s=0.1, progress_watchdog_s=0.6, local_prefill_max_tokens=0)
        )
        self.config = RouterConfig(model=ModelConfig(model="tiny"), port=0, block_size=BLOCK_SIZE, **settings)
        self.router = RouterServer(
            self.config, router_tokenizer(), random=Random(1), route_wait_s=route_wait_s, command_timeout_s=1.0
        )

    async def __aenter__(self) -> FakeCluster:
        for worker in self.workers:
            await worker.start()
        await self.router.start()
        self.tell_members()
        self.channel = grpc.aio.insecure_channel(self.address)
        self.inference = InferenceStub(self.channel)
        self.access = InternalAccess.load(self.config.internal)
        self.internal_channel = self.access.aio_channel(f"127.0.0.1:{self.router.internal_port}")
        self.admin = self.access.stub(AdminStub, self.internal_channel)
        if self.workers:
            await eventually(lambda: all(self.router.pools.num_ready(worker.role) for worker in self.workers))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()
        await self.internal_channel.close()
        await self.router.stop(0.1)
        for worker in self.workers:
            await worker.stop()
        assert self.router.pools.num_requests == 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.router.port}"

    def tell_members(self) -> None:
        self.router.pools.update([worker.info for worker in self.workers])


async def eventually(condition, *, within_s: float = 10.0) -> None:
    """Wait until `condition()` holds."""
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)
