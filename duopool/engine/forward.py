"""Runs what a worker has for a model over a batch: transformers' own module with overlays, or its fused stand-in."""

from __future__ import annotations

from torch import Tensor, nn

from duopool.engine.forward_batch import ForwardBatch
from duopool.engine.forward_context import forward_context
from duopool.engine.fused_model import FusedModel


def forward(module: nn.Module, batch: ForwardBatch, logits_rows: Tensor) -> Tensor:
    """Logits [R, V] of tokens `logits_rows` (int64 [R]); the step's keys and values go to their slots."""
    if isinstance(module, FusedModel):
        return module.forward(batch, logits_rows)
    with forward_context(batch.context):
        output = module(
            input_ids=batch.token_ids_T.unsqueeze(0),
            position_ids=batch.positions_T.unsqueeze(0),
            use_cache=False,
            logits_to_keep=logits_rows,
        )
    logits: Tensor = output.logits[0]
    # A family that does not know `logits_to_keep` gives every row.
    return logits if len(logits) == len(logits_rows) else logits[logits_rows]
