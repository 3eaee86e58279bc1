"""The command `duopool`: one command per file, put together here."""

from __future__ import annotations

import typer

from duopool import __version__
from duopool.cluster import (
    admin_commands,
    audit_command,
    bench_command,
    chat_command,
    config_command,
    demo_command,
    doctor_command,
    generate_command,
    serve_command,
    top_command,
)
from duopool.cluster.chaos import command as chaos_command
from duopool.cluster.settings import CONTEXT_SETTINGS

app = typer.Typer(
    name="duopool",
    help="Serve a language model from a prefill pool and a decode pool.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("serve", context_settings=CONTEXT_SETTINGS)(serve_command.serve)
app.command("generate")(generate_command.generate)
app.command("status")(admin_commands.status)
app.command("scale")(admin_commands.scale)
app.command("drain")(admin_commands.drain)
app.command("restart")(admin_commands.restart)
app.command("audit")(audit_command.audit)
app.command("demo")(demo_command.demo)
app.command("bench")(bench_command.bench)
app.command("chat")(chat_command.chat)
app.command("top")(top_command.top)
app.command("doctor")(doctor_command.doctor)
app.command("chaos")(chaos_command.chaos)
app.add_typer(config_command.app, name="config")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"duopool {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    return None


def main() -> None:
    """Entry point of the installed command."""
    app()
