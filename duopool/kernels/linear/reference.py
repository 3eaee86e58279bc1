"""A linear layer in plain torch: float32 products, rounded once. Owns the meaning of the op."""

from __future__ import annotations

import math

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

    A group's scale is rounded to bfloat16 first. With 4 bits codes count from the group's least value, bfloat16 too,
    and its values span 15 to 8 steps, whichever misses least.
    """
    round_group = _bytes if bits == 8 else _nibbles
    return torch.cat([round_group(part) for part in torch.split(weight.float(), group, dim=1)], dim=1)


def _bytes(group: Tensor) -> Tensor:
    scale = (group.abs().amax(1, keepdim=True) / 127).bfloat16().float()
    return (group / torch.where(scale == 0, 1.0, scale)).round().clamp(-128, 127) * scale


def _nibbles(group: Tensor) -> Tensor:
    lowest, highest = group.amin(1, keepdim=True), group.amax(1, keepdim=True)
    least = lowest.bfloat16().float()
    best, smallest_error = group, torch.full_like(least, math.inf, dtype=torch.float64)
    for steps in range(15, 7, -1):
        scale = ((highest - lowest) / steps).bfloat16().float()
        codes = ((group - least) / torch.where(scale == 0, 1.0, scale)).round().clamp(0, 15)
        found = codes * scale + least
        error = (codes.double() * scale + least - group).square().sum(1, keepdim=True)
        best = torch.where(error < smallest_error, found, best)
        smallest_error = torch.minimum(error, smallest_error)
    return best
