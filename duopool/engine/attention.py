"""Our attention function, in the form that transformers' attention interface calls.

Owns the way from a module's call to the kernels: write the new keys and values into their slots, then attend over the
pages. transformers gives no mask to a name that its mask registry does not know, which is what we want: causality, the
window and the ragged batch are the kernel's business.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from duopool.engine.forward_context import PagedContext, SeenAttention, current_context
from duopool.engine.kv_layout import LayerShape
from duopool.kernels import ops

ATTENTION_NAME = "duopool"


def paged_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [1, H, T, D], key [1, G, T, D], value [1, G, T, E] -> ([1, T, H, E], None)."""
    context = current_context()
    layer = _layer_index(module)
    if not isinstance(context, PagedContext):
        shape = LayerShape(num_kv_heads=key.shape[1], key_dim=key.shape[-1], value_dim=value.shape[-1])
        is_causal = bool(getattr(module, "is_causal", True))
        context.seen.append((layer, SeenAttention(shape, key.dtype, sliding_window, is_causal)))
        return value.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1]), None
    out_THE = attend(
        layer,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        context,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        soft_cap=softcap,
        sinks_H=s_aux,
    )
    return out_THE.unsqueeze(0), None


def attend(
    layer: int,
    q_THD: Tensor,
    key_TGD: Tensor,
    value_TGE: Tensor,
    context: PagedContext,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Store this step's keys and values of one layer and attend over the pages; [T, H, E]."""
    key_cache, value_cache = context.store.layer(layer)
    ops.write_kv(key_TGD.to(key_cache.dtype), value_TGE.to(value_cache.dtype), key_cache, value_cache, context.slots_T)
    return ops.paged_attention(
        q_THD,
        key_cache,
        value_cache,
        context.block_tables_BM,
        context.query_starts,
        context.kv_lengths,
        scale=float(scale),
        window=None if window is None else int(window),
        soft_cap=soft_cap,
        sinks_H=sinks_H,
    )


def _layer_index(module: nn.Module) -> int:
    index = getattr(module, "layer_idx", None)
    return -1 if index is None else int(index)


def register() -> None:
    """Make `attn_implementation="duopool"` known to transformers; doing it again changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention_forward)
