"""Loads a checkpoint's weights into transformers' own model class, with our attention function in place.

Owns what a checkpoint says about itself: dtype, end-of-sequence ids, vocabulary, longest context. Whether the model
really runs through our attention is for `probe.py` to find out. What transformers' quantizers load becomes plain layers
on the CPU (`quantized_weights.py`); elsewhere it keeps its own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils import logging as transformers_logging

from duopool.core.config import DTypeName
from duopool.core.errors import InvalidRequest, UnsupportedModel
from duopool.engine import attention
from duopool.engine.quantized_weights import missing_package, quantization_of, restore, undo_while_loading

CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length")

SAME_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rope_parameters",
)
"""What checkpoints of one model agree on, however their weights are stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model in evaluation mode, and the facts a worker needs about it."""

    module: nn.Module
    config: Any
    """transformers' configuration of the text model."""
    eos_token_ids: frozenset[int]
    vocab_size: int
    max_model_len: int
    """Longest prompt plus output in tokens."""
    dtype: torch.dtype
    device: torch.device

    @property
    def num_layers(self) -> int:
        return int(self.config.num_hidden_layers)


def load_model(
    folder: Path,
    *,
    dtype: DTypeName = "auto",
    max_model_len: int | None = None,
    device: torch.device | str = "cpu",
) -> LoadedModel:
    """Read the folder's safetensors; raise UnsupportedModel for what we will not or cannot run."""
    _refuse_remote_code(folder)
    attention.register()
    transformers_logging.disable_progress_bar()
    is_on_cpu = torch.device(device).type == "cpu"
    quantization: dict[str, Any] | None = None
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        quantization = quantization_of(config)
        if quantization is not None and is_on_cpu:
            undo_while_loading(quantization)
        module, told = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype="auto" if dtype == "auto" else getattr(torch, dtype),
            device_map=None if quantization is None or is_on_cpu else {"": device},
            attn_implementation=attention.ATTENTION_NAME,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # the libraries of quantizers raise what they like
        if isinstance(error, ImportError) and quantization is not None:
            raise missing_package(folder.name, quantization, error) from error
        raise UnsupportedModel(f"{folder} cannot be loaded: {error}") from error
    if told["missing_keys"]:
        some = ", ".join(sorted(told["missing_keys"])[:3])
        raise UnsupportedModel(f"{folder} lacks {len(told['missing_keys'])} of the model's weights: {some}")
    if quantization is None:
        module = module.to(device)
    elif is_on_cpu:
        restore(module, module.get_input_embeddings().weight.dtype)
    return adopt(module, max_model_len=max_model_len)


def adopt(module: nn.Module, *, max_model_len: int | None = None) -> LoadedModel:
    """Make a causal language model of transformers ready to be served: evaluation mode, our attention."""
    attention.register()
    model: Any = module
    model.set_attn_implementation(attention.ATTENTION_NAME)
    model.eval()
    model.requires_grad_(False)
    config = model.config.get_text_config()
    limit = _context_limit(config)
    if max_model_len is not None and limit is not None and max_model_len > limit:
        raise InvalidRequest("max_model_len", f"the model's limit is {limit}, got {max_model_len}")
    embedding = model.get_input_embeddings().weight
    return LoadedModel(
        module=module,
        config=config,
        eos_token_ids=_eos_token_ids(getattr(model, "generation_config", None), model.config),
        vocab_size=int(config.vocab_size),
        max_model_len=max_model_len or limit or 4096,
        dtype=embedding.dtype,
        device=embedding.device,
    )


def as_model_of(folder: Path, loaded: LoadedModel) -> LoadedModel:
    """Take a checkpoint's weights for the model in `folder`, whose streams they end as it does.

    Raises UnsupportedModel if they are of another model: keys and values of the two would not mean the same.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    for field in SAME_FIELDS:
        wanted, got = getattr(config.get_text_config(), field, None), getattr(loaded.config, field, None)
        if wanted != got:
            raise UnsupportedModel(
                f"the weights are of another model than {folder.name}: {field} is {got}, not {wanted}"
            )
    is_there = (folder / GENERATION_CONFIG_NAME).is_file()
    generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True) if is_there else None
    return replace(loaded, eos_token_ids=_eos_token_ids(generation_config, config))


def _refuse_remote_code(folder: Path) -> None:
    """transformers would ask or fail; we say beforehand that a checkpoint's own Python is never run."""
    config = json.loads((folder / "config.json").read_text())
    if "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING:
        raise UnsupportedModel(
            f"{folder.name} (model type {config.get('model_type')!r}) needs Python code from its checkpoint, "
            "which is never run"
        )


def _context_limit(config: Any) -> int | None:
    for name in CONTEXT_FIELDS:
        value = getattr(config, name, None)
        if isinstance(value, int) and 0 < value < 1 << 30:
            return value
    return None


def _eos_token_ids(generation_config: Any, config: Any) -> frozenset[int]:
    """Both places count: chat models often name their end-of-turn token only in the generation config."""
    found: set[int] = set()
    for source in (generation_config, config, config.get_text_config()):
        value = getattr(source, "eos_token_id", None)
        if isinstance(value, int):
            found.add(value)
        elif value is not None:
            found.update(int(token_id) for token_id in value)
    return frozenset(found)
