"""What changes a row's logits before its token is drawn."""

from __future__ import annotations

from array import array
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Rules(NamedTuple):
    """Applied in this order; integers are int64, floats float32. Tokens outside the vocabulary are passed over.

    If nothing that the mask allows is left by what comes before it, the mask counts alone.
    """

    forbidden: array[int]
    bias_tokens: array[int]
    bias: array[float]
    """Added to the logits of `bias_tokens`."""
    repetition_penalty: float
    """Of each token in `seen`, once: a logit above 0 is divided by it, any other multiplied. 1: none."""
    seen: array[int]
    presence_penalty: float
    """Taken from each token in `output`, once."""
    frequency_penalty: float
    """Taken from a token in `output` as often as it stands there."""
    output: array[int]
    allowed: NDArray[np.bool_] | None
    """[V], or None: all."""
