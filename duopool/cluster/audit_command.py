"""`duopool audit`: compare every worker's ledger with the requests of every router of the system."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from google.protobuf.json_format import MessageToJson
from rich.table import Table

from duopool.cluster.admin_access import routers_beside
from duopool.cluster.admin_commands import CALL_TIMEOUT_S, DEFAULT_ADDRESS, Address, admin_of
from duopool.cluster.terminal import EXIT_FAILED, complain, out
from duopool.proto import inference_pb2 as pb

_COUNTS = ("requests", "blocks", "free_blocks", "cached_blocks", "referenced_blocks", "leases", "quarantined")
_RESOURCES = ("streams", "tasks", "threads", "fds")


def audit(
    address: Address = DEFAULT_ADDRESS,
    at_rest: Annotated[bool, typer.Option(help="Nothing should be running: name whatever is held.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print counts and findings as JSON.")] = False,
) -> None:
    """Check that no block, lease or request is lost or doubled anywhere; exit 1 and name what is wrong if one is."""
    audited = audit_of([address, *routers_beside(address)], at_rest=at_rest)
    if as_json:
        options = {"preserving_proto_field_name": True, "always_print_fields_with_no_presence": True}
        typer.echo(MessageToJson(audited, **options))
    else:
        out.print(process_table(audited))
    for finding in audited.findings:
        complain(f"{finding.where}: {finding.subject} {finding.problem}")
    if audited.findings:
        raise typer.Exit(EXIT_FAILED)


def audit_of(addresses: Sequence[str], *, at_rest: bool) -> pb.AuditResponse:
    """What all these routers find; each knows its own requests, and all ask the same workers."""
    whole = pb.AuditResponse()
    for address in addresses:
        with admin_of(address) as admin:
            audited = admin.Audit(pb.AuditRequest(at_rest=at_rest), timeout=CALL_TIMEOUT_S)
        whole.findings.extend(finding for finding in audited.findings if finding not in whole.findings)
        for process in audited.processes:
            is_router = process.role == "router"
            if is_router and len(addresses) > 1:
                process.name = f"{process.name} {address}"
            if is_router or address == addresses[0]:
                whole.processes.append(process)
    return whole


def process_table(audited: pb.AuditResponse) -> Table:
    """One row per process."""
    names = [name.removesuffix("_blocks") for name in (*_COUNTS, *_RESOURCES)]
    table = Table("process", *names, "MiB", header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for process in audited.processes:
        counts = [str(getattr(process, name)) for name in (*_COUNTS, *_RESOURCES)]
        table.add_row(process.name, *counts, f"{process.resident_bytes / 2**20:.0f}")
    return table
