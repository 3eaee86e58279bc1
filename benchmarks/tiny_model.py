"""Makes a model that loads in a moment: two layers of random weights behind SmolLM2's tokenizer."""

from __future__ import annotations

from pathlib import Path


def make_tiny_model(folder: Path, *, max_model_len: int = 512) -> Path:
    """Write the model into `folder`, the same weights every time."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from duopool.engine.model_source import resolve_model

    tokenizer = AutoTokenizer.from_pretrained(resolve_model("smollm2").folder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_model_len,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
