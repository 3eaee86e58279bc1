"""What this process holds of the operating system, and of the event loop that asks: for audits."""

from __future__ import annotations

import asyncio

import psutil

from duopool.core.ledger import Resources


def measure_resources(num_streams: int) -> Resources:
    """Of this process and the running event loop."""
    process = psutil.Process()
    return Resources(
        pid=process.pid,
        num_fds=process.num_fds(),
        num_threads=process.num_threads(),
        num_tasks=len(asyncio.all_tasks()),
        num_streams=num_streams,
        resident_bytes=process.memory_info().rss,
    )
