"""The noise of sampling as a pure function of (seed, position, vocabulary index).

Nothing is drawn: the same request gets the same noise in any batch, on any worker, after any restart. The hash is a
32-bit multiply-xorshift mixer (the finaliser of Appleby's MurmurHash3, twice) over the index, keyed by 64 bits that
Steele's SplitMix64 makes of seed and position.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_MASK_64 = (1 << 64) - 1


def noise_keys(seeds: Sequence[int], positions: Sequence[int], device: torch.device) -> Tensor:
    """int32 [R, 2]: what the noise of each row is keyed with. Seeds are any 64-bit integers."""
    keys = [_split_mix(_split_mix(seed & _MASK_64) ^ position) for seed, position in zip(seeds, positions, strict=True)]
    return torch.tensor([[_signed_32(key), _signed_32(key >> 32)] for key in keys], dtype=torch.int32, device=device)


def gumbel_noise(keys_R2: Tensor, indices: Tensor) -> Tensor:
    """Standard Gumbel noise, float32 [R, K], for vocabulary indices [K] or [R, K].

    With E a standard exponential made of 31 hashed bits the noise is -log(E). It is computed in float64 and rounded
    once, so that whoever computes it gets the same.
    """
    bits = _mix(indices.to(torch.int32) * _signed_32(0x9E3779B1) + keys_R2[:, :1])
    bits = _mix(bits.bitwise_xor_(keys_R2[:, 1:]))
    uniform = _shift_right(bits, 1).to(torch.float64).add_(0.5).mul_(2.0**-31)
    return uniform.neg_().log1p_().neg_().log_().neg_().to(torch.float32)


def _mix(x: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser, in place; int32 multiplication wraps."""
    x.bitwise_xor_(_shift_right(x, 16)).mul_(_signed_32(0x85EBCA6B))
    x.bitwise_xor_(_shift_right(x, 13)).mul_(_signed_32(0xC2B2AE35))
    return x.bitwise_xor_(_shift_right(x, 16))


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """A logical shift: torch's keeps the sign."""
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def _split_mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK_64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return x ^ (x >> 31)


def _signed_32(x: int) -> int:
    """The low 32 bits as torch's int32 holds them."""
    x &= 0xFFFFFFFF
    return x - (1 << 32) if x >= 1 << 31 else x
