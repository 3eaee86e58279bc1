"""A model that is known to run through our attention, made fast: what a worker adds to it is only a store of pages.

Owns the way from a name to such a model. It holds no request and no page, so that several processes may share it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from duopool.core.config import CacheConfig, ModelConfig, QuantizationName
from duopool.core.errors import UnsupportedModel
from duopool.engine.fused_model import fuse
from duopool.engine.grammar import GrammarMasks
from duopool.engine.kv_layout import KVLayout
from duopool.engine.model_loader import LoadedModel, as_model_of, load_model
from duopool.engine.model_source import Progress, resolve_model
from duopool.engine.overlay import apply_overlays
from duopool.engine.probe import ROUNDED_TOLERANCE, check_parity, eager_logits, find_layout

BITS: dict[QuantizationName, int] = {"int8": 8, "int4": 4}

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedModel:
    """The model, the shape of its pages, and the masks of its tokens (without them no request may have a grammar)."""

    model: LoadedModel
    layout: KVLayout
    masks: GrammarMasks | None = None

    @classmethod
    def load(
        cls,
        model_config: ModelConfig,
        cache_config: CacheConfig,
        *,
        progress: Progress | None = None,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Find, load and check the model; raise ModelNotFound, UnsupportedModel."""
        report: Callable[[str], None] = progress or (lambda _: None)
        source = resolve_model(model_config.model, report)
        weights = source if model_config.weights is None else resolve_model(model_config.weights, report)
        report(f"loading {weights.name}")
        model = load_model(
            weights.folder, dtype=model_config.dtype, max_model_len=model_config.max_model_len, device=device
        )
        if weights is not source:
            model = as_model_of(source.folder, model)
        masks = GrammarMasks.from_folder(source.folder, vocab_size=model.vocab_size, eos_token_ids=model.eos_token_ids)
        report("checking attention")
        return cls.of(model, cache_config.block_size, masks, model_config.quantization)

    @classmethod
    def of(
        cls,
        model: LoadedModel,
        block_size: int,
        masks: GrammarMasks | None = None,
        quantization: QuantizationName | None = None,
    ) -> Self:
        """Check a loaded model. Its module must not be used elsewhere afterwards; raise UnsupportedModel."""
        layout = find_layout(model, block_size)
        expected = eager_logits(model)
        if quantization is None:
            return cls(model=_made_fast(model, layout, expected), layout=layout, masks=masks)
        return cls(model=_rounded(model, layout, expected, quantization), layout=layout, masks=masks)


def _rounded(
    model: LoadedModel, layout: KVLayout, expected: list[Tensor], quantization: QuantizationName
) -> LoadedModel:
    """The fused model with weights of few bits; how far that may take it from the original stands in probe.py."""
    fused = fuse(model, bits=BITS[quantization])
    if fused is None:
        raise UnsupportedModel(
            f"quantization {quantization} needs a model of the Llama shape on a CPU with our kernels"
        )
    whole = replace(model, module=fused)
    check_parity(whole, layout, expected, tolerance=ROUNDED_TOLERANCE[quantization])
    return whole


def _made_fast(model: LoadedModel, layout: KVLayout, expected: list[Tensor]) -> LoadedModel:
    """One call per step where the model has the shape for it, else overlays; checked against the original's logits."""
    fused = fuse(model)
    if fused is not None:
        whole = replace(model, module=fused)
        try:
            check_parity(whole, layout, expected)
        except UnsupportedModel as error:
            log.warning("layer by layer, because as one call %s", error)
        else:
            return whole
    apply_overlays(model.module)
    check_parity(model, layout, expected)
    return model
