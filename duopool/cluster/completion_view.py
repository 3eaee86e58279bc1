"""Shows streams as they come and a table of stage times when they have ended."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from duopool.cluster.completions import Completion
from duopool.cluster.terminal import describe

TEXT_LINES = 3


class StreamView:
    """All streams side by side on a terminal; elsewhere a line whenever a stream has one, under its title."""

    def __init__(self, titles: Sequence[str], console: Console) -> None:
        self._titles = titles
        self._console = console
        self._records: dict[int, Completion] = {}
        self._pending = ["" for _ in titles]
        self._live = Live(console=console, refresh_per_second=10, get_renderable=self._render)

    def __enter__(self) -> StreamView:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def update(self, at: int, record: Completion, text: str) -> None:
        """`OnUpdate` of `complete_all`."""
        self._records[at] = record
        if not self._console.is_terminal:
            self._print_lines(at, text, is_over=record.finished is not None or record.error is not None)

    def _print_lines(self, at: int, text: str, *, is_over: bool) -> None:
        *lines, rest = (self._pending[at] + text).split("\n")
        while len(rest) > 100 and " " in rest[:100].strip():
            head, _, tail = rest[:100].rpartition(" ")
            lines.append(head)
            rest = tail + rest[100:]
        if is_over and rest:
            lines, rest = [*lines, rest], ""
        self._pending[at] = rest
        for line in lines:
            if line.strip():
                self._console.print(Text(f"{self._titles[at]:>8} | {line}"), soft_wrap=True)

    def _render(self) -> Group:
        width = max(20, self._console.width - 4)
        panels = []
        for at, title in enumerate(self._titles):
            record = self._records.get(at)
            text = record.text if record is not None else ""
            lines = [line for part in text.split("\n") for line in _pieces(part, width)][-TEXT_LINES:]
            style = "green" if record is not None and record.finished is not None else "cyan"
            panels.append(Panel(Text("\n".join(lines)), title=title, title_align="left", border_style=style))
        return Group(*panels)


def stage_table(titles: Sequence[str], records: Sequence[Completion]) -> Table:
    """One row per request. Times are what router and workers measured, in milliseconds; MB is the KV pulled; ITL is
    the mean time between tokens as they came here, and tokens per second follow from it.
    """
    table = Table(header_style="bold", title="times in ms", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("request", no_wrap=True)
    for name in ("prompt", "cached", "out"):
        table.add_column(name, justify="right")
    table.add_column("workers", no_wrap=True)
    for name in ("queue", "prefill", "transfer", "MB", "TTFT", "ITL", "tok/s"):
        table.add_column(name, justify="right")
    for title, record in zip(titles, records, strict=True):
        if record.finished is None:
            said = describe(record.error) if record.error is not None else "the stream ended early"
            table.add_row(title, *[""] * 3, Text(said, style="red"))
            continue
        usage, times = record.finished.usage, record.finished.times
        workers = f"{_short(record.finished.prefill_worker)}>{_short(record.finished.decode_worker)}"
        between_s = record.mean_inter_token_s
        table.add_row(
            title,
            str(usage.prompt_tokens),
            str(usage.cached_tokens),
            str(usage.completion_tokens),
            workers,
            *(f"{seconds * 1e3:.0f}" for seconds in (times.queue_s, times.prefill_s, times.transfer_s)),
            f"{times.transfer_bytes / 1e6:.1f}",
            f"{times.time_to_first_token_s * 1e3:.0f}",
            f"{between_s * 1e3:.1f}" if between_s == between_s else "-",
            f"{1 / between_s:.1f}" if between_s > 0 else "-",
        )
    return table


def _pieces(line: str, width: int) -> list[str]:
    return [line[start : start + width] for start in range(0, len(line), width)] or [""]


def _short(worker_id: str) -> str:
    """`p0` for `prefill-0`; a dash where no worker of that pool took part."""
    name, _, index = worker_id.partition("-")
    return f"{name[:1]}{index}" if worker_id else "-"
