"""A linear layer in plain torch: float32 products, rounded once. Owns the meaning of the op."""

from __future__ import annotations

import torch
from torch import Tensor


def linear(x_TK: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `duopool.kernels.ops.linear`."""
    y = x_TK.float() @ weight.float().t()
    if bias is not None:
        y = y + bias.float()
    return y.to(x_TK.dtype)


def rounded_to(weight: Tensor, bits: int, group: int = 32) -> Tensor:
    """`weight` as 8 or 4 bits per value keep it: rounded to nearest in groups of inputs, float32 [out, in].

    A group's scale is rounded to bfloat16 first. With 4 bits the value of largest size gets code -8, the longer end.
    """
    out_features, in_features = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -in_features % group)).view(out_features, -1, group)
    most = 2 ** (bits - 1) - 1
    peak = padded.gather(2, padded.abs().argmax(dim=2, keepdim=True))
    scale = (peak.abs() / most if bits == 8 else -peak / (most + 1)).bfloat16().float()
    codes = (padded / torch.where(scale == 0, 1.0, scale)).round().clamp(-most - 1, most)
    rounded: Tensor = (codes * scale).view(out_features, -1)[:, :in_features]
    return rounded
