"""Replaces modules of a known shape by faster equals when a model is loaded.

Owns the table of replacements. A module is replaced only when its replacement gives the same result on a test input
(or, for attention, when it is exactly a class we know; the probe then compares the whole model). Everything else stays
as transformers has it, so an unknown family is slower, never wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from duopool.engine.agreement import agree
from duopool.engine.lean_modules import LeanAttention, LeanGatedMLP, LeanLinear, LeanRMSNorm
from duopool.engine.quantized_weights import has_plain_layers, is_plain
from duopool.kernels import ops

LLAMA_SHAPED_ATTENTION = frozenset(
    f"transformers.models.{family}.modeling_{family}.{name}Attention"
    for family, name in (("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"))
)
"""Attention classes that are q, k, v products, half-split rotary embedding over the whole head, and o."""

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Largest difference from the original, as a share of its largest output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlay:
    """One line of the table."""

    matches: Callable[[nn.Module], bool]
    make: Callable[[nn.Module], nn.Module]
    in_features: Callable[[nn.Module], int] | None
    """Width of the test input; None when the module cannot run alone."""


def _is_llama_attention(module: nn.Module) -> bool:
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__}" in LLAMA_SHAPED_ATTENTION and has_plain_layers(module)


def _is_gated_mlp(module: nn.Module) -> bool:
    linears = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    names = {name for name, child in module.named_children() if isinstance(child, nn.Linear)}
    return all(is_plain(each) for each in linears) and len(names) == 3 and hasattr(module, "act_fn")


def _is_rms_norm(module: nn.Module) -> bool:
    has_eps = hasattr(module, "variance_epsilon") or hasattr(module, "eps")
    weight = getattr(module, "weight", None)
    return type(module).__name__.endswith("RMSNorm") and has_eps and isinstance(weight, Tensor) and weight.dim() == 1


def _is_linear(module: nn.Module) -> bool:
    return is_plain(module) and ops.linear_is_worthwhile(module.weight.dtype)  # type: ignore[arg-type]


def _width(prefix: str) -> Callable[[nn.Module], int]:
    return lambda module: int(module.get_parameter(f"{prefix}weight").shape[-1])


OVERLAYS = (
    Overlay(matches=_is_llama_attention, make=LeanAttention, in_features=None),
    Overlay(matches=_is_gated_mlp, make=LeanGatedMLP, in_features=_width("gate_proj.")),
    Overlay(matches=_is_rms_norm, make=LeanRMSNorm, in_features=_width("")),
    Overlay(matches=_is_linear, make=lambda module: LeanLinear([module]), in_features=_width("")),  # type: ignore[list-item]
)
"""Tried in this order on every module, outermost modules first."""


@torch.inference_mode()
def apply_overlays(model: nn.Module) -> int:
    """Replace what the table knows, in place, and return how many modules were replaced.

    The model must not be trained or saved afterwards: its replaced parameters are gone.
    """
    return sum(_apply_to_child(model, name, child) for name, child in list(model.named_children()))


def _apply_to_child(parent: nn.Module, name: str, child: nn.Module) -> int:
    for overlay in OVERLAYS:
        if overlay.matches(child):
            replacement = overlay.make(child)
            if overlay.in_features is None or _agree(child, replacement, overlay.in_features(child)):
                setattr(parent, name, replacement.eval())
                return 1
    return apply_overlays(child)


def _agree(original: nn.Module, replacement: nn.Module, in_features: int) -> bool:
    weight = next(original.parameters())
    tolerance = TOLERANCE.get(weight.dtype, 1e-4)
    return agree(original, replacement, in_features, tolerance=tolerance, dtype=weight.dtype, device=weight.device)
