"""One audit of the whole system: every worker's ledger over its session, compared with this router's own requests.

Owns the questions under way. What is wrong is decided in `core/audit.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from duopool.core.audit import Finding, RouterView, audit_requests, audit_rest, audit_worker
from duopool.core.config import HandoffConfig
from duopool.core.handoff.request import Member
from duopool.core.ledger import WorkerLedger
from duopool.core.messages import LedgerReport, LedgerWanted, WorkerInfo
from duopool.router.pools import Pools
from duopool.router.session import SessionState

ANSWER_TIMEOUT_S = 5.0
ROUTER = "router"


@dataclass(frozen=True, slots=True)
class Answer:
    """A worker's ledger, and the router's view when it came."""

    ledger: WorkerLedger
    after: RouterView


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What was found, and the ledgers that it was found in."""

    findings: tuple[Finding, ...]
    ledgers: tuple[tuple[WorkerInfo, WorkerLedger], ...]


class Auditor:
    """Asks all workers at once, on the router's event loop."""

    def __init__(self, pools: Pools, config: HandoffConfig, *, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        self._pools = pools
        self._orphan_limit_s = max(config.lease_ttl_s, config.orphan_ttl_s)
        self._timeout_s = timeout_s
        self._ids = count(1)
        self._asked: dict[tuple[Member, int], asyncio.Future[Answer]] = {}
        pools.on_ledger = self._take

    async def audit(self, *, at_rest: bool) -> Audit:
        """Ask everybody; with `at_rest` whatever is held is a finding too."""
        members = sorted(self._pools.members, key=lambda info: (info.role, info.worker_id))
        asked = await asyncio.gather(*(self._audit_one(info, at_rest=at_rest) for info in members))
        findings = [finding for found, _ in asked for finding in found]
        ledgers = [(info, ledger) for info, (_, ledger) in zip(members, asked, strict=True) if ledger is not None]
        return Audit(findings=(*findings, *self._audit_router(at_rest=at_rest)), ledgers=tuple(ledgers))

    def _audit_router(self, *, at_rest: bool) -> list[Finding]:
        num_requests, num_keys = self._pools.num_requests, self._pools.loads.num_expected_keys
        findings = []
        if at_rest and num_requests:
            findings.append(Finding(ROUTER, f"{num_requests} requests", "are alive although all is over"))
        if num_keys and not num_requests:
            findings.append(Finding(ROUTER, f"{num_keys} prefix blocks", "are expected of workers for no request"))
        return findings

    async def _audit_one(self, info: WorkerInfo, *, at_rest: bool) -> tuple[Sequence[Finding], WorkerLedger | None]:
        member, state = self._pools.member_of(info), self._pools.state_of(info)
        if state in (SessionState.CONNECTING, SessionState.LOST):
            return [Finding(info.worker_id, "session", f"is {state}: nothing can be asked")], None
        before = self._pools.view()
        try:
            answer = await self._ask(member)
        except TimeoutError:
            return [Finding(info.worker_id, "audit", f"is not answered within {self._timeout_s:.0f} s")], None
        num_blocks = answer.ledger.blocks.num_blocks
        if num_blocks != info.num_blocks:
            return [Finding(info.worker_id, "ledger", f"is of {num_blocks} blocks, not {info.num_blocks}")], None
        findings = audit_worker(info.worker_id, answer.ledger, orphan_limit_s=self._orphan_limit_s)
        findings += audit_requests(member, answer.ledger, before, answer.after)
        return [*findings, *(audit_rest(info.worker_id, answer.ledger) if at_rest else ())], answer.ledger

    async def _ask(self, member: Member) -> Answer:
        key = (member, next(self._ids))
        future = self._asked[key] = asyncio.get_running_loop().create_future()
        self._pools.send(member, LedgerWanted(audit_id=key[1]))
        try:
            return await asyncio.wait_for(future, self._timeout_s)
        finally:
            del self._asked[key]

    def _take(self, member: Member, report: LedgerReport) -> None:
        future = self._asked.get((member, report.audit_id))
        if future is not None and not future.done():
            future.set_result(Answer(report.ledger, self._pools.view()))
