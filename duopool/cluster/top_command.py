"""`duopool top`: both pools in the terminal, once a second.

With the extra `top` (textual) rows can be sorted by keys; without it rich draws the same picture.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.live import Live

from duopool.cluster.admin_commands import CALL_TIMEOUT_S, DEFAULT_ADDRESS, Address, admin_of
from duopool.cluster.terminal import out
from duopool.cluster.top_view import SORTS, Look, picture
from duopool.proto import inference_pb2 as pb


def top(
    address: Address = DEFAULT_ADDRESS,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, print it and end.")] = False,
) -> None:
    """Watch the pools: KV blocks, running and waiting requests, step times. Ctrl-C or q ends it."""
    with admin_of(address) as admin:
        look = _looker(admin)
        if once or not out.is_terminal:
            out.print(picture(None, look()))
        elif importlib.util.find_spec("textual") is not None:
            _run_app(look, interval)
        else:
            _run_live(look, interval)


def _looker(admin: Any) -> Callable[[], Look]:
    def look() -> Look:
        return Look(state=admin.ClusterState(pb.ClusterStateRequest(), timeout=CALL_TIMEOUT_S), at=time.monotonic())

    return look


def _run_live(look: Callable[[], Look], interval_s: float) -> None:
    before = look()
    try:
        with Live(picture(None, before), console=out, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(interval_s)
                now = look()
                live.update(picture(before, now), refresh=True)
                before = now
    except KeyboardInterrupt:
        return


def _run_app(look: Callable[[], Look], interval_s: float) -> None:
    from textual.app import App, ComposeResult
    from textual.containers import VerticalScroll
    from textual.widgets import Footer, Static

    class Top(App[None]):  # type: ignore[misc]
        BINDINGS = [("q", "quit", "Quit"), ("s", "sort", "Sort"), ("space", "pause", "Pause")]  # noqa: RUF012
        before: Look | None = None
        now: Look | None = None
        sort = 0
        is_paused = False

        def compose(self) -> ComposeResult:
            with VerticalScroll():
                yield Static(id="picture")
            yield Footer()

        def on_mount(self) -> None:
            self.title = "duopool top"
            self.look()
            self.set_interval(interval_s, self.look)

        def look(self) -> None:
            if not self.is_paused:
                self.run_worker(self.fetch, thread=True, exclusive=True)

        def fetch(self) -> None:
            self.before, self.now = self.now, look()
            self.call_from_thread(self.draw)

        def draw(self) -> None:
            if self.now is not None:
                self.query_one("#picture", Static).update(picture(self.before, self.now, sort=SORTS[self.sort]))

        def action_sort(self) -> None:
            self.sort = (self.sort + 1) % len(SORTS)
            self.draw()

        def action_pause(self) -> None:
            self.is_paused = not self.is_paused

    Top().run()
