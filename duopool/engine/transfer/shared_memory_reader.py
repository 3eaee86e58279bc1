"""Reads pages of processes on the same host out of their memory, which is mapped here: one pass copies and digests.

Life of a read, on the reader's one thread, which sleeps when there is nothing to do:
1. The source's description is asked for once per (worker, incarnation), and its memory attached. What cannot be had
   (another host, another user, a device) is left to `others`, a reader that goes over the network.
2. Pages are copied, COPY_BYTES to a call; between calls the reader looks whether the read is late or it is closed
   itself. When `done` runs nothing writes into the targets any more, whatever became of the read.
3. The memory of a process that has ended is let go at once: as long as it is mapped here it is not free.
"""

from __future__ import annotations

import os
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from duopool.core.messages import LeaseRef, SealedBlock, SourceDescription, Verdict
from duopool.core.types import BlockId
from duopool.engine.shared_memory import AttachedMemory, attach
from duopool.engine.transfer.digest import mismatch
from duopool.engine.transfer.page_read import PageRead, PeerId
from duopool.engine.transfer.page_store import PageStore
from duopool.engine.transfer.source_client import SourceClient, misfit
from duopool.engine.transfer.transport import BlockReader, ReadOutcome
from duopool.kernels import ops

COPY_BYTES = 16 << 20
"""One to four milliseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Peer:
    num_blocks: int
    memory: AttachedMemory


class SharedMemoryReader:
    """A `BlockReader`. `others` reads what cannot be read this way, asks for verdicts, and ends with this reader."""

    def __init__(
        self,
        store: PageStore,
        *,
        client: SourceClient,
        others: BlockReader,
        read_timeout_s: float = 5.0,
        copy_pages: Callable[..., list[int]] = ops.copy_pages,
    ) -> None:
        self._store = store
        self._copy_pages = copy_pages
        self._client = client
        self._others = others
        self._read_timeout_s = read_timeout_s
        self._pages_per_call = max(1, COPY_BYTES // store.page_bytes)
        self._peers: dict[PeerId, _Peer] = {}
        self._introduced: dict[PeerId, list[PageRead]] = {}
        """Reads that came before their source's description."""
        self._elsewhere: set[PeerId] = set()
        """Sources whose memory is not to be had here."""
        self._lock = threading.Lock()
        self._inbox: deque[Callable[[], None]] = deque()
        self._closed = False
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._bell, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="shared-memory-reader")
        self._thread.start()

    def read(
        self,
        lease: LeaseRef,
        attempt: int,
        sources: Sequence[SealedBlock],
        targets: Sequence[BlockId],
        done: Callable[[ReadOutcome], None],
    ) -> None:
        """Pull `sources` into own pages `targets`. Raises RuntimeError once closed."""
        read = PageRead.of(lease, attempt, sources, targets, done, timeout_s=self._read_timeout_s)
        if not self._post(lambda: self._begin(read)):
            raise RuntimeError("the reader is closed")

    def confirm(self, lease: LeaseRef, attempt: int, done: Callable[[Verdict], None]) -> None:
        """Ask for P's verdict, releasing the lease if it is good. Raises RuntimeError once closed."""
        self._others.confirm(lease, attempt, done)

    def close(self) -> None:
        """End all reads (their `done` gets an error), let all memory go, end the thread and `others`."""
        with self._lock:
            self._closed = True
            self._ring()
        self._thread.join()
        self._others.close()

    def _post(self, step: Callable[[], None]) -> bool:
        """Have the thread do it; False once closed."""
        with self._lock:
            if self._closed:
                return False
            self._inbox.append(step)
            self._ring()
            return True

    def _ring(self) -> None:
        if self._bell >= 0:
            os.eventfd_write(self._bell, 1)

    # ---- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closed:
                for key, _ in self._selector.select():
                    if key.fd == self._bell:
                        os.eventfd_read(self._bell)
                    else:
                        self._detach(key.data)
                for _ in range(len(self._inbox)):
                    self._inbox.popleft()()
        finally:  # closed, or a bug: no read may wait forever
            self._end()

    def _begin(self, read: PageRead) -> None:
        peer_id = read.peer_id
        if self._closed:
            read.done(ReadOutcome(error="the reader is closed"))
        elif peer_id in self._peers:
            read.done(self._copy(self._peers[peer_id], read))
        elif peer_id in self._elsewhere:
            self._leave_to_others(read)
        elif peer_id in self._introduced:
            self._introduced[peer_id].append(read)
        else:
            self._introduce(read)

    def _introduce(self, read: PageRead) -> None:
        """Ask a new source how it can be read; an earlier life of the same worker is forgotten."""
        worker_id, _ = peer_id = read.peer_id
        for known in [known for known in self._peers if known[0] == worker_id]:
            self._detach(known)
        self._elsewhere = {known for known in self._elsewhere if known[0] != worker_id}
        self._introduced[peer_id] = [read]

        def described(answer: SourceDescription | str) -> None:
            self._post(lambda: self._described(peer_id, answer))

        try:
            self._client.describe(read.lease.source_address, "shared_memory", described)
        except RuntimeError as closed:
            described(str(closed))

    def _described(self, peer_id: PeerId, answer: SourceDescription | str) -> None:
        if self._closed:
            answer = "the reader is closed"
        fault = answer if isinstance(answer, str) else misfit(answer, peer_id, self._store)
        if not fault and not isinstance(answer, str):
            self._attach(peer_id, answer)
        for read in self._introduced.pop(peer_id):
            if fault:
                read.done(ReadOutcome(error=fault))
            else:
                self._begin(read)

    def _attach(self, peer_id: PeerId, description: SourceDescription) -> None:
        num_blocks = description.num_blocks
        try:
            if description.memory is None:
                raise OSError("the source's memory cannot be mapped")
            memory = attach(description.memory, num_blocks * self._store.page_bytes)
        except OSError:
            self._elsewhere.add(peer_id)
            return
        self._peers[peer_id] = _Peer(num_blocks=num_blocks, memory=memory)
        self._selector.register(memory.owner, selectors.EVENT_READ, peer_id)

    def _detach(self, peer_id: PeerId) -> None:
        memory = self._peers.pop(peer_id).memory
        self._selector.unregister(memory.owner)
        memory.close()

    def _copy(self, peer: _Peer, read: PageRead) -> ReadOutcome:
        if any(not 0 <= block.block_id < peer.num_blocks for block in read.sources):
            return ReadOutcome(error=f"a block is outside the source's store of {peer.num_blocks}")
        for begin in range(0, len(read.sources), self._pages_per_call):
            if self._closed:
                return ReadOutcome(error="the reader is closed")
            if time.monotonic() >= read.late_at:
                return ReadOutcome(error=f"the read took longer than {self._read_timeout_s:.1f} s")
            sources = read.sources[begin : begin + self._pages_per_call]
            digests = self._copy_pages(
                peer.memory.address,
                [block.block_id for block in sources],
                self._store.base_address,
                read.targets[begin : begin + self._pages_per_call],
                page_bytes=self._store.page_bytes,
            )
            if digests != [source.digest for source in sources]:
                faults = map(mismatch, sources, digests)
                return ReadOutcome(error=next(filter(None, faults)), is_damaged=True)
        return ReadOutcome(num_bytes=len(read.targets) * self._store.page_bytes)

    def _leave_to_others(self, read: PageRead) -> None:
        try:
            self._others.read(read.lease, read.attempt, read.sources, read.targets, read.done)
        except RuntimeError as closed:
            read.done(ReadOutcome(error=str(closed)))

    def _end(self) -> None:
        with self._lock:
            self._closed = True
            bell, self._bell = self._bell, -1
        while self._inbox:
            self._inbox.popleft()()  # reads that were never begun end with an error
        for read in [read for reads in self._introduced.values() for read in reads]:
            read.done(ReadOutcome(error="the reader is closed"))
        for peer_id in tuple(self._peers):
            self._detach(peer_id)
        self._selector.close()
        os.close(bell)
