"""A model folder of a few hundred kilobytes: two layers of random weights and one token per byte."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

VOCAB_SIZE = 320
MAX_MODEL_LEN = 256
WIDTH = 64
NUM_LAYERS = 2


def make_tiny_model(folder: Path) -> Path:
    """Write it; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_MODEL_LEN,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(_weights(), str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder


def _weights() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return draw.normal(scale=0.2, size=(rows, columns)).astype(np.float32)

    weights = {
        "model.embed_tokens.weight": matrix(VOCAB_SIZE, WIDTH),
        "lm_head.weight": matrix(VOCAB_SIZE, WIDTH),
        "model.norm.weight": np.ones(WIDTH, np.float32),
    }
    shapes = {"q": (WIDTH, WIDTH), "k": (WIDTH // 2, WIDTH), "v": (WIDTH // 2, WIDTH), "o": (WIDTH, WIDTH)}
    for layer in range(NUM_LAYERS):
        name = f"model.layers.{layer}"
        for part, shape in shapes.items():
            weights[f"{name}.self_attn.{part}_proj.weight"] = matrix(*shape)
        for part, shape in {"gate": (2 * WIDTH, WIDTH), "up": (2 * WIDTH, WIDTH), "down": (WIDTH, 2 * WIDTH)}.items():
            weights[f"{name}.mlp.{part}_proj.weight"] = matrix(*shape)
        for part in ("input", "post_attention"):
            weights[f"{name}.{part}_layernorm.weight"] = np.ones(WIDTH, np.float32)
    return weights
