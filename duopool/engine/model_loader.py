"""Loads a checkpoint's weights into transformers' own model class, with our attention function in place.

Owns what a checkpoint says about itself: dtype, end-of-sequence ids, vocabulary, longest context. Whether the model
really runs through our attention is for `probe.py` to find out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from duopool.core.config import DTypeName
from duopool.core.errors import InvalidRequest, UnsupportedModel
from duopool.engine import attention

CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length")


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
    try:
        module = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto" if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=attention.ATTENTION_NAME,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise UnsupportedModel(f"{folder} cannot be loaded: {error}") from error
    return adopt(module.to(device), max_model_len=max_model_len)


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
        eos_token_ids=_eos_token_ids(model),
        vocab_size=int(config.vocab_size),
        max_model_len=max_model_len or limit or 4096,
        dtype=embedding.dtype,
        device=embedding.device,
    )


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


def _eos_token_ids(model: Any) -> frozenset[int]:
    """Both places count: chat models often name their end-of-turn token only in the generation config."""
    found: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config, model.config.get_text_config()):
        value = getattr(source, "eos_token_id", None)
        if isinstance(value, int):
            found.add(value)
        elif value is not None:
            found.update(int(token_id) for token_id in value)
    return frozenset(found)
