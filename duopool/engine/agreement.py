"""Whether a module that is to replace another gives what that one gave."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def agree(
    original: nn.Module,
    replacement: nn.Module,
    in_features: int,
    *,
    tolerance: float,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> bool:
    """On three rows of a test input; `tolerance` is a share of the original's largest output."""
    # A fixed wave, different in each of its rows: a check must not touch anyone's random numbers.
    wave = torch.sin(torch.arange(3 * in_features, dtype=torch.float32, device=device) * 1.7 + 0.3)
    x = wave.view(1, 3, in_features).to(dtype)
    expected: Tensor = original(x).float()
    found: Tensor = replacement(x).float()
    return bool((expected - found).abs().amax() <= tolerance * expected.abs().amax().clamp(min=1e-6))
