"""The weights of a decoder of the Llama shape, as `ops.decoder_stack` takes them. Owns names and shapes only.

Legend: H query heads, G kv heads, D head dim, V vocabulary, P positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """`x @ weight.T + bias`."""

    weight: Tensor
    """[out_features, in_features]"""
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """`x += out(attention(qkv(norm(x))))`, then `x += down(silu(gate(norm(x))) * up(norm(x)))`."""

    attention_norm: Tensor
    """[hidden], as `mlp_norm`"""
    qkv: Projection
    """[(H + 2G) * D, hidden]: queries, keys, values"""
    out: Projection
    mlp_norm: Tensor
    gate: Projection
    up: Projection
    down: Projection
    window: int | None = None
    """A query sees this many keys at most; None: all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StackWeights:
    """Everything between token ids and logits."""

    embedding: Tensor
    """[V, hidden]"""
    layers: Sequence[LayerWeights]
    final_norm: Tensor
    head: Projection
    """[V, hidden]"""
    cos_PD: Tensor
    """float32 [P, D / 2], as `sin_PD`: the rotary embedding of each position, for the first half of a head"""
    sin_PD: Tensor
    num_heads: int
    num_kv_heads: int
    eps: float
    """Of the normalisations."""
    scale: float
    """Of the attention scores."""

    @property
    def head_dim(self) -> int:
        return self.layers[0].qkv.weight.shape[0] // (self.num_heads + 2 * self.num_kv_heads)
