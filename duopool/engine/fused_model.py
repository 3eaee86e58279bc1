"""Runs a whole model of the Llama shape as one call of the kernels.

Owns which model classes qualify, and the way from their modules to `ops.decoder_stack`. As with `overlay.py` nothing is
taken on trust: `probe.py` compares the result with the original, and a model that does not qualify runs as before.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from duopool.engine.kv_store import KVStore
from duopool.engine.model_loader import LoadedModel
from duopool.engine.quantized_weights import has_plain_layers
from duopool.kernels import ops
from duopool.kernels.decoder_stack.weights import LayerWeights, Projection, StackWeights
from duopool.kernels.ragged_batch import RaggedBatch
from duopool.kernels.sample_tokens.draw import Draw, Drawn

LLAMA_SHAPED_MODELS = frozenset(
    f"transformers.models.{family}.modeling_{family}.{name}ForCausalLM"
    for family, name in (("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"))
)
STATIC_ROPE = frozenset(("default", "linear", "llama3", "yarn"))
"""Rotary embeddings that depend on the position alone, not on the longest sequence of a batch."""


class FusedModel(nn.Module):
    """Stands in for a causal language model of transformers, over pages only; see forward.py."""

    def __init__(self, stack: ops.PackedStack) -> None:
        super().__init__()
        self._stack = stack
        self._logits = torch.empty(0, stack.vocab_size)

    def run(
        self, batch: RaggedBatch, store: KVStore, logits_rows: array[int], draws: Sequence[Draw]
    ) -> tuple[Tensor, Drawn]:
        """See `forward.forward`; the logits hold until the next run.

        They are megabytes: given back after every step they would go back to the system, whose price is 0.4 ms a step.
        """
        if len(logits_rows) != len(self._logits):
            self._logits = torch.empty(len(logits_rows), self._stack.vocab_size)
        return ops.decoder_stack(self._stack, store.layers, batch, logits_rows, draws, self._logits)


@torch.inference_mode()
def fuse(model: LoadedModel, bits: int | None = None) -> FusedModel | None:
    """The model as one call, its products' weights rounded to `bits`; None if it does not have the shape for it.

    The original stays as it is.
    """
    module: Any = model.module
    if not _has_the_shape(module, model):
        return None
    stack = ops.pack_stack(_weights(module, model), bits)
    return None if stack is None else FusedModel(stack).eval()


def _has_the_shape(module: Any, model: LoadedModel) -> bool:
    kind, config = type(module), model.config
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        f"{kind.__module__}.{kind.__qualname__}" in LLAMA_SHAPED_MODELS
        and model.device.type == "cpu"
        and model.dtype in (torch.float32, torch.bfloat16)
        and config.hidden_act == "silu"
        and rope.get("rope_type") in STATIC_ROPE
        and rope.get("partial_rotary_factor", 1.0) == 1.0
        and has_plain_layers(module)
    )


def _weights(module: Any, model: LoadedModel) -> StackWeights:
    body = module.model
    attention = body.layers[0].self_attn
    # The model's own rotary module makes the table, in float32.
    positions = torch.arange(model.max_model_len).unsqueeze(0)
    cos, sin = body.rotary_emb(torch.zeros(1, dtype=torch.float32), position_ids=positions)
    half = attention.head_dim // 2
    return StackWeights(
        embedding=body.embed_tokens.weight,
        layers=[_layer(layer) for layer in body.layers],
        final_norm=body.norm.weight,
        head=_projection(module.lm_head),
        cos_PD=cos[0, :, :half],
        sin_PD=sin[0, :, :half],
        num_heads=attention.q_proj.out_features // attention.head_dim,
        num_kv_heads=attention.k_proj.out_features // attention.head_dim,
        eps=float(body.norm.variance_epsilon),
        scale=float(attention.scaling),
    )


def _layer(layer: Any) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    return LayerWeights(
        attention_norm=layer.input_layernorm.weight,
        qkv=_joined([attention.q_proj, attention.k_proj, attention.v_proj]),
        out=_projection(attention.o_proj),
        mlp_norm=layer.post_attention_layernorm.weight,
        gate=_projection(mlp.gate_proj),
        up=_projection(mlp.up_proj),
        down=_projection(mlp.down_proj),
        window=getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None)),
    )


def _projection(linear: nn.Linear) -> Projection:
    return Projection(weight=linear.weight, bias=linear.bias)


def _joined(linears: list[nn.Linear]) -> Projection:
    biases: list[Tensor] = [each.bias for each in linears if each.bias is not None]
    bias = torch.cat(biases) if len(biases) == len(linears) else None
    return Projection(weight=torch.cat([each.weight for each in linears]), bias=bias)
