"""The weight of a linear layer in the order the kernel reads it.

Owns the layout and the choice whether to pack at all; the product itself is in `duopool.kernels.ops.linear`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedWeight:
    """A weight [out_features, in_features], maybe with a second copy of it in panels."""

    out_features: int
    in_features: int
    original: Tensor | None
    """The weight as torch knows it; None when the panels serve every number of rows."""
    panels: Tensor | None
    """[panels, in_features, 16], zero behind the last column; None when torch's own product is the faster one."""
