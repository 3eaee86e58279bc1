"""A decoder of the Llama shape in plain torch, in float32 but for the pages. Owns the meaning of the op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import silu

from duopool.kernels.decoder_stack.weights import Projection, StackWeights
from duopool.kernels.paged_attention.reference import paged_attention
from duopool.kernels.write_kv.reference import write_kv


def decoder_stack(
    weights: StackWeights,
    caches: Sequence[tuple[Tensor, Tensor]],
    token_ids_T: Tensor,
    positions_T: Tensor,
    slots_T: Tensor,
    block_tables_BM: Tensor,
    query_starts: Tensor,
    kv_lengths: Tensor,
    logits_rows: Tensor,
) -> Tensor:
    """See `duopool.kernels.ops.decoder_stack`."""
    dtype, num_tokens = weights.embedding.dtype, len(token_ids_T)
    heads, kv_heads, dim = weights.num_heads, weights.num_kv_heads, weights.head_dim
    cos, sin = weights.cos_PD[positions_T].unsqueeze(1), weights.sin_PD[positions_T].unsqueeze(1)
    x = weights.embedding[token_ids_T].float()
    for layer, (keys, values) in zip(weights.layers, caches, strict=True):
        qkv = _project(_normalise(x, layer.attention_norm, weights.eps), layer.qkv).view(num_tokens, -1, dim)
        rotated = _rotate(qkv[:, : heads + kv_heads], cos, sin).to(dtype)
        write_kv(rotated[:, heads:], qkv[:, heads + kv_heads :].to(dtype), keys, values, slots_T)
        mixed = paged_attention(
            rotated[:, :heads],
            keys,
            values,
            block_tables_BM,
            query_starts,
            kv_lengths,
            scale=weights.scale,
            window=layer.window,
        )
        x = x + _project(mixed.reshape(num_tokens, -1), layer.out)
        normed = _normalise(x, layer.mlp_norm, weights.eps)
        x = x + _project(silu(_project(normed, layer.gate)) * _project(normed, layer.up), layer.down)
    return _project(_normalise(x[logits_rows], weights.final_norm, weights.eps), weights.head)


def _project(x: Tensor, projection: Projection) -> Tensor:
    """Of x rounded to the weight's type."""
    y = x.to(projection.weight.dtype).float() @ projection.weight.float().t()
    return y if projection.bias is None else y + projection.bias.float()


def _normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.rms_norm(x, (x.shape[-1],), weight.float(), eps)


def _rotate(heads_TXD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = heads_TXD.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
