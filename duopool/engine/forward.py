"""Runs what a worker has for a model over a batch: transformers' own module with overlays, or its fused stand-in."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from duopool.engine.forward_context import PagedContext, forward_context
from duopool.engine.fused_model import FusedModel
from duopool.engine.kv_store import KVStore
from duopool.kernels import ops
from duopool.kernels.ragged_batch import RaggedBatch
from duopool.kernels.sample_tokens.draw import Draw, Drawn


def forward(
    module: nn.Module, batch: RaggedBatch, store: KVStore, logits_rows: array[int], draws: Sequence[Draw] = ()
) -> tuple[Tensor, Drawn]:
    """Logits float32 [R, V] of tokens `logits_rows` (int64 [R]); the step's keys and values go to their slots.

    With `draws`, one for each row, the rows' tokens are drawn as well. The logits may be overwritten when the module
    runs again.
    """
    if isinstance(module, FusedModel):
        return module.run(batch, store, logits_rows, draws)
    logits = _forward_layers(module, batch, store, logits_rows)
    return logits, ops.sample_tokens(logits, draws) if draws else Drawn([], [])


@torch.inference_mode()
def _forward_layers(module: nn.Module, batch: RaggedBatch, store: KVStore, logits_rows: array[int]) -> Tensor:
    device = store.pages.device
    rows = _tensor(logits_rows, device)
    context = PagedContext(
        store=store,
        slots_T=_tensor(batch.slots, device),
        block_tables_BM=_tensor(batch.block_tables, device).view(len(batch.kv_lengths), -1),
        query_starts=_tensor(batch.query_starts, device),
        kv_lengths=_tensor(batch.kv_lengths, device),
    )
    with forward_context(context):
        output = module(
            input_ids=_tensor(batch.token_ids, device).unsqueeze(0),
            position_ids=_tensor(batch.positions, device).unsqueeze(0),
            use_cache=False,
            logits_to_keep=rows,
        )
    logits: Tensor = output.logits[0]
    # A family that does not know `logits_to_keep` gives every row.
    return (logits if len(logits) == len(rows) else logits[rows]).float()


def _tensor(numbers: array[int], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.array(numbers))
    return tensor if device.type == "cpu" else tensor.to(device)
