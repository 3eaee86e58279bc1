"""Requests that migrate away from here: which blocks are listed for the target when, and the leases on them.

How a departure goes on is decided in `core/handoff/departure.py`, and who may read in `engine/leases.py`. Owns the pins
that keep listed blocks alive while their lease holds, whatever becomes of the request. Queues and tokens are the
worker's. Not thread-safe; the worker's lock covers it, but for `seal`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from duopool.core.handoff import departure as transitions
from duopool.core.handoff.departure import Departure, DeparturePhase
from duopool.core.handoff.lease import Lease
from duopool.core.kv_manager import KVCacheManager
from duopool.core.messages import (
    BlocksReady,
    Copied,
    Migrate,
    NackReason,
    ReadBlocks,
    SealedBlock,
    Stay,
    Tokens,
    Validate,
    Verdict,
)
from duopool.core.types import BlockId, LeaseId, RequestId
from duopool.decode_worker.decode_request import DecodePhase, DecodeRequest
from duopool.engine.leases import LeaseBook, SourceIdentity
from duopool.engine.outbox import Outbox
from duopool.engine.sealer import Sealer
from duopool.engine.surroundings import Surroundings

MAX_SEALED_PER_STEP = 64
"""Full blocks that are digested between two steps; more would hold up the streams that stay."""


@dataclass(eq=False, slots=True, kw_only=True)
class Leaving:
    """One request on its way out; it holds the lease on its blocks."""

    request: DecodeRequest
    attempt: int
    """The shadow attempt: it reads the blocks. The request itself goes on under its own."""
    departure: Departure
    lease: Lease | None = None

    @property
    def request_id(self) -> RequestId:
        return self.request.request_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """Blocks of one request that are listed when a step has ended."""

    leaving: Leaving
    block_ids: tuple[BlockId, ...]
    generations: tuple[int, ...]
    num_full: int
    """Leading ones of them that are full; the one behind is written again if the request stays after all."""
    is_last: bool


class Departures:
    """All that leave, by request."""

    def __init__(
        self,
        identity: SourceIdentity,
        *,
        manager: KVCacheManager,
        outbox: Outbox,
        surroundings: Surroundings,
        ttl_s: float,
    ) -> None:
        self._manager = manager
        self._outbox = outbox
        self._sealer = Sealer(surroundings.seal)
        self._leases: LeaseBook[Leaving] = LeaseBook(
            identity, manager=manager, new_lease_id=surroundings.new_lease_id, ttl_s=ttl_s
        )
        self._leaving: dict[RequestId, Leaving] = {}

    def __len__(self) -> int:
        """Leases that are alive, those included that are revoked and still read."""
        return len(self._leases)

    # ---- what the router says ------------------------------------------------------------------------------------

    def begin(self, command: Migrate, request: DecodeRequest, *, now: float) -> None:
        """Let the request leave; a shadow that was given up makes way for the newer one."""
        known = self._leaving.get(command.request_id)
        if known is not None and known.attempt >= command.to_attempt:
            return
        if known is not None:
            self._end(known)
        if request.phase is not DecodePhase.RUNNING:
            # A request without blocks has nothing to hand over, and one that stood still has to run again first.
            self._refuse(request, command.to_attempt, "the request does not run here now")
            return
        departure = Departure(to_attempt=command.to_attempt)
        leaving = Leaving(request=request, attempt=command.to_attempt, departure=departure)
        self._leaving[request.request_id] = leaving
        self._list(leaving, (), None, now=now)

    def copied(self, command: Copied) -> None:
        """The target has read what it was told of."""
        leaving = self._leaving.get(command.request_id)
        if leaving is not None and leaving.attempt == command.attempt:
            num_blocks = self._manager.blocks_for(leaving.request.num_computed_tokens + 1)
            leaving.departure = transitions.copied(leaving.departure, command.num_blocks, num_blocks=num_blocks)

    def stay(self, command: Stay) -> None:
        """The shadow was given up."""
        leaving = self._leaving.get(command.request_id)
        if leaving is not None and leaving.attempt <= command.attempt:
            self._end(leaving)

    def forget(self, request: DecodeRequest) -> None:
        """The request has ended here, or lost its blocks."""
        leaving = self._leaving.get(request.request_id)
        if leaving is not None and leaving.request is request:
            self._end(leaving)

    # ---- steps ---------------------------------------------------------------------------------------------------

    def plan(self, in_step: Collection[DecodeRequest]) -> list[Listing]:
        """What is to be listed when the step that was just planned has ended."""
        listings, budget = [], MAX_SEALED_PER_STEP
        for leaving in list(self._leaving.values()):
            request = leaving.request
            if request.phase is DecodePhase.WAITING:
                self._refuse(request, leaving.attempt, "the request was preempted")
                self._end(leaving)
                continue
            listing = self._look_ahead(leaving, gets_token=request in in_step and request.is_decoding, budget=budget)
            budget = max(0, budget - listing.num_full)
            if listing.block_ids or listing.is_last:
                listings.append(listing)
        return listings

    def seal(self, listings: Sequence[Listing]) -> list[tuple[SealedBlock, ...]]:
        """Digest the blocks; on the step thread, after the step."""
        return [
            self._sealer.seal(one.block_ids[: one.num_full], one.generations[: one.num_full])
            + self._sealer.seal_once(one.block_ids[one.num_full :], one.generations[one.num_full :])
            for one in listings
        ]

    def commit(
        self, listings: Sequence[Listing], sealed: Sequence[tuple[SealedBlock, ...]], *, now: float
    ) -> list[DecodeRequest]:
        """List the blocks, behind the step's tokens; returns the requests that made their last step here."""
        parted = []
        for listing, blocks in zip(listings, sealed, strict=True):
            leaving = listing.leaving
            request = leaving.request
            if self._leaving.get(request.request_id) is not leaving:
                continue
            last = None
            if listing.is_last:
                index = len(request.output) - 1
                last = Tokens(
                    request_id=request.request_id,
                    attempt=leaving.attempt,
                    index=index,
                    token_ids=(request.output[index],),
                )
                parted.append(request)
            self._list(leaving, blocks, last, now=now)
        return parted

    # ---- time ----------------------------------------------------------------------------------------------------

    def tick(self, *, now: float) -> None:
        """Keep the leases of those that still run; one that stood still for a whole time to live stays after all."""
        for leaving in list(self._leaving.values()):
            if leaving.departure.phase is not DeparturePhase.PARKED:
                self._leases.extend(leaving, now=now)
            elif self._leases.has_expired(leaving, now=now):
                self._refuse(leaving.request, leaving.attempt, "nobody took the request over in time")
                self._end(leaving)

    def is_parked(self, request: DecodeRequest) -> bool:
        """Whether the request stands still because of its departure."""
        leaving = self._leaving.get(request.request_id)
        return leaving is not None and leaving.departure.phase is DeparturePhase.PARKED

    def lease_of(self, request: DecodeRequest) -> Lease | None:
        """The lease that stands on the request's blocks because it leaves."""
        leaving = self._leaving.get(request.request_id)
        return leaving.lease if leaving is not None and leaving.request is request else None

    # ---- the KV source's questions -------------------------------------------------------------------------------

    def begin_read(self, read: ReadBlocks, *, now: float) -> str:
        return self._leases.begin_read(read, now=now)

    def end_read(self, lease_id: LeaseId) -> None:
        leaving = self._leases.end_read(lease_id)
        if leaving is not None:
            self._unpin_if_possible(leaving)

    def validate(self, validate: Validate, *, now: float) -> Verdict:
        """As the lease book says. The request stays parked until the router has made the shadow count."""
        return self._leases.validate(validate, now=now)

    def check(self) -> None:
        self._leases.check()
        for request_id, leaving in self._leaving.items():
            assert leaving.request_id == request_id
            assert leaving.lease is not None
            assert not leaving.lease.revoked
            assert len(leaving.lease.blocks) == leaving.departure.num_listed

    # ---- own -----------------------------------------------------------------------------------------------------

    def _look_ahead(self, leaving: Leaving, *, gets_token: bool, budget: int) -> Listing:
        request, departure, manager = leaving.request, leaving.departure, self._manager
        num_tokens = request.num_computed_tokens + int(gets_token)
        num_full = num_tokens // manager.block_size
        num_blocks = manager.blocks_for(num_tokens)
        end = transitions.end_of_listing(
            departure, num_full=num_full, num_blocks=num_blocks, max_new=budget, is_decoding=gets_token
        )
        block_ids = tuple(manager.block_ids(request.table)[departure.num_listed : end])
        return Listing(
            leaving=leaving,
            block_ids=block_ids,
            generations=tuple(manager.generation(block_id) for block_id in block_ids),
            num_full=min(num_full, end) - departure.num_listed,
            is_last=departure.phase is DeparturePhase.LEAVING and gets_token,
        )

    def _list(self, leaving: Leaving, blocks: tuple[SealedBlock, ...], last: Tokens | None, *, now: float) -> None:
        """Put blocks under the lease and tell the router of them."""
        request, first_block = leaving.request, leaving.departure.num_listed
        self._manager.pin([block.block_id for block in blocks])
        lease = self._leases.seal(leaving, blocks, now=now)
        leaving.departure = transitions.listed(leaving.departure, first_block + len(blocks), is_last=last is not None)
        message = BlocksReady(
            request_id=request.request_id,
            attempt=leaving.attempt,
            lease=lease,
            first_block=first_block,
            blocks=blocks,
            first_token=last,
        )
        self._outbox.say(request.session, message)

    def _refuse(self, request: DecodeRequest, to_attempt: int, detail: str) -> None:
        self._outbox.refuse(request.session, request.request_id, to_attempt, NackReason.LEASE_LOST, detail)

    def _end(self, leaving: Leaving) -> None:
        del self._leaving[leaving.request_id]
        self._leases.revoke(leaving)
        self._unpin_if_possible(leaving)

    def _unpin_if_possible(self, leaving: Leaving) -> None:
        if leaving.lease is not None and self._leases.close(leaving):
            self._manager.unpin([block.block_id for block in leaving.lease.blocks])
