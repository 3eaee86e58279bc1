"""Bugs on purpose: each takes one guard of the protocol away, so that the simulation can prove that it would see it.

A plant patches production code for the length of one run. Nothing here is a switch in production code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import msgspec

from duopool.core.block_pool import BlockPool
from duopool.core.handoff import lease as leases
from duopool.core.handoff import request as requests
from duopool.core.handoff import slot as slots
from duopool.core.handoff.request_state import Finish, Heard
from duopool.core.handoff.slot import GiveBack, SlotPhase
from duopool.core.handoff.tombstones import Tombstones
from duopool.core.kv_manager import KVCacheManager
from duopool.core.messages import Cancel, Tokens, Verdict
from duopool.decode_worker.scheduler import DecodeScheduler
from duopool.decode_worker.worker import DecodeWorker
from duopool.engine.arrivals import Arrivals
from duopool.engine.leases import LeaseBook
from duopool.engine.outbox import Outbox
from duopool.prefill_worker.worker import PrefillWorker
from duopool.router.pools import Pools

from . import transport

Plant = Callable[[], Any]
"""Makes a context manager; the bug is there while it is open."""


@contextmanager
def fence_off() -> Iterator[None]:
    """R takes a token of any attempt for one of the current attempt."""
    honest = requests.transition

    def transition(state: Any, event: Any) -> Any:
        if isinstance(event, Heard) and isinstance(event.message, Tokens) and state.route is not None:
            event = Heard(state.route.decode, msgspec.structs.replace(event.message, attempt=state.attempt))
        return honest(state, event)

    with patch("duopool.router.request_life.transition", transition):
        yield


@contextmanager
def index_out_of_order() -> Iterator[None]:
    """R emits a token whatever its index is."""
    honest = requests._tokens

    def tokens(state: Any, message: Any) -> Any:
        after, actions = honest(replace(state, output=(0,) * message.index), message)
        return replace(after, output=state.output + message.token_ids), actions

    with patch.object(requests, "_tokens", tokens):
        yield


@contextmanager
def validate_off() -> Iterator[None]:
    """D joins whatever P says of the lease."""
    honest = slots.transition

    def transition(slot: Any, event: Any) -> Any:
        if isinstance(event, slots.Validated):
            event = slots.Validated(ok=True)
        return honest(slot, event)

    with patch.object(slots, "transition", transition):
        yield


@contextmanager
def lease_without_time_limit() -> Iterator[None]:
    """P never ends a lease by itself."""
    with (
        patch.object(leases, "expire", lambda lease, *, now: lease),
        patch.object(LeaseBook, "has_expired", lambda self, request, *, now: False),
    ):
        yield


@contextmanager
def double_release() -> Iterator[None]:
    """P gives the blocks of an ended lease back once more than it took them."""
    honest = PrefillWorker._free_if_possible

    def free_if_possible(self: Any, request: Any) -> None:
        manager = self._manager
        held = manager.block_ids(request.table) if manager.has(request.table) else ()
        shared = [block_id for block_id in held if manager._pool.ref_count(block_id) > 1]
        honest(self, request)
        if not manager.has(request.table):
            manager._release(shared)

    with patch.object(PrefillWorker, "_free_if_possible", free_if_possible):
        yield


@contextmanager
def quarantine_skipped() -> Iterator[None]:
    """D gives blocks back although a read may still write into them."""

    def drop(slot: Any, refuse: Any) -> Any:
        said = () if refuse is None else (refuse,)
        return replace(slot, phase=SlotPhase.GONE), (*said, GiveBack())

    with patch.object(slots, "_drop", drop):
        yield


@contextmanager
def late_write() -> Iterator[None]:
    """A transfer that was given up goes on writing into blocks that belong to others by then."""
    with patch.object(transport, "IS_FENCED", False):
        yield


@contextmanager
def generation_reused() -> Iterator[None]:
    """A block that is given out again keeps its generation."""
    honest = BlockPool.allocate

    def allocate(self: Any, n: int) -> Any:
        taken = honest(self, n)
        for block_id in taken:
            self._generations[block_id] = 1
        return taken

    with patch.object(BlockPool, "allocate", allocate):
        yield


@contextmanager
def cancel_lost() -> Iterator[None]:
    """R tells nobody when a request ends."""
    honest_send = Pools.send

    def end(state: Any, finish: Finish) -> Any:
        return replace(state, phase=finish.phase), (finish,)

    def send(self: Any, member: Any, command: Any) -> None:
        if not (isinstance(command, Cancel) and command.request_id not in self._lives):
            honest_send(self, member, command)

    with patch.object(requests, "_end", end), patch.object(Pools, "send", send):
        yield


@contextmanager
def tombstones_ignored() -> Iterator[None]:
    """Workers do not remember what has ended."""
    with patch.object(Tombstones, "covers", lambda self, request_id, attempt: False):
        yield


@contextmanager
def rebind_lowers_the_attempt() -> Iterator[None]:
    """P gives a lease to whoever asks last, an older attempt too."""
    with patch.object(leases, "rebind", lambda lease, attempt: replace(lease, attempt=attempt)):
        yield


@contextmanager
def digests_unchecked() -> Iterator[None]:
    """D does not look at what it has read."""
    with patch.object(transport, "find_mismatch", lambda store, sources, targets: ""):
        yield


@contextmanager
def orphans_kept() -> Iterator[None]:
    """Workers wait for ever for a router that fell silent."""
    with patch.object(Outbox, "is_silent", lambda self, session, *, now, limit_s: False):
        yield


@contextmanager
def loss_not_told() -> Iterator[None]:
    """R's requests do not hear that a worker was lost."""

    def session_lost(self: Any, member: Any, reason: str) -> None:
        self._index.drop(member)
        self.loads.forget(member)

    with patch.object(Pools, "session_lost", session_lost):
        yield


@contextmanager
def published_before_confirmed() -> Iterator[None]:
    """D shares pulled blocks before P has confirmed them."""
    honest = DecodeWorker._take_answer

    def take_answer(self: Any, request: Any, answer: Any) -> None:
        honest(self, request, answer)
        if isinstance(answer.event, slots.ReadEnded) and self._manager.has(request.table) and request.slot is not None:
            num_tokens = min(request.num_tokens, request.slot.num_requested * self._manager.block_size)
            self._manager.publish(request.table, num_tokens)

    with patch.object(DecodeWorker, "_take_answer", take_answer):
        yield


@contextmanager
def late_cancel_obeyed() -> Iterator[None]:
    """Workers end the attempt they have when an older one is cancelled."""

    def newest(honest: Any) -> Any:
        def cancel(self: Any, command: Any, *, now: float) -> None:
            request = self._requests.get(command.request_id)
            if request is not None and request.attempt > command.attempt:
                self._end(request, now=now)
            else:
                honest(self, command, now=now)

        return cancel

    with (
        patch.object(PrefillWorker, "_cancel", newest(PrefillWorker._cancel)),
        patch.object(DecodeWorker, "_cancel", newest(DecodeWorker._cancel)),
    ):
        yield


@contextmanager
def any_attempt_validates() -> Iterator[None]:
    """P confirms a lease to an attempt that it was taken from."""
    honest = leases.refusal

    def refusal(lease: Any, *, attempt: int, now: float) -> str:
        return honest(lease, attempt=attempt if lease is None else lease.attempt, now=now)

    with patch.object(leases, "refusal", refusal):
        yield


@contextmanager
def blocks_freed_under_a_step() -> Iterator[None]:
    """D gives a cancelled request's blocks back while the step that writes to them runs."""
    honest = DecodeWorker._end

    def end(self: Any, request: Any, *, now: float) -> None:
        was_in_step, request.is_in_step = request.is_in_step, False
        honest(self, request, now=now)
        request.is_in_step = was_in_step

    honest_free = KVCacheManager.free

    def free(self: Any, request_id: Any) -> None:
        if self.has(request_id):
            honest_free(self, request_id)

    honest_publish = KVCacheManager.publish

    def publish(self: Any, request_id: Any, num_computed_tokens: int) -> None:
        if self.has(request_id):
            honest_publish(self, request_id, num_computed_tokens)

    with (
        patch.object(DecodeWorker, "_end", end),
        patch.object(KVCacheManager, "free", free),
        patch.object(KVCacheManager, "publish", publish),
    ):
        yield


@contextmanager
def verdicts_always_good() -> Iterator[None]:
    """P confirms whatever it is asked."""
    honest = PrefillWorker.validate

    def validate(self: Any, asked: Any) -> Verdict:
        honest(self, asked)
        return Verdict(ok=True)

    with patch.object(PrefillWorker, "validate", validate):
        yield


@contextmanager
def newest_block_shared() -> Iterator[None]:
    """Choices of one prompt write to the block that they share."""

    def keep(self: Any, fork: Any) -> None:
        fork.is_fork = False

    with patch.object(DecodeScheduler, "_own_newest_block", keep):
        yield


@contextmanager
def silence_accepted() -> Iterator[None]:
    """Workers do not say that they have never heard of what R waits for."""
    with patch.object(Arrivals, "missing", lambda self, named, present, *, now: []):
        yield


PLANTS: dict[str, Plant] = {
    plant.__name__: plant
    for plant in (
        fence_off,
        index_out_of_order,
        validate_off,
        lease_without_time_limit,
        double_release,
        quarantine_skipped,
        late_write,
        generation_reused,
        cancel_lost,
        tombstones_ignored,
        rebind_lowers_the_attempt,
        digests_unchecked,
        orphans_kept,
        loss_not_told,
        published_before_confirmed,
        late_cancel_obeyed,
        any_attempt_validates,
        blocks_freed_under_a_step,
        verdicts_always_good,
        newest_block_shared,
        silence_accepted,
    )
}
