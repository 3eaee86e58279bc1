"""The call of the compiled `sample_tokens`."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from itertools import chain

from torch import Tensor

from duopool.kernels.cpu_library import CpuLibrary, num_threads
from duopool.kernels.sample_tokens.draw import Draw, Drawn
from duopool.kernels.sample_tokens.rules import Rules

_RULES = struct.Struct("6P4q3d")
_NO_RULES = _RULES.pack(*[0] * 10, 1.0, 0.0, 0.0)


def sample_tokens(cpu: CpuLibrary, logits_RV: Tensor, draws: Sequence[Draw]) -> Drawn:
    """See `duopool.kernels.ops.sample_tokens`."""
    rows, size = logits_RV.shape
    row_stride, stride = logits_RV.stride()
    if stride != 1:
        return sample_tokens(cpu, logits_RV.contiguous(), draws)
    token_ids, best = array("q", bytes(8 * rows)), array("f", bytes(4 * rows))
    cpu.calls.duopool_sample_tokens(
        cpu.isa,
        logits_RV.data_ptr(),
        row_stride,
        rows,
        size,
        packed_draws(draws),
        packed_rules(draws, size),
        token_ids.buffer_info()[0],
        best.buffer_info()[0],
        num_threads(),
    )
    return Drawn(token_ids.tolist(), best.tolist())


def packed_draws(draws: Sequence[Draw]) -> bytes:
    """As the kernels read them, without their rules."""
    return struct.pack("3d3q" * len(draws), *chain.from_iterable([draw[:6] for draw in draws]))


def packed_rules(draws: Sequence[Draw], vocab_size: int) -> bytes | None:
    """As the kernels read them: addresses, good as long as the draws are there. None if no draw has rules.

    Raises ValueError for a mask of another vocabulary.
    """
    if not any(draw.rules for draw in draws):
        return None
    return b"".join([_NO_RULES if draw.rules is None else _packed(draw.rules, vocab_size) for draw in draws])


def _packed(rules: Rules, vocab_size: int) -> bytes:
    allowed = rules.allowed
    if allowed is not None and (
        allowed.shape != (vocab_size,) or allowed.dtype != bool or not allowed.flags.c_contiguous
    ):
        raise ValueError(f"a mask of {allowed.shape} {allowed.dtype} for a vocabulary of {vocab_size}")
    return _RULES.pack(
        rules.forbidden.buffer_info()[0],
        rules.bias_tokens.buffer_info()[0],
        rules.seen.buffer_info()[0],
        rules.output.buffer_info()[0],
        rules.bias.buffer_info()[0],
        0 if allowed is None else allowed.ctypes.data,
        len(rules.forbidden),
        min(len(rules.bias), len(rules.bias_tokens)),
        len(rules.seen),
        len(rules.output),
        rules.repetition_penalty,
        rules.presence_penalty,
        rules.frequency_penalty,
    )
