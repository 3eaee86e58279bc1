"""An audit on the public wire."""

from __future__ import annotations

from collections.abc import Iterable

from duopool.core.audit import Finding
from duopool.core.ledger import Resources, WorkerLedger
from duopool.core.messages import WorkerInfo
from duopool.proto import inference_pb2 as pb


def audit_response(findings: Iterable[Finding], processes: Iterable[pb.ProcessAudit]) -> pb.AuditResponse:
    return pb.AuditResponse(
        findings=[pb.Finding(where=one.where, subject=one.subject, problem=one.problem) for one in findings],
        processes=processes,
    )


def worker_audit(info: WorkerInfo, ledger: WorkerLedger) -> pb.ProcessAudit:
    """What one worker holds, as counts."""
    blocks = ledger.blocks
    process = _process(info.worker_id, info.role, ledger.resources)
    process.requests = sum(holder.is_alive for holder in ledger.holders)
    process.blocks = blocks.num_blocks
    process.free_blocks = len(blocks.free)
    process.cached_blocks = blocks.num_cached
    process.referenced_blocks = blocks.num_referenced
    process.leases = sum(holder.lease is not None for holder in ledger.holders)
    process.quarantined = sum(not holder.is_alive for holder in ledger.holders)
    return process


def router_audit(resources: Resources, *, num_requests: int) -> pb.ProcessAudit:
    """What the router holds; it has no blocks."""
    process = _process("router", "router", resources)
    process.requests = num_requests
    return process


def _process(name: str, role: str, resources: Resources) -> pb.ProcessAudit:
    return pb.ProcessAudit(
        name=name,
        role=role,
        pid=resources.pid,
        fds=resources.num_fds,
        threads=resources.num_threads,
        tasks=resources.num_tasks,
        streams=resources.num_streams,
        resident_bytes=resources.resident_bytes,
    )
