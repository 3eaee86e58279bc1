"""`duopool status`, `scale`, `drain` and `restart`: the Admin service of a running router."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from google.protobuf.json_format import MessageToJson
from rich.table import Table

from duopool.cluster.admin_access import admin_stub
from duopool.cluster.terminal import EXIT_FAILED, EXIT_USAGE, clear_errors, complain, out
from duopool.proto import inference_pb2 as pb

DEFAULT_ADDRESS = "127.0.0.1:50051"
CALL_TIMEOUT_S = 15.0
POLL_S = 0.3

Address = Annotated[str, typer.Option(help="HOST:PORT of the router.", envvar="DUOPOOL_ADDRESS")]
Wait = Annotated[float, typer.Option(min=0, help="Seconds to wait until it has happened; 0 does not wait.")]


def status(
    address: Address = DEFAULT_ADDRESS,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole state as JSON.")] = False,
) -> None:
    """Show the pools and every worker: requests, KV blocks, counters."""
    with admin_of(address) as admin:
        state = admin.ClusterState(pb.ClusterStateRequest(), timeout=CALL_TIMEOUT_S)
    if as_json:
        typer.echo(MessageToJson(state, preserving_proto_field_name=True, always_print_fields_with_no_presence=True))
        return
    sizes = ", ".join(f"{pool.role} {pool.ready}/{pool.wanted}" for pool in state.pools)
    out.print(f"{state.model} (duopool {state.version}): {sizes}; {state.requests} requests", highlight=False)
    out.print(worker_table(state))


def worker_table(state: pb.ClusterStateResponse) -> Table:
    """One row per worker."""
    table = Table("worker", "state", "pid", *_NUMBERS, header_style="bold")
    for column in table.columns[2:]:
        column.justify = "right"
    for worker in state.workers:
        numbers = [worker.waiting, worker.running, worker.blocks, worker.free_blocks, worker.cached_blocks]
        totals = [worker.leases, worker.computed_tokens, worker.pulled_blocks, worker.preemptions]
        cells = [str(number) for number in (worker.pid, *numbers, *totals)]
        table.add_row(worker.worker_id, worker.state, *cells, f"{worker.step_s * 1e3:.1f}")
    return table


_NUMBERS = (
    "waiting",
    "running",
    "blocks",
    "free",
    "cached",
    "leases",
    "computed tokens",
    "pulled blocks",
    "preempted",
    "step ms",
)


def scale(
    sizes: Annotated[list[str], typer.Argument(help="POOL=N, such as prefill=2 decode=3.", metavar="POOL=N...")],
    address: Address = DEFAULT_ADDRESS,
    wait: Wait = 120.0,
) -> None:
    """Set the size of each named pool; running requests of workers that go move to the others first."""
    pools = _parse_sizes(sizes)
    with admin_of(address) as admin:
        admin.Scale(pb.ScaleRequest(pools=pools), timeout=CALL_TIMEOUT_S)
        _wait_until(admin, wait, lambda state: _is_at_size(state, pools))


def drain(
    worker_id: Annotated[str, typer.Argument(help="Worker to drain, such as decode-0; see 'duopool status'.")],
    address: Address = DEFAULT_ADDRESS,
    wait: Wait = 120.0,
) -> None:
    """Move a worker's running requests to others and stop it; its pool gets another worker in its stead."""
    with admin_of(address) as admin:
        state = admin.ClusterState(pb.ClusterStateRequest(), timeout=CALL_TIMEOUT_S)
        life = next((worker.incarnation for worker in state.workers if worker.worker_id == worker_id), 0)
        admin.Drain(pb.DrainRequest(worker_id=worker_id, incarnation=life), timeout=CALL_TIMEOUT_S)
        _wait_until(admin, wait, lambda state: all(worker.incarnation != life for worker in state.workers))


def restart(
    rolling: Annotated[bool, typer.Option("--rolling", help="One worker after the other; required.")] = False,
    drain_first: Annotated[
        bool,
        typer.Option(
            "--drain-first", help="Take a worker away before its successor starts: needs no room for one more."
        ),
    ] = False,
    address: Address = DEFAULT_ADDRESS,
    wait: Wait = 1200.0,
) -> None:
    """Renew every worker while the others go on: no stream ends, and each pool keeps its size.

    A successor is started first, then the old worker is drained; with --drain-first a pool lacks one worker meanwhile.
    """
    if not rolling:
        complain("say --rolling: workers are renewed one after the other, and no other way is offered")
        raise typer.Exit(EXIT_USAGE)
    with admin_of(address) as admin:
        before = admin.ClusterState(pb.ClusterStateRequest(), timeout=CALL_TIMEOUT_S)
        old = {(worker.node_id, worker.pid) for worker in before.workers}
        sizes = {pool.role: pool.wanted for pool in before.pools}
        admin.Restart(pb.RestartRequest(drain_first=drain_first), timeout=CALL_TIMEOUT_S)
        _wait_until(
            admin,
            wait,
            lambda now: _is_at_size(now, sizes) and not old & {(one.node_id, one.pid) for one in now.workers},
        )


@contextmanager
def admin_of(address: str) -> Iterator[Any]:
    """The Admin service of a router; what it refuses becomes one line and an exit code."""
    with clear_errors(address), admin_stub(address) as stub:
        yield stub


def _parse_sizes(sizes: list[str]) -> dict[str, int]:
    pools: dict[str, int] = {}
    for text in sizes:
        name, _, number = text.partition("=")
        if not name or not number.isdecimal():
            complain(f"{text!r}: expected POOL=N, such as decode=3")
            raise typer.Exit(EXIT_USAGE)
        pools[name] = int(number)
    return pools


def _is_at_size(state: pb.ClusterStateResponse, pools: dict[str, int]) -> bool:
    """True if the named pools have exactly as many workers as wanted, all ready."""
    return all(
        [worker.state for worker in state.workers if worker.role == role] == ["ready"] * size
        for role, size in pools.items()
    )


def _wait_until(admin: Any, wait_s: float, is_done: Callable[[pb.ClusterStateResponse], bool]) -> None:
    if wait_s == 0:
        return
    deadline = time.monotonic() + wait_s
    while not is_done(state := admin.ClusterState(pb.ClusterStateRequest(), timeout=CALL_TIMEOUT_S)):
        if time.monotonic() > deadline:
            out.print(worker_table(state))
            complain(f"it has not happened within {wait_s:.0f} s")
            raise typer.Exit(EXIT_FAILED)
        time.sleep(POLL_S)
    out.print(worker_table(state))
