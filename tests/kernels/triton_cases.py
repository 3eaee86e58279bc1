"""Small odd cases through the Triton kernels, on the device named on the command line.

A program of its own: `TRITON_INTERPRET` must be set before Triton is imported, and then holds for the whole process.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from attention_cases import AttentionCase
from torch import Tensor

from duopool.kernels.copy_blocks import triton_kernel as copy_blocks
from duopool.kernels.paged_attention import triton_kernel as attention
from duopool.kernels.write_kv import reference as write_kv_reference
from duopool.kernels.write_kv import triton_kernel as write_kv

BASE = AttentionCase(
    seed=0,
    dtype=torch.float32,
    requests=((1, 6), (5, 2), (1, 0), (0, 3)),
    kv_heads=2,
    group=3,
    key_dim=8,
    value_dim=8,
    block_size=4,
)
CHANGES: tuple[dict[str, object], ...] = (
    {},
    {"dtype": torch.bfloat16, "sinks": True},
    {"key_dim": 72, "value_dim": 16, "window": 3, "requests": ((1, 70), (2, 0))},
    {"group": 7, "kv_heads": 1, "soft_cap": 2.0, "block_size": 1, "sinks": True},
    {"group": 1, "requests": ((40, 30),), "block_size": 32, "window": 9, "key_dim": 16, "value_dim": 24},
    {"dtype": torch.bfloat16, "group": 4, "requests": ((33, 0), (1, 65)), "block_size": 3, "soft_cap": 3.0},
)


def check_attention(device: str) -> None:
    for changes in CHANGES:
        case = AttentionCase(**{**{name: getattr(BASE, name) for name in BASE.__slots__}, **changes})
        for splits in (1, 4):
            case.check(partial(_on_device, device, splits))


def _on_device(
    device: str, splits: int, *tensors: Tensor, out: Tensor, sinks_H: Tensor | None, **options: object
) -> Tensor:
    moved = [t.to(device) for t in tensors]
    sinks = None if sinks_H is None else sinks_H.to(device)
    room = torch.full(out.shape, float("nan"), dtype=out.dtype, device=device)
    out.copy_(attention.paged_attention(*moved, sinks_H=sinks, **options, out=room, splits=splits))
    return out


def check_write_kv(device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        pages = torch.randn(4, 2, 3, 5, 7).to(dtype).to(device)
        wanted = pages.clone()
        key, value = torch.randn(2, 3, 6, 7).to(dtype).to(device).transpose(1, 2).unbind(0)
        slots = torch.tensor([3, -1, 19, 0, 7, -5], device=device)
        write_kv.write_kv(key[..., :6], value, pages[:, 0, ..., :6], pages[:, 1], slots)
        write_kv_reference.write_kv(key[..., :6], value, wanted[:, 0, ..., :6], wanted[:, 1], slots)
        assert torch.equal(pages, wanted)


def check_copy_blocks(device: str) -> None:
    pages = torch.randn(6, 5003, device=device)[:, :5001]
    wanted = pages.clone()
    sources, targets = torch.tensor([1, 3, 1], device=device), torch.tensor([0, 5, 2], device=device)
    wanted[targets] = wanted[sources]
    copy_blocks.copy_blocks(pages, sources, targets)
    assert torch.equal(pages, wanted)


if __name__ == "__main__":
    {"paged_attention": check_attention, "write_kv": check_write_kv, "copy_blocks": check_copy_blocks}[sys.argv[1]](
        sys.argv[2]
    )
