"""Makes plain layers of what transformers' quantizers load, where our kernels take plain layers only (on the CPU).

Owns what a checkpoint says of its quantization, and the way back: a quantizer that can undo itself while it loads is
asked to, and every other layer is asked for its rows. None of the quantizers' libraries is known here.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AutoQuantizationConfig

from duopool.core.errors import UnsupportedModel
from duopool.engine.agreement import agree

PACKAGES = {
    "aqlm": "aqlm",
    "auto-round": "auto-round",
    "awq": "gptqmodel",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "gptq": "gptqmodel",
    "hqq": "hqq",
    "quanto": "optimum-quanto",
    "quark": "amd-quark",
    "spqr": "spqr_quant",
    "torchao": "torchao",
    "vptq": "vptq",
}
"""The pip package that a quantization method of transformers needs."""

TOLERANCE = 0.1
"""Largest difference of a plain layer's output from the original's, as a share of the largest output. Originals may
round their inputs to bytes; a wrong weight differs by far more."""

ROWS_AT_ONCE = 512
"""Bounds the memory that asking a layer for its weight takes."""

log = logging.getLogger(__name__)


def quantization_of(config: Any) -> dict[str, Any] | None:
    """What a configuration of transformers says of quantized weights; None: they are plain."""
    found = getattr(config, "quantization_config", None)
    return found or getattr(config.get_text_config(), "quantization_config", None)


def undo_while_loading(settings: dict[str, Any]) -> None:
    """Set what makes the quantizer load plain weights, if it can. Raises ValueError for an unknown method."""
    if hasattr(AutoQuantizationConfig.from_dict(dict(settings)), "dequantize"):
        settings["dequantize"] = True


def missing_package(name: str, settings: dict[str, Any], error: ImportError) -> UnsupportedModel:
    """The error of a checkpoint whose quantizer cannot be imported."""
    method = str(settings.get("quant_method") or "bitsandbytes")  # old ones of bitsandbytes do not say
    package = PACKAGES.get(method)
    remedy = f"pip install {package}" if package else str(error)
    return UnsupportedModel(f"the weights of {name} are quantized by {method}, which needs a package: {remedy}")


def is_plain(module: Any) -> bool:
    """Whether a module is a linear layer that is nothing but `x @ weight.T + bias` of ordinary tensors."""
    return (
        type(module) is nn.Linear
        and "forward" not in vars(module)
        and type(module.weight) is nn.Parameter
        and module.weight.is_floating_point()
        and module.weight.shape == (module.out_features, module.in_features)
    )


def has_plain_layers(model: nn.Module) -> bool:
    """Whether all linear layers are plain, by whatever class they are made."""
    return all(is_plain(module) for module in model.modules() if _is_linear(module))


@torch.inference_mode()
def restore(model: nn.Module, dtype: torch.dtype) -> int:
    """Replace a quantized model's layers by plain ones of `dtype`, in place; the number of those replaced.

    A layer whose plain form does not give what it gives itself stays as it is.
    """
    if not getattr(model, "is_quantized", False):
        return 0
    num_restored = 0
    for name, module in list(model.named_modules()):
        plain = _plain_form(name, module, dtype)
        if plain is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, plain.eval())
            num_restored += 1
    return num_restored


def _plain_form(name: str, module: Any, dtype: torch.dtype) -> nn.Module | None:
    """None: it is plain, has no such form, or is no layer with a weight."""
    if isinstance(module, nn.Embedding) and type(module.weight) is not nn.Parameter:
        table = nn.Embedding(module.num_embeddings, module.embedding_dim, padding_idx=module.padding_idx, device="meta")
        table.weight = nn.Parameter(module(torch.arange(module.num_embeddings)).to(dtype), requires_grad=False)
        return table
    if not _is_linear(module) or is_plain(module):
        return None
    plain = _plain_linear(module, dtype)
    if not agree(module, plain, plain.in_features, tolerance=TOLERANCE, dtype=dtype):
        log.warning("%s stays quantized: it is no product with a weight", name)
        return None
    return plain


def _is_linear(module: nn.Module) -> bool:
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def _plain_linear(module: Any, dtype: torch.dtype) -> nn.Linear:
    """Row i of the identity gives column i of the weight; without the bias, in which small weights would be lost."""
    bias, module.bias = module.bias, None
    try:
        weight = torch.empty(module.out_features, module.in_features, dtype=dtype)
        for start in range(0, module.in_features, ROWS_AT_ONCE):
            end = min(start + ROWS_AT_ONCE, module.in_features)
            ones = torch.zeros(end - start, module.in_features, dtype=dtype)
            ones[:, start:end].fill_diagonal_(1)
            weight[:, start:end] = module(ones).T
    finally:
        module.bias = bias
    plain = nn.Linear(module.in_features, module.out_features, bias=bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return plain
