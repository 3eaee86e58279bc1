"""Who may be in one cluster together: blocks and tokens of all workers must mean the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from duopool.core.errors import DuopoolError
from duopool.core.messages import WorkerInfo
from duopool.core.types import Role

SAME_FIELDS = ("model", "dtype", "block_size", "vocab_size", "tokenizer_digest", "model_digest", "layout_digest")
"""Fields of WorkerInfo that every worker of a cluster must agree on; those that say most come first."""


class WorkerMismatch(DuopoolError):
    """A worker registered with a model or layout that differs from the cluster's. Names the field."""

    def __init__(self, worker_id: str, field: str, *, expected: object, got: object) -> None:
        super().__init__(f"{worker_id}: {field} is {got!r}, the cluster has {expected!r}")
        self.field = field


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """What routers are told: the live workers and the wanted size of each pool."""

    members: tuple[WorkerInfo, ...]
    wanted: Mapping[Role, int]


def check_same(expected: WorkerInfo, info: WorkerInfo) -> None:
    """Raise WorkerMismatch if blocks of the two workers are not interchangeable."""
    for field in SAME_FIELDS:
        if getattr(info, field) != getattr(expected, field):
            raise WorkerMismatch(info.worker_id, field, expected=getattr(expected, field), got=getattr(info, field))
