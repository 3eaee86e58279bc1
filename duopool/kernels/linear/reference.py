"""A linear layer in plain torch: float32 products, rounded once. Owns the meaning of the op."""

from __future__ import annotations

from torch import Tensor


def linear(x_TK: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `duopool.kernels.ops.linear`."""
    y = x_TK.float() @ weight.float().t()
    if bias is not None:
        y = y + bias.float()
    return y.to(x_TK.dtype)
