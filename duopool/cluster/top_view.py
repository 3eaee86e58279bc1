"""What `duopool top` shows of two looks at a router: a pure function from states to a picture."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from duopool.proto import inference_pb2 as pb

BAR_WIDTH = 24
SORTS = ("worker", "running", "waiting", "usage")
"""What rows can be ordered by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One answer of the Admin service and when it came."""

    state: pb.ClusterStateResponse
    at: float
    """On the local monotonic clock."""


def picture(before: Look | None, now: Look, *, sort: str = "worker") -> RenderableType:
    """Header and one table per pool; rates need an earlier look."""
    state = now.state
    title = Text.assemble(
        (state.model, "bold"),
        f"  duopool {state.version}  {state.requests} requests  {tokens_per_s(before, now):,.0f} computed tokens/s",
    )
    return Group(title, *(_pool(pool, state, sort) for pool in state.pools))


def tokens_per_s(before: Look | None, now: Look) -> float:
    """Tokens whose KV was computed between two looks, by workers that were there at both."""
    if before is None or now.at <= before.at:
        return 0.0
    then = {(worker.worker_id, worker.pid): worker.computed_tokens for worker in before.state.workers}
    grown = (
        worker.computed_tokens - then[worker.worker_id, worker.pid]
        for worker in now.state.workers
        if (worker.worker_id, worker.pid) in then
    )
    return float(sum(grown)) / (now.at - before.at)


def usage(worker: pb.WorkerState) -> float:
    """Share of KV blocks that requests hold."""
    return 1 - (worker.free_blocks + worker.cached_blocks) / worker.blocks if worker.blocks else 0.0


def _pool(pool: pb.PoolState, state: pb.ClusterStateResponse, sort: str) -> Table:
    table = Table(
        "worker", "state", "KV blocks: used, cached, free", "running", "waiting", "leases", "step ms",
        title=f"{pool.role}  {pool.ready}/{pool.wanted}", title_justify="left", header_style="bold", expand=False,
    )  # fmt: skip
    for column in table.columns[3:]:
        column.justify = "right"
    workers = [worker for worker in state.workers if worker.role == pool.role]
    keys = {
        "running": lambda worker: (-worker.running, worker.worker_id),
        "waiting": lambda worker: (-worker.waiting, worker.worker_id),
        "usage": lambda worker: (-usage(worker), worker.worker_id),
    }
    for worker in sorted(workers, key=keys.get(sort, lambda worker: (worker.worker_id,))):
        numbers = (worker.running, worker.waiting, worker.leases)
        style = "" if worker.state == "ready" else "yellow" if worker.state == "draining" else "red"
        cells = (*map(str, numbers), f"{worker.step_s * 1e3:.1f}")
        table.add_row(worker.worker_id, Text(worker.state, style), _bar(worker), *cells)
    return table


def _bar(worker: pb.WorkerState) -> Text:
    used = round(BAR_WIDTH * usage(worker))
    held = round(BAR_WIDTH * (1 - worker.free_blocks / worker.blocks)) if worker.blocks else 0
    return Text.assemble(
        ("█" * used, "green"),
        ("▓" * max(0, held - used), "blue"),
        ("░" * (BAR_WIDTH - max(used, held)), "bright_black"),
        f" {100 * usage(worker):3.0f} %",
    )
