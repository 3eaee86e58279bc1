"""What router and workers say to each other, as values.

These are the only messages on a session (router <-> worker) and on a KV source (D -> P). They travel as msgpack,
checked against these types on arrival (`proto/codec.py`); nothing is pickled. A number that cannot be (a negative
count, a time that is no number) ends the session before anything is counted, shown or sent on. Only durations cross the
wire, never clock times.
Every message of a request carries its attempt: the fence of docs/architecture.md.
"""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum

import msgspec

from duopool.core.ledger import WorkerLedger
from duopool.core.sampling_params import SamplingParams
from duopool.core.types import (
    BlockId,
    BlockKey,
    Count,
    FinishReason,
    Incarnation,
    LeaseId,
    RequestId,
    Seconds,
    TokenLogprob,
    Total,
    WorkerId,
)


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of all messages; the class name is the tag on the wire."""


class Choice(msgspec.Struct, frozen=True, array_like=True):
    """One of several outputs of one prompt."""

    request_id: RequestId
    seed: int


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request as workers see it: a pure function of these fields gives its tokens."""

    request_id: RequestId
    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...] = ()
    """Tokens that earlier attempts emitted; they are part of the prefix and count towards `max_tokens`."""
    params: SamplingParams
    cache_salt: bytes = b""
    """Tenant's salt: only requests with the same salt share cached blocks."""
    priority: int = 0
    """Lower values go first wherever requests wait, and are preempted last."""
    choices: tuple[Choice, ...] = ()
    """Set for a carrier: it brings the prompt of all these outputs to a decode worker, and has none of its own."""

    @property
    def outputs(self) -> tuple[GenerationRequest, ...]:
        """The requests that tokens are sampled for: this one, or those that it carries."""
        if not self.choices:
            return (self,)
        return tuple(
            msgspec.structs.replace(
                self, request_id=choice.request_id, params=replace(self.params, seed=choice.seed), choices=()
            )
            for choice in self.choices
        )

    @property
    def num_outputs(self) -> int:
        return len(self.choices) or 1

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The whole prefix that must have KV before the next token."""
        return self.prompt_token_ids + self.output_token_ids


class SealedBlock(msgspec.Struct, frozen=True, array_like=True):
    """A block of P's that will not be written again while its lease holds."""

    block_id: BlockId
    generation: int
    digest: int
    """CRC-32 of the whole page."""


class LeaseRef(msgspec.Struct, frozen=True, kw_only=True):
    """Where sealed blocks lie and under which promise."""

    lease_id: LeaseId
    worker_id: WorkerId
    incarnation: Incarnation
    source_address: str
    """host:port of P's KV source service."""


# ---- router -> worker ------------------------------------------------------------------------------------------------


class Prefill(Message, frozen=True, kw_only=True):
    """To P: compute the KV of the request's prefix and sample the next token."""

    request: GenerationRequest
    attempt: int
    deadline_s: float | None = None


class Reserve(Message, frozen=True, kw_only=True):
    """To D: the request is to decode here; its blocks come from P, or are computed here if `local_prefill`.

    Head-room is taken when P has listed the first of them.
    """

    request: GenerationRequest
    attempt: int
    local_prefill: bool = False
    is_moving: bool = False
    """The request decodes elsewhere and goes on while its blocks are copied from there: more may be listed than the
    prefix that is known here needs."""
    deadline_s: float | None = None


class Migrate(Message, frozen=True, kw_only=True):
    """To the D that runs `attempt`: list its blocks for `to_attempt`, decode on, and stop when they are copied."""

    request_id: RequestId
    attempt: int
    to_attempt: int


class Stay(Message, frozen=True, kw_only=True):
    """To the D that runs the request: `attempt`, to which it was to migrate, was given up; decode on."""

    request_id: RequestId
    attempt: int


class Rebind(Message, frozen=True, kw_only=True):
    """To P: raise the lease's attempt, so that the decode worker it was for can no longer validate."""

    request_id: RequestId
    lease_id: LeaseId
    attempt: int


class Cancel(Message, frozen=True, kw_only=True):
    """Stop the request if its attempt is at most this one, and remember that."""

    request_id: RequestId
    attempt: int
    check_pages: bool = False
    """To P: D could not read what was sealed. Pages that do not hold it any more must not serve as cache."""


class AttemptRef(msgspec.Struct, frozen=True, array_like=True):
    """One attempt of one request."""

    request_id: RequestId
    attempt: int


class Heartbeat(Message, frozen=True, kw_only=True):
    """The router lives, and still wants these leases."""

    lease_ids: tuple[LeaseId, ...] = ()
    attempts: tuple[AttemptRef, ...] = ()
    """What the worker was told to do and has not ended. A session keeps its order: of what is not here when this is
    read, the worker has nothing to say any more, so it refuses it."""


class SnapshotWanted(Message, frozen=True, kw_only=True):
    """The router missed KV events: send everything that is cached."""


class LedgerWanted(Message, frozen=True, kw_only=True):
    """An audit: tell everything the worker holds, behind all events before it."""

    audit_id: int


# ---- both ways: P or D -> router, and forwarded router -> D ----------------------------------------------------------


class BlocksReady(Message, frozen=True, kw_only=True):
    """Some more blocks of the request are sealed; chunk by chunk, in order.

    The last one of an attempt has `first_token` set; it lists the (maybe partial) last block.
    """

    request_id: RequestId
    attempt: int
    lease: LeaseRef
    first_block: int
    """Index in the request's block table of `blocks[0]`."""
    blocks: tuple[SealedBlock, ...]
    first_token: Tokens | None = None
    output: tuple[Count, ...] = ()
    """With the last one of a migration, from the router: tokens before `first_token` that `Reserve` did not know."""
    first_tokens: tuple[Tokens, ...] = ()
    """With the last one of a carrier, whose own `first_token` is empty: that of every choice."""
    queue_s: Seconds = 0.0
    prefill_s: Seconds = 0.0
    num_cached_tokens: Count = 0

    @property
    def num_listed(self) -> int:
        """Blocks that are listed with these, from block 0."""
        return self.first_block + len(self.blocks)


class Copied(Message, frozen=True, kw_only=True):
    """From the D that takes a migrating request over, forwarded to the one that runs it: what was listed is read."""

    request_id: RequestId
    attempt: int
    num_blocks: Count
    """Leading blocks of the request that are there."""


# ---- worker -> router ------------------------------------------------------------------------------------------------


class Accepted(Message, frozen=True, kw_only=True):
    """P began the request; `num_cached_tokens` of its prefix had KV already."""

    request_id: RequestId
    attempt: int
    num_cached_tokens: Count


class Reserved(Message, frozen=True, kw_only=True):
    """D took head-room; `num_cached_tokens` of the prefix need not be pulled.

    Also said from time to time while D waits for blocks, so that a router whose Cancel was lost can repeat it.
    """

    request_id: RequestId
    attempt: int
    num_cached_tokens: Count


class Joined(Message, frozen=True, kw_only=True):
    """D validated the pulled blocks and put the request into its batch."""

    request_id: RequestId
    attempt: int
    num_pulled_blocks: Count
    num_pulled_bytes: Total
    transfer_s: Seconds
    """Time in which at least one read of this request was under way."""


class Tokens(Message, frozen=True, kw_only=True):
    """New tokens of a request; `index` is the position of `token_ids[0]` in the output."""

    request_id: RequestId
    attempt: int
    index: Count
    token_ids: tuple[Count, ...]
    finish_reason: FinishReason | None = None
    stop_token_id: Count | None = None
    """The stop token that ended the request, if one did."""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """Of prompt tokens 1..n-1, with the first token only."""


class NackReason(StrEnum):
    """Why a worker will not go on with an attempt."""

    BUSY = "busy"
    """A queue is full: try another worker, or later."""
    DRAINING = "draining"
    TOO_LARGE = "too_large"
    """The request can never fit this worker's pool."""
    LEASE_LOST = "lease_lost"
    """P could not confirm the lease after the read."""
    TRANSFER_FAILED = "transfer_failed"
    DEADLINE = "deadline"
    STALE = "stale"
    """An attempt older than the newest one seen."""
    UNKNOWN = "unknown"
    """A heartbeat named it, and it is not here."""
    INTERNAL = "internal"
    """The request itself made the worker's step fail."""


class Nack(Message, frozen=True, kw_only=True):
    """The worker dropped this attempt; it holds nothing for it any more."""

    request_id: RequestId
    attempt: int
    reason: NackReason
    detail: str = ""
    retry_after_s: Seconds = 0.0


class KvStoredSegment(msgspec.Struct, frozen=True, array_like=True):
    """A run of cached blocks below `parent` (None at the root)."""

    parent: BlockKey | None
    keys: tuple[BlockKey, ...]


class KvChanged(Message, frozen=True, kw_only=True):
    """What this worker's prefix cache gained and lost since the message with `sequence - 1`."""

    sequence: int
    stored: tuple[KvStoredSegment, ...] = ()
    removed: tuple[BlockKey, ...] = ()
    """Applied before `stored`."""


class KvSnapshot(Message, frozen=True, kw_only=True):
    """Everything cached, as paths from the root; the next KvChanged has `sequence + 1`."""

    sequence: int
    paths: tuple[tuple[BlockKey, ...], ...]


class WorkerLoad(Message, frozen=True, kw_only=True):
    """How busy a worker is; sent with every step, and every few ticks without one."""

    num_waiting: Count = 0
    num_running: Count = 0
    num_pending_tokens: Total = 0
    """Tokens still to be prefilled, over waiting and running requests."""
    num_blocks: Count = 0
    num_free_blocks: Count = 0
    num_cached_blocks: Count = 0
    num_steps: Total = 0
    """Steps run since the worker started."""
    num_ticks: Total = 0
    """Rounds of the thread that steps, idle ones too: the stall watchdog looks at this. A worker that has no room for
    what waits lives on; one whose step hangs does not."""
    num_computed_tokens: Total = 0
    """Tokens whose KV was computed here, ever."""
    num_pulled_blocks: Total = 0
    """Blocks pulled from other workers, ever."""
    num_preemptions: Total = 0
    num_leases: Count = 0
    step_s: Seconds = 0.0
    """Duration of the last step."""


class LedgerReport(Message, frozen=True, kw_only=True):
    """The answer to LedgerWanted."""

    audit_id: int
    ledger: WorkerLedger


Command = (
    Prefill
    | Reserve
    | BlocksReady
    | Migrate
    | Copied
    | Stay
    | Rebind
    | Cancel
    | Heartbeat
    | SnapshotWanted
    | LedgerWanted
)
Event = (
    Accepted
    | BlocksReady
    | Copied
    | Reserved
    | Joined
    | Tokens
    | Nack
    | KvChanged
    | KvSnapshot
    | WorkerLoad
    | LedgerReport
)


class StepReport(msgspec.Struct, frozen=True, kw_only=True):
    """All that a worker has to say after a step, as one wire message."""

    events: tuple[Event, ...]


class CommandBatch(msgspec.Struct, frozen=True, kw_only=True):
    """All that the router has to say to a worker at one moment, as one wire message."""

    commands: tuple[Command, ...]


# ---- D -> P: the KV source -------------------------------------------------------------------------------------------


class DescribeSource(msgspec.Struct, frozen=True, kw_only=True):
    """Ask P how its pages can be read; `transport` is the one D wants to use."""

    transport: str


class SharedMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Where another process of the same host finds memory: an open file of its owner's."""

    pid: int
    file: int
    """The file's number at its owner."""
    name: str
    """Random, made with the memory: a file of this name is that memory."""


class SourceDescription(msgspec.Struct, frozen=True, kw_only=True):
    """How P's pages can be read."""

    incarnation: Incarnation
    layout_digest: str
    num_blocks: int
    page_bytes: int
    base_address: int = 0
    agent_metadata: bytes = b""
    """NIXL's own description of the agent; empty for other transports."""
    memory: SharedMemory | None = None
    """What the pages are the beginning of, for processes of the same host that ask for it."""


class ReadBlocks(msgspec.Struct, frozen=True, kw_only=True):
    """Ask P for pages as bytes, one message per page, in order."""

    lease_id: LeaseId
    incarnation: Incarnation
    attempt: int
    blocks: tuple[SealedBlock, ...]


class Validate(msgspec.Struct, frozen=True, kw_only=True):
    """Ask P whether the lease still held now that the read has ended; `release` also ends it if so."""

    lease_id: LeaseId
    incarnation: Incarnation
    attempt: int
    release: bool = False


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """P's answer: `reason` says what did not hold."""

    ok: bool
    reason: str = ""


# ---- about workers ---------------------------------------------------------------------------------------------------


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One live worker, as it registers and as the supervisor tells the routers."""

    worker_id: WorkerId
    role: str
    incarnation: Incarnation
    address: str
    """host:port of the session service (and of the KV source on P)."""
    model: str
    model_digest: str
    """Namespace of block keys: equal for workers whose blocks are interchangeable."""
    layout_digest: str
    block_size: int
    num_blocks: int
    max_model_len: int
    vocab_size: int
    dtype: str = ""
    tokenizer_digest: str = ""
    notes: tuple[str, ...] = ()
    """What an operator should know of how the worker set itself up."""
    node_id: str = ""
    pid: int = 0
    draining: bool = False
    drain_s: float = 0.0
    """Of a draining worker: it is stopped so long after the drain began, empty or not; 0 is no limit."""
