"""Copying whole pages, in plain torch. Owns the meaning of the op."""

from __future__ import annotations

from torch import Tensor


def copy_blocks(pages_NX: Tensor, sources: Tensor, targets: Tensor) -> None:
    """See `duopool.kernels.ops.copy_blocks`."""
    pages_NX[targets] = pages_NX[sources]
