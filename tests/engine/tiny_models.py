"""Tiny random models of many families, made from their configurations: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

VOCAB_SIZE = 97
WINDOW = 6
COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ALTERNATING = ["sliding_attention", "full_attention"]


def _common(**changes: Any) -> dict[str, Any]:
    return {**COMMON, **changes}


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_common()),
    "llama_biased": lambda: transformers.LlamaConfig(**_common(attention_bias=True, mlp_bias=True, head_dim=16)),
    "mistral_window": lambda: transformers.MistralConfig(**_common(sliding_window=WINDOW)),
    "qwen2": lambda: transformers.Qwen2Config(**_common()),
    "qwen2_window": lambda: transformers.Qwen2Config(
        **_common(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)
    ),
    "qwen3": lambda: transformers.Qwen3Config(**_common(head_dim=16)),
    "gemma": lambda: transformers.GemmaConfig(**_common(head_dim=16)),
    "gemma2": lambda: transformers.Gemma2Config(
        **_common(head_dim=16, sliding_window=WINDOW, query_pre_attn_scalar=16, layer_types=ALTERNATING)
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **_common(head_dim=16, sliding_window=WINDOW, query_pre_attn_scalar=16, layer_types=ALTERNATING)
    ),
    "phi3": lambda: transformers.Phi3Config(**_common(sliding_window=WINDOW)),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **_common(
            head_dim=16, sliding_window=WINDOW, num_local_experts=2, num_experts_per_tok=1, layer_types=ALTERNATING
        )
    ),
    "olmo2": lambda: transformers.Olmo2Config(**_common()),
    "granite": lambda: transformers.GraniteConfig(**_common(attention_multiplier=0.3, residual_multiplier=0.5)),
    "starcoder2": lambda: transformers.Starcoder2Config(**_common(sliding_window=WINDOW)),
    "stablelm": lambda: transformers.StableLmConfig(**_common()),
    "cohere": lambda: transformers.CohereConfig(**_common()),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_common()),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3
    ),
    "opt": lambda: transformers.OPTConfig(**_common(ffn_dim=48, word_embed_proj_dim=32)),
    "mixtral": lambda: transformers.MixtralConfig(**_common(num_local_experts=2, num_experts_per_tok=1)),
    "smollm3": lambda: transformers.SmolLM3Config(**_common()),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **_common(
            num_key_value_heads=4,
            q_lora_rank=16,
            kv_lora_rank=8,
            qk_nope_head_dim=8,
            qk_rope_head_dim=8,
            v_head_dim=12,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=2,
            moe_intermediate_size=16,
            n_shared_experts=1,
            first_k_dense_replace=1,
        )
    ),
}

BYPASSING: dict[str, Callable[[], Any]] = {
    "falcon": lambda: transformers.FalconConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    ),
    "bloom": lambda: transformers.BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=2, n_head=4),
    "mamba": lambda: transformers.MambaConfig(vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2),
}


def make(config: Any, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A random model in evaluation mode; the same one for the same seed."""
    torch.manual_seed(seed)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        if "sinks" in name or "norm" in name or name.endswith("bias"):
            # Families initialise these to constants (or not at all); a mistake must be able to show.
            nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    return model
