"""What happened in one run: kept cheaply, hashed whole, and put into words only when somebody wants to read it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from duopool.core.messages import (
    BlocksReady,
    CommandBatch,
    Heartbeat,
    KvChanged,
    KvSnapshot,
    Prefill,
    Reserve,
    StepReport,
    WorkerLoad,
)
from duopool.proto import codec

NOISE = (Heartbeat, WorkerLoad, KvChanged, KvSnapshot)
"""Said all the time; left out when a history is printed."""


@dataclass(frozen=True, slots=True)
class _Entry:
    at: float
    place: str
    what: str
    data: bytes


class History:
    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._entries: list[_Entry] = []
        self.is_closed = False

    def note(self, place: str, what: str, data: bytes = b"") -> None:
        """`data` is a session message as it was on the wire."""
        if not self.is_closed:
            self._entries.append(_Entry(self._clock(), place, what, data))

    def __len__(self) -> int:
        return len(self._entries)

    def digest(self) -> str:
        """Equal for two runs in which the same things happened at the same times."""
        whole = hashlib.blake2b(digest_size=8)
        for entry in self._entries:
            whole.update(f"{entry.at!r} {entry.place} {entry.what} ".encode())
            whole.update(entry.data)
        return whole.hexdigest()

    def lines(self) -> Iterator[str]:
        for entry in self._entries:
            head = f"{entry.at:9.4f}  {entry.place:<10} {entry.what}"
            if not entry.data:
                yield head
            for message in _messages(entry):
                yield f"{head} {message}"


def _messages(entry: _Entry) -> Iterator[str]:
    if not entry.data:
        return
    batch: CommandBatch | StepReport
    if "command" in entry.what:
        batch = codec.decode_commands(entry.data)
        messages = batch.commands
    else:
        batch = codec.decode_report(entry.data)
        messages = batch.events  # type: ignore[assignment]
    for message in messages:
        if not isinstance(message, NOISE):
            yield _words(message)


def _words(message: object) -> str:
    match message:
        case Prefill(request=request, attempt=attempt) | Reserve(request=request, attempt=attempt):
            kind = type(message).__name__ + (" local" if getattr(message, "local_prefill", False) else "")
            shape = f"{len(request.prompt_token_ids)} prompt and {len(request.output_token_ids)} output tokens"
            return f"{kind} {request.request_id[:6]}/{attempt} ({shape}, seed {request.params.seed})"
        case BlocksReady():
            blocks = " ".join(f"{block.block_id}g{block.generation}" for block in message.blocks)
            first = "" if message.first_token is None else f", first token at {message.first_token.index}"
            lease = f"lease {message.lease.lease_id % 10000:04d}"
            return f"BlocksReady {message.request_id[:6]}/{message.attempt} {lease}: blocks {blocks}{first}"
        case _:
            fields = {name: getattr(message, name) for name in message.__struct_fields__}  # type: ignore[attr-defined]
            head = f"{type(message).__name__} {fields.pop('request_id', '')[:6]}/{fields.pop('attempt', '')}"
            rest = ", ".join(f"{name} {value}" for name, value in fields.items() if value not in ("", None, (), 0.0))
            return f"{head} {rest}".rstrip()
