"""How the command line talks: progress and errors on stderr, results on stdout."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc
import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from duopool.core.errors import DuopoolError
from duopool.proto.status import StatusDetails, read_status

NARROWEST = 110
"""Columns that tables get where there is no terminal to ask."""

out = Console()
if not out.is_terminal:
    out = Console(width=max(out.width, NARROWEST))
err = Console(stderr=True)

EXIT_FAILED = 1
EXIT_USAGE = 2


def set_up_logging(*, verbose: bool) -> None:
    """Log lines on stderr, from INFO if `verbose`, else from WARNING."""
    handler = RichHandler(console=err, show_path=False, markup=False)
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s", handlers=[handler])


@contextmanager
def progress() -> Iterator[Progress]:
    """A spinner with the current stage on a terminal, plain lines elsewhere."""
    shown = Progress()
    if not err.is_terminal:
        yield shown
        return
    with err.status("starting") as status:
        shown.update = status.update
        yield shown


class Progress:
    """Reports stages of a start; finished stages stay on the screen."""

    def __init__(self) -> None:
        self.update: Callable[[str], object] = lambda text: None

    def __call__(self, stage: str, text: str) -> None:
        """Report of `System.start`."""
        self.update(f"{stage}: {text}")
        err.print(f"[cyan]{stage:>8}[/cyan]  {escape(text)}", highlight=False, soft_wrap=True)


def complain(text: str) -> None:
    """One line about what went wrong; the text is printed as it is, brackets too."""
    err.print(f"[red]error:[/red] {escape(text)}", highlight=False, soft_wrap=True)


def describe(status: StatusDetails) -> str:
    """One line for a failed call."""
    retry = f" (retry after {status.retry_after_s:.1f} s)" if status.retry_after_s is not None else ""
    return f"{status.code.name}: {status.message or 'no message'}{retry}"


@contextmanager
def clear_errors(address: str | None = None) -> Iterator[None]:
    """Turn expected errors into one line on stderr and an exit code: 2 for what the caller asked, else 1."""
    try:
        yield
    except grpc.RpcError as error:
        fail_with(read_status(error), address)
    except DuopoolError as error:
        complain(f"{error}")
        raise typer.Exit(EXIT_FAILED) from error


def fail_with(status: StatusDetails, address: str | None) -> None:
    """Print the status and exit."""
    is_away = status.code is grpc.StatusCode.UNAVAILABLE and status.reason is None
    where = f"no router answers at {address}: " if is_away and address else ""
    complain(f"{where}{describe(status)}")
    raise typer.Exit(EXIT_USAGE if status.code is grpc.StatusCode.INVALID_ARGUMENT else EXIT_FAILED)
