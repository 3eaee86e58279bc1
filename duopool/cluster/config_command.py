"""`duopool config show`: what `duopool serve` would run with, and where every value comes from."""

from __future__ import annotations

from typing import Annotated

import typer
import yaml
from rich.table import Table

from duopool.cluster.serve_command import serve
from duopool.cluster.settings import CONTEXT_SETTINGS, settings_of
from duopool.cluster.terminal import out

app = typer.Typer(help="Look at the settings.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps `show` a command of its own name."""


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def show(
    context: typer.Context,
    as_yaml: Annotated[bool, typer.Option("--yaml", help="Print a file for 'duopool serve --config'.")] = False,
) -> None:
    """Show every setting of 'duopool serve' and its origin: flag > environment > file > default.

    Takes the same flags as 'duopool serve'; starts nothing.
    """
    served = typer.Typer(add_completion=False)
    served.command(context_settings=CONTEXT_SETTINGS)(serve)
    command = typer.main.get_command(served)
    parsed = command.make_context("serve", list(context.args))
    settings = settings_of(parsed)
    if as_yaml:
        values = {setting.name: setting.value for setting in settings if setting.value is not None}
        typer.echo(yaml.safe_dump(values, sort_keys=False), nl=False)
        return
    table = Table("setting", "value", "origin", header_style="bold")
    for setting in settings:
        value = "-" if setting.value is None else str(setting.value)
        table.add_row(setting.name, value, setting.origin, style=None if setting.origin != "default" else "dim")
    out.print(table)
