"""Faster equals of modules that most model families share. `overlay.py` decides where they go.

Owns the arithmetic: one product where the original makes two or three, one normalisation call, rotary embedding in
three passes over queries and keys together. All take the original's weights and give its result up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from duopool.engine.attention import attend
from duopool.engine.forward_context import PagedContext, current_context
from duopool.kernels import ops


class LeanLinear(nn.Module):
    """One or several linear layers over the same input as one product over a packed weight."""

    def __init__(self, originals: Sequence[nn.Linear]) -> None:
        super().__init__()
        weights = [each.weight.detach() for each in originals]
        self._weight = ops.pack_weight(weights[0] if len(weights) == 1 else torch.cat(weights))
        self.out_features = self._weight.out_features
        self.bias: Tensor | None = None
        if any(each.bias is not None for each in originals):
            parts = [each.weight.new_zeros(each.out_features) if each.bias is None else each.bias for each in originals]
            self.bias = torch.cat([part.detach() for part in parts])

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return ops.linear(rows, self._weight, self.bias).view(*x.shape[:-1], self.out_features)


class LeanGatedMLP(nn.Module):
    """`down(act(gate(x)) * up(x))` with gate and up in one product."""

    def __init__(self, original: Any) -> None:
        super().__init__()
        self._gate_up = LeanLinear([original.gate_proj, original.up_proj])
        self._down = LeanLinear([original.down_proj])
        self._act = original.act_fn

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self._gate_up(x).chunk(2, dim=-1)
        down: Tensor = self._down(self._act(gate) * up)
        return down


class LeanRMSNorm(nn.Module):
    """`weight * x / sqrt(mean(x^2) + eps)` in one call, summed in float32."""

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.weight: Tensor = original.weight.detach()
        self.eps = float(original.variance_epsilon if hasattr(original, "variance_epsilon") else original.eps)

    def forward(self, x: Tensor) -> Tensor:
        return torch.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class LeanAttention(nn.Module):
    """Attention of the Llama shape: queries, keys and values in one product, then straight to the kernels."""

    def __init__(self, original: Any) -> None:
        super().__init__()
        self._qkv = LeanLinear([original.q_proj, original.k_proj, original.v_proj])
        self._out = LeanLinear([original.o_proj])
        self.layer_idx = int(original.layer_idx)
        self._head_dim = int(original.head_dim)
        self._num_heads = original.q_proj.out_features // self._head_dim
        self._num_kv_heads = original.k_proj.out_features // self._head_dim
        self._scale = float(original.scaling)
        # Families with windows on some layers name theirs on the module (None: this layer has none).
        self._window: int | None = getattr(original, "sliding_window", getattr(original.config, "sliding_window", None))

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: Any
    ) -> tuple[Tensor, None]:
        """hidden_states [1, T, hidden], cos and sin [1, T, D] -> ([1, T, hidden], None)."""
        context = current_context()
        if not isinstance(context, PagedContext):
            raise RuntimeError("a model with overlays runs over pages only")
        num_rotated = self._num_heads + self._num_kv_heads
        heads = self._qkv(hidden_states[0]).view(-1, num_rotated + self._num_kv_heads, self._head_dim)
        cos, sin = position_embeddings
        rotated = rotate(heads[:, :num_rotated], cos[0], sin[0])
        mixed = attend(
            self.layer_idx,
            rotated[:, : self._num_heads],
            rotated[:, self._num_heads :],
            heads[:, num_rotated:],
            context,
            scale=self._scale,
            window=self._window,
        )
        return self._out(mixed.view(1, mixed.shape[0], -1)), None


def rotate(heads_TXD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotary position embedding in the half-split order of transformers' `rotate_half`."""
    half = heads_TXD.shape[-1] // 2
    cos, sin = cos_TD.unsqueeze(1), sin_TD.unsqueeze(1)
    rotated = heads_TXD * cos
    rotated[..., :half].addcmul_(heads_TXD[..., half:], sin[..., :half], value=-1)
    rotated[..., half:].addcmul_(heads_TXD[..., :half], sin[..., half:])
    return rotated
