"""What must hold in every history. Looks on from outside, where workers, transport and clients meet the network.

A breach is written down in words; the first one ends the run. The laws of blocks and queues are the workers' own
(`check`); those about the end of a run are in `simulation.py`.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from duopool.core.messages import (
    Accepted,
    BlocksReady,
    Cancel,
    Command,
    Event,
    Joined,
    Nack,
    Prefill,
    Rebind,
    Reserve,
    Reserved,
    Stay,
    Tokens,
    Validate,
    Verdict,
    WorkerLoad,
)
from duopool.core.step import Chunk
from duopool.core.types import LeaseId, RequestId
from duopool.core.worker import Addressed, SessionId, Worker

from .fence import Fence
from .model import expected_output, expected_pages
from .scenario import MOMENTS, SEEDS_APART, Ask


@dataclass(slots=True)
class Laws:
    """Breaches so far, and what must be remembered to see them."""

    clock: Callable[[], float]
    breaches: list[str] = field(default_factory=list)
    has_digests: bool = True
    quiet_from: float = 0.0
    """When the last fault is over."""
    num_deaths: int = 0
    """Workers whose process ended; one that is cut off or stands still lives."""
    patience_s: float = 0.3
    """How long after that, and after its client's last word, a request may still be computed."""
    asks: dict[int, Ask] = field(default_factory=dict)
    """By the seed of their parameters."""
    ended_at: dict[int, float] = field(default_factory=dict)
    """When the client had its last message, or did not want any more."""
    ask_of: dict[RequestId, int] = field(default_factory=dict)
    """The seed of every request."""
    verdicts: set[tuple[LeaseId, int]] = field(default_factory=set)
    """(lease, attempt) that a prefill worker has confirmed."""

    on_moment: Callable[[str, str, RequestId], None] = lambda kind, place, request_id: None
    """Told of every message about a request that a worker takes in or says, with its place."""
    fence: Fence = field(init=False)

    def __post_init__(self) -> None:
        self.fence = Fence(self.breach)

    def breach(self, what: str) -> None:
        self.breaches.append(f"at {self.clock():.4f}: {what}")


@dataclass(slots=True)
class _Seen:
    """What one life of a worker knows of one request."""

    over: int = 0
    """Attempts up to this one have ended here."""
    newest: int = 0
    """Newest attempt that a command has named."""
    lease: LeaseId | None = None
    """On P: the lease that blocks were listed under last."""
    leases: dict[int, LeaseId] = field(default_factory=dict)
    """On D: per attempt the lease that its blocks lie under."""


class WatchedWorker:
    """A worker between the laws: everything that goes in and out is looked at, and passed on as it is."""

    def __init__(self, worker: Worker, name: str, laws: Laws) -> None:
        self._worker = worker
        self._name = name
        self._laws = laws
        self._requests: dict[RequestId, _Seen] = defaultdict(_Seen)
        self._said: list[Addressed] = []

    # ---- Worker ------------------------------------------------------------------------------------------------------

    def open_session(self, session: SessionId, *, now: float) -> None:
        self._worker.open_session(session, now=now)

    def close_session(self, session: SessionId, *, now: float) -> None:
        self._worker.close_session(session, now=now)

    def handle(self, command: Command, session: SessionId, *, now: float) -> None:
        self._listen()
        self._obey(command)
        newer = self._newer_than(command)
        self._worker.handle(command, session, now=now)
        if newer is not None and self._newer_than(command) is None:
            self._listen()
            nacks = (one.event for one in self._said if isinstance(one.event, Nack))
            if newer not in {(nack.request_id, nack.attempt) for nack in nacks}:
                self._breach(f"ended {newer[0][:6]}/{newer[1]} without a word when an older attempt was cancelled")
        if isinstance(command, Rebind):
            self._check_lease(command)

    def step(self, *, now: float) -> bool:
        return self._worker.step(now=now)

    @property
    def rest_s(self) -> float:
        return self._worker.rest_s

    def tick(self, *, now: float) -> None:
        self._worker.tick(now=now)

    def take_events(self) -> tuple[Addressed, ...]:
        self._listen()
        said, self._said = self._said, []
        return tuple(said)

    def load(self) -> WorkerLoad:
        return self._worker.load()

    @property
    def is_idle(self) -> bool:
        return self._worker.is_idle

    def check(self) -> None:
        self._worker.check()

    def _newer_than(self, command: Command) -> tuple[RequestId, int] | None:
        """The attempt here that a Cancel is too old for."""
        requests = getattr(self._worker, "_requests", {})
        found = requests.get(command.request_id) if isinstance(command, Cancel) else None
        is_newer = found is not None and isinstance(command, Cancel) and found.attempt > command.attempt
        return (found.request_id, found.attempt) if is_newer else None

    # ---- laws --------------------------------------------------------------------------------------------------------

    def computes(self, chunk: Chunk) -> None:
        """A step works for a request: `chunk.request_id` is `request/attempt`."""
        laws, now = self._laws, self._laws.clock()
        request_id = RequestId(chunk.request_id.split("/")[0])
        seed = laws.ask_of.get(request_id, -1)
        ended_at = laws.ended_at.get(seed - seed % SEEDS_APART)
        if ended_at is not None and now > max(ended_at, laws.quiet_from) + laws.patience_s:
            self._breach(f"computes for {chunk.request_id[:6]}, which nobody has wanted since {ended_at:.4f}")

    def judges(self, asked: Validate, verdict: Verdict) -> None:
        """A prefill worker has answered whether a lease held."""
        holder = next((name for name, seen in self._requests.items() if seen.lease == asked.lease_id), RequestId(""))
        self._laws.on_moment("Verdict", self._name, holder)
        if not verdict.ok:
            return
        self._laws.verdicts.add((asked.lease_id, asked.attempt))
        for request_id, seen in self._requests.items():
            if seen.lease == asked.lease_id and asked.attempt < max(seen.newest, seen.over + 1):
                self._breach(
                    f"confirmed the lease of {request_id[:6]} for attempt {asked.attempt}, "
                    f"after it was told of attempt {seen.newest} and of the end of {seen.over}"
                )

    def _obey(self, command: Command) -> None:
        self._tell(command)
        match command:
            case Prefill(request=request, attempt=attempt) | Reserve(request=request, attempt=attempt):
                for each in (request, *request.outputs):
                    self._laws.ask_of[each.request_id] = each.params.seed
                seen = self._requests[request.request_id]
                seen.newest = max(seen.newest, attempt)
            case Rebind(request_id=request_id, attempt=attempt, lease_id=lease_id):
                seen = self._requests[request_id]
                if seen.lease == lease_id:
                    seen.newest = max(seen.newest, attempt)
            case Cancel(request_id=request_id, attempt=attempt):
                seen = self._requests[request_id]
                seen.over = max(seen.over, attempt)
            case Stay(request_id=request_id, attempt=attempt):
                seen = self._requests[request_id]
                seen.newest = max(seen.newest, attempt + 1)
            case BlocksReady(request_id=request_id, attempt=attempt, lease=lease, first_tokens=first_tokens):
                for each in (request_id, *(tokens.request_id for tokens in first_tokens)):
                    self._requests[each].leases[attempt] = lease.lease_id
            case _:
                pass

    def _tell(self, message: object) -> None:
        """Somebody may wait for just this moment."""
        kind = type(message).__name__
        if isinstance(message, Prefill | Reserve):
            self._laws.on_moment(kind, self._name, message.request.request_id)
        elif kind in MOMENTS:
            self._laws.on_moment(kind, self._name, message.request_id)  # type: ignore[attr-defined]

    def _check_lease(self, rebind: Rebind) -> None:
        """A lease never goes back to an older attempt."""
        book = getattr(self._worker, "_leases", None)
        holder = None if book is None else book.holder(rebind.lease_id)
        newest = self._requests[rebind.request_id].newest
        if holder is not None and not holder.lease.revoked and holder.lease.attempt < newest:
            self._breach(
                f"gave the lease of {rebind.request_id[:6]} back to attempt {holder.lease.attempt}, "
                f"after it was told of attempt {newest}"
            )

    def _listen(self) -> None:
        for addressed in self._worker.take_events():
            self._said.append(addressed)
            self._hear(addressed.event)

    def _hear(self, event: Event) -> None:
        if not isinstance(event, Accepted | Reserved | BlocksReady | Joined | Tokens):
            return
        self._tell(event)
        seen = self._requests[event.request_id]
        if event.attempt <= seen.over:
            self._breach(
                f"said {type(event).__name__} for {event.request_id[:6]}/{event.attempt}, "
                f"which had ended there (up to attempt {seen.over})"
            )
        tokens = event.first_token if isinstance(event, BlocksReady) else event
        if isinstance(tokens, Tokens) and tokens.finish_reason is not None:
            seen.over = max(seen.over, event.attempt)
        if isinstance(event, Joined) and (seen.leases[event.attempt], event.attempt) not in self._laws.verdicts:
            self._breach(f"joined {event.request_id[:6]}/{event.attempt}, whose lease nobody has confirmed")
        if isinstance(event, BlocksReady):
            seen.lease = event.lease.lease_id
            self._check_content(event)

    def _check_content(self, event: BlocksReady) -> None:
        """What is sealed must be the KV of this very prefix: the digest says so."""
        seed = self._laws.ask_of.get(event.request_id, -1)
        ask = self._laws.asks.get(seed - seed % SEEDS_APART)
        if ask is None or not self._laws.has_digests:
            return
        pages = expected_pages(ask.prompt + expected_output(ask.prompt, ask.of_choice(seed % SEEDS_APART))[0])
        last = event.num_listed - (event.first_token is not None)  # the last one may be half full
        for index, block in enumerate(event.blocks, event.first_block):
            if index < min(last, len(pages)) and zlib.crc32(pages[index]) != block.digest:
                self._breach(
                    f"sealed block {block.block_id} generation {block.generation} as block {index} of "
                    f"{event.request_id[:6]}, whose KV it does not hold"
                )

    def _breach(self, what: str) -> None:
        self._laws.breach(f"{self._name} {what}")
