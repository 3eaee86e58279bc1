"""One process's NIXL agent with its registered pages: the only file that knows NIXL's calls.

All calls come from one thread. A transfer that was begun may write into the pages until it is `done`, or until the
whole agent is closed: NIXL's `release` of a running transfer only asks UCX to cancel, which UCX may not be able to
(https://github.com/ai-dynamo/nixl, src/plugins/ucx/ucx_backend.cpp), so a running transfer is never released alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from duopool.core.errors import TransferFailed
from duopool.core.messages import SourceDescription
from duopool.core.types import BlockId
from duopool.engine.transfer import nixl_library
from duopool.engine.transfer.page_store import PageStore

PROGRESS_DELAY_US = 100_000
"""How long the progress thread sleeps when nothing happens; events wake it. NIXL's own 0 burns a whole core."""


class NixlPeer:
    """Another agent whose pages this one can read."""

    def __init__(self, name: str, pages: Any) -> None:
        self.name = name
        self.pages = pages


class NixlAgent:
    """Registers the pages of `store` once; reads between them and those of peers. Raises TransferFailed."""

    def __init__(self, store: PageStore, name: str) -> None:
        self._api = nixl_library.load()
        self._bindings = self._api.nixlBind
        self._errors = tuple(
            value for value in vars(self._bindings).values() if isinstance(value, type) and issubclass(value, Exception)
        )
        self._store = store
        self._peers: set[NixlPeer] = set()
        self._begun: set[Any] = set()
        """Transfers that have not ended well: what of them still runs ends with the agent."""
        try:
            self._agent = self._make(name)
            self._memory = self._agent.register_memory(
                [(store.base_address, store.num_blocks * store.page_bytes, 0, "")], "DRAM"
            )
            self._own_pages = self._page_list("NIXL_INIT_AGENT", store.base_address, store.num_blocks)
            self.metadata = bytes(self._agent.get_agent_metadata())
        except self._errors as error:
            raise TransferFailed(f"no NIXL agent: {error}") from error

    def connect(self, description: SourceDescription) -> NixlPeer:
        """Make the pages of another agent readable."""
        try:
            name = self._agent.add_remote_agent(description.agent_metadata)
            name = name.decode() if isinstance(name, bytes) else name
            peer = NixlPeer(name, self._page_list(name, description.base_address, description.num_blocks))
        except self._errors as error:
            raise TransferFailed(f"no connection: {error}") from error
        self._peers.add(peer)
        return peer

    def disconnect(self, peer: NixlPeer) -> None:
        """Forget a peer that no transfer reads from any more."""
        self._peers.discard(peer)
        with contextlib.suppress(*self._errors):  # it may be gone already
            self._let_go(peer.pages)
            self._agent.remove_remote_agent(peer.name)

    def begin(self, peer: NixlPeer, sources: Sequence[BlockId], targets: Sequence[BlockId]) -> Any:
        """Start to read the peer's pages `sources` over own pages `targets`; the transfer to poll."""
        try:
            transfer = self._agent.make_prepped_xfer(
                "READ",
                self._own_pages,
                np.asarray(targets, dtype=np.int32),
                peer.pages,
                np.asarray(sources, dtype=np.int32),
            )
        except self._errors as error:
            raise TransferFailed(f"the read could not be prepared: {error}") from error
        self._begun.add(transfer)
        try:
            state = self._agent.transfer(transfer)
        except self._errors as error:
            raise TransferFailed(f"the read could not begin: {error}") from error
        if state == "ERR":
            raise TransferFailed("the read could not begin")
        return transfer

    def is_done(self, transfer: Any) -> bool:
        """True when every page has arrived; the transfer is released then."""
        try:
            state = self._agent.check_xfer_state(transfer)
            if state == "DONE":
                transfer.release()
                self._begun.discard(transfer)
        except self._errors as error:
            raise TransferFailed(f"the read broke: {error}") from error
        if state == "ERR":
            raise TransferFailed("the read broke")
        return bool(state == "DONE")

    def close(self) -> None:
        """Give up all that runs and take the agent down: afterwards nothing can write into the pages."""
        for peer in tuple(self._peers):
            self.disconnect(peer)
        for handle in (*self._begun, self._own_pages):
            self._let_go(handle)
        self._begun.clear()
        with contextlib.suppress(*self._errors):  # else the agent's end does it
            self._agent.deregister_memory(self._memory)
        del self._own_pages, self._memory, self._agent

    def _let_go(self, handle: Any) -> None:
        """Release a handle and its reference to the agent, which lives on while any is left."""
        with contextlib.suppress(*self._errors):  # else the agent's end frees it
            handle.release()
        handle._released, handle._agent = True, None

    def _make(self, name: str) -> Any:
        """An agent whose progress thread waits for events; NIXL's Python face has no setting for that."""
        agent = self._api.nixl_agent(name, self._api.nixl_agent_config(enable_prog_thread=False, backends=[]))
        config = self._bindings.nixlAgentConfig()
        config.useProgThread = True
        config.useListenThread = False
        config.syncMode = self._bindings.NIXL_THREAD_SYNC_NONE
        config.pthrDelay = PROGRESS_DELAY_US
        config.captureTelemetry = False
        agent.agent = self._bindings.nixlAgent(name, config)
        agent.create_backend("UCX")
        return agent

    def _page_list(self, agent_name: str, base_address: int, num_blocks: int) -> Any:
        pages = np.zeros((num_blocks, 3), dtype=np.uint64)
        page_bytes = np.uint64(self._store.page_bytes)
        pages[:, 0] = np.uint64(base_address) + np.arange(num_blocks, dtype=np.uint64) * page_bytes
        pages[:, 1] = page_bytes
        return self._agent.prep_xfer_dlist(agent_name, pages, "DRAM")
