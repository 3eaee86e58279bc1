"""The weight of a linear layer in the order the kernel reads it.

Owns the layout; when packing pays and the product itself are in cpu.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedWeight:
    """A weight [out_features, in_features], maybe with a copy of it in panels."""

    out_features: int
    in_features: int
    most_rows: int
    """Calls with more rows than this go to torch with the original."""
    original: Tensor | None
    """The weight as torch knows it; None when the panels serve every number of rows."""
    panels: Tensor | None
    """Zero behind the last column; None when torch is always the faster. float32 [panels, in_features, columns of a
    panel], or for bfloat16 int32 [panels, ceil(in_features / 2), columns]: the weights of two inputs in each word."""
