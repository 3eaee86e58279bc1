"""P's pages, registered for one-sided reads. Owns the agent; who may read what is the lease's, asked after the read."""

from __future__ import annotations

from duopool.core.types import Incarnation, WorkerId
from duopool.engine.transfer.nixl_agent import NixlAgent
from duopool.engine.transfer.page_store import PageStore


class NixlSource:
    """Registers all pages of `store` at once. Raises ImportError without NIXL, TransferFailed if it will not start."""

    def __init__(self, store: PageStore, *, worker_id: WorkerId, incarnation: Incarnation) -> None:
        self._agent: NixlAgent | None = NixlAgent(store, f"source-{worker_id}-{incarnation:016x}")
        self._agent_metadata = self._agent.metadata

    @property
    def agent_metadata(self) -> bytes:
        """What a reader's agent must know to connect to this one."""
        return self._agent_metadata

    def close(self) -> None:
        """Nobody can read the pages any more."""
        if self._agent is not None:
            self._agent.close()
            self._agent = None
