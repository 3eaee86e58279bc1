"""What a worker has to say, and to whom.

Owns the open sessions, when each was last heard, the order of events and the sequence numbers of KV events. Does not
send anything: a service takes the events away. Not thread-safe; the worker's lock covers it.
"""

from __future__ import annotations

import msgspec

from duopool.core.kv_events import net_changes
from duopool.core.kv_manager import KVCacheManager
from duopool.core.ledger import Owner
from duopool.core.messages import Event, KvChanged, KvSnapshot, KvStoredSegment, Nack, NackReason, WorkerLoad
from duopool.core.types import RequestId
from duopool.core.worker import Addressed, SessionId

BUSY_RETRY_AFTER_S = 0.5
"""When a router may ask a busy worker again."""
MOST_SILENT_TICKS = 5
"""A worker that does nothing says so this often: far from what a watchdog waits for, and next to nothing to send."""


class Outbox:
    """Events in the order they happened. Nothing is kept for a session that is not open."""

    def __init__(self) -> None:
        self._events: list[Addressed] = []
        self._open: set[SessionId] = set()
        self._heard_at: dict[SessionId, float] = {}
        """When each session gave its last sign of life; closed ones stay until they are swept."""
        self._sequence = 0
        self._load: WorkerLoad | None = None
        """What every session was told last."""

    def open(self, session: SessionId, *, now: float) -> None:
        self._open.add(session)
        self._heard_at[session] = now

    def close(self, session: SessionId, *, now: float) -> None:
        self._open.discard(session)
        self._heard_at[session] = now

    def heard(self, session: SessionId, *, now: float) -> None:
        """The session gave a sign of life."""
        self._heard_at[session] = now

    def is_silent(self, session: SessionId, *, now: float, limit_s: float) -> bool:
        """True if the session has not been heard for `limit_s` seconds, or is not known."""
        heard_at = self._heard_at.get(session)
        return heard_at is None or now - heard_at >= limit_s

    def owner(self, session: SessionId, *, asker: SessionId) -> Owner:
        """Whose a session's requests are to the router that asks."""
        if session == asker:
            return Owner.ASKER
        return Owner.OTHER if session in self._open else Owner.GONE

    def silent_s(self, session: SessionId, *, now: float) -> float:
        """How long the session has given no sign of life; for ever if it is not known."""
        return now - self._heard_at.get(session, float("-inf"))

    def sweep(self, *, now: float, limit_s: float) -> None:
        """Forget closed sessions after `limit_s` seconds."""
        for session in [one for one in self._heard_at if one not in self._open]:
            if now - self._heard_at[session] >= limit_s:
                del self._heard_at[session]

    def say(self, session: SessionId, event: Event) -> None:
        """To one session."""
        if session in self._open:
            self._events.append(Addressed(session, event))

    def refuse(self, session: SessionId, request_id: RequestId, attempt: int, reason: NackReason, detail: str) -> None:
        """Tell one session that an attempt is not, or no longer, served here."""
        retry_after_s = BUSY_RETRY_AFTER_S if reason is NackReason.BUSY else 0.0
        nack = Nack(request_id=request_id, attempt=attempt, reason=reason, detail=detail, retry_after_s=retry_after_s)
        self.say(session, nack)

    def say_to_all(self, event: Event) -> None:
        """To every session."""
        if self._open:
            self._events.append(Addressed(None, event))

    def say_load(self, load: WorkerLoad) -> None:
        """Tell every session how busy the worker is; where only time has passed, every `MOST_SILENT_TICKS` ticks."""
        if self._load is None or not _is_old_news(load, self._load):
            self._load = load
            self.say_to_all(load)

    def say_kv_changes(self, manager: KVCacheManager) -> None:
        """Tell every session what became cached and what was evicted since the last call."""
        removed, stored = net_changes(manager.drain_events())
        if not removed and not stored:
            return
        self._sequence += 1
        segments = tuple(KvStoredSegment(parent=piece.parent, keys=piece.keys) for piece in stored)
        self.say_to_all(KvChanged(sequence=self._sequence, stored=segments, removed=removed))

    def say_kv_snapshot(self, session: SessionId, manager: KVCacheManager) -> None:
        """Tell one session everything that is cached; the others hear of the latest changes first."""
        self.say_kv_changes(manager)
        self.say(session, KvSnapshot(sequence=self._sequence, paths=tuple(manager.snapshot())))

    def take(self) -> tuple[Addressed, ...]:
        """Empty the box."""
        events, self._events = self._events, []
        return tuple(events)


def _is_old_news(load: WorkerLoad, told: WorkerLoad) -> bool:
    """Only time has passed, and little of it."""
    is_recent = load.num_ticks - told.num_ticks < MOST_SILENT_TICKS
    return is_recent and load == msgspec.structs.replace(told, num_ticks=load.num_ticks)
