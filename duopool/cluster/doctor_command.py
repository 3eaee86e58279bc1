"""`duopool doctor`: what is wrong with this machine, and how to mend it."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from duopool.cluster.diagnosis import Grade, diagnose
from duopool.cluster.terminal import EXIT_FAILED, out

_MARKS = {Grade.OK: "[green]ok[/green]    ", Grade.NOTE: "[yellow]note[/yellow]  ", Grade.BROKEN: "[red]broken[/red]"}


def doctor(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port that the router would take.")] = 50051,
    transport: Annotated[str, typer.Option(help="auto, shared_memory, nixl or grpc, as for 'duopool serve'.")] = "auto",
    ray_address: Annotated[str | None, typer.Option(help="Ray cluster that would be joined.")] = None,
) -> None:
    """Look at versions, ports, NIXL, Ray and its token, memory and clock, and say how to mend what is wrong.

    Starts nothing. The exit code is 1 if something is broken.
    """
    findings = diagnose(ports={"port": port}, transport=transport, ray_address=ray_address)
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        out.print(f"{_MARKS[finding.grade]}  {finding.what:<{width}}  {escape(finding.detail)}", highlight=False)
        if finding.mend:
            out.print(f"{'':{width + 10}}[bold]mend:[/bold] {escape(finding.mend)}", highlight=False, soft_wrap=True)
    if any(finding.grade is Grade.BROKEN for finding in findings):
        raise typer.Exit(EXIT_FAILED)
