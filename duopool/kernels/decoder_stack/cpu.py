"""The call of the compiled decoder: field for field the structures in stack_call.h."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from duopool.kernels.cpu_library import CpuLibrary, num_threads
from duopool.kernels.decoder_stack.weights import LayerWeights, Projection, StackWeights
from duopool.kernels.linear import cpu as linear_cpu
from duopool.kernels.ragged_batch import RaggedBatch
from duopool.kernels.sample_tokens.cpu import packed_draws, packed_rules
from duopool.kernels.sample_tokens.draw import Draw, Drawn

_POINTER, _NUMBER, _FLAG, _REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
_Addresses: TypeAlias = "ctypes.Array[ctypes.c_void_p]"


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("panels", _POINTER),
        ("bias", _POINTER),
        ("in_features", _NUMBER),
        ("out_features", _NUMBER),
        ("bits", _NUMBER),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        ("qkv", _Matrix),
        ("out", _Matrix),
        ("gate_up", _Matrix),
        ("down", _Matrix),
        ("attention_norm", _POINTER),
        ("mlp_norm", _POINTER),
        ("window", _NUMBER),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.POINTER(_Layer)),
        ("head", _Matrix),
        ("embedding", _POINTER),
        ("final_norm", _POINTER),
        ("cos", _POINTER),
        ("sin", _POINTER),
        ("num_layers", _NUMBER),
        ("hidden", _NUMBER),
        ("intermediate", _NUMBER),
        ("num_heads", _NUMBER),
        ("num_kv_heads", _NUMBER),
        ("head_dim", _NUMBER),
        ("vocab_size", _NUMBER),
        ("num_positions", _NUMBER),
        ("eps", _REAL),
        ("scale", _REAL),
        ("isa", _FLAG),
        ("is_bfloat16", _FLAG),
    )


class _Call(ctypes.Structure):
    _fields_ = (
        ("keys", _POINTER),
        ("values", _POINTER),
        ("block_stride", _NUMBER),
        ("head_stride", _NUMBER),
        ("slot_stride", _NUMBER),
        ("num_blocks", _NUMBER),
        ("block_size", _NUMBER),
        ("token_ids", _POINTER),
        ("positions", _POINTER),
        ("slots", _POINTER),
        ("block_tables", _POINTER),
        ("blocks_per_request", _NUMBER),
        ("query_starts", _POINTER),
        ("kv_lengths", _POINTER),
        ("logits_rows", _POINTER),
        ("logits", _POINTER),
        ("draws", ctypes.c_char_p),
        ("rules", ctypes.c_char_p),
        ("tokens", _POINTER),
        ("best", _POINTER),
        ("num_tokens", _NUMBER),
        ("num_requests", _NUMBER),
        ("num_rows", _NUMBER),
        ("num_threads", _FLAG),
    )


_PROBLEMS = {
    1: "query_starts must rise from 0 to the number of tokens",
    2: "a kv_length is shorter than its request's queries or longer than its block table",
    3: "a block table names a block outside the caches",
    4: "a token id is outside the vocabulary",
    5: "a position is behind the last one",
    6: "a slot lies behind the last block",
    7: "a row of logits names no token",
}


class PackedStack:
    """A decoder's weights as the kernel reads them: copies, so that the originals and the file they lie in may go."""

    def __init__(self, cpu: CpuLibrary, weights: StackWeights, bits: int | None = None) -> None:
        """`bits`: round the products to 8 or 4 bits. Raises ValueError for weights that the kernel does not take."""
        self.cpu = cpu
        self._bits = bits or 0
        self.dtype = weights.embedding.dtype
        self.vocab_size, hidden = weights.embedding.shape
        self._kept: list[object] = []
        if self.dtype not in (torch.float32, torch.bfloat16) or weights.head_dim % 2:
            raise ValueError(f"weights are {self.dtype} with head dim {weights.head_dim}")
        layers = (_Layer * len(weights.layers))(*(self._layer(layer) for layer in weights.layers))
        self.model = _Model(
            layers,
            # The last product decides between tokens that are close: it keeps 8 bits.
            self._matrix(weights.head, 8 if bits else 0),
            self._keep(weights.embedding.detach().clone(memory_format=torch.contiguous_format)),
            self._float(weights.final_norm),
            self._float(weights.cos_PD),
            self._float(weights.sin_PD),
            len(weights.layers),
            hidden,
            weights.layers[0].gate.weight.shape[0],
            weights.num_heads,
            weights.num_kv_heads,
            weights.head_dim,
            self.vocab_size,
            len(weights.cos_PD),
            weights.eps,
            weights.scale,
            cpu.isa,
            self.dtype == torch.bfloat16,
        )
        self.num_layers = len(weights.layers)
        self._pages: tuple[Sequence[tuple[Tensor, Tensor]], list[_Addresses], tuple[int, ...]] | None = None
        """A store's layers, where each layer's keys and values begin, and what a call says of them."""
        self.model_address = ctypes.addressof(self.model)

    def pages(self, caches: Sequence[tuple[Tensor, Tensor]]) -> tuple[int, ...]:
        """The first fields of a call; looked up once for a store, whose layers are a tuple."""
        if self._pages is None or self._pages[0] is not caches or not isinstance(caches, tuple):
            of_layers = _POINTER * self.num_layers
            addresses = [of_layers(*(cache[part].data_ptr() for cache in caches)) for part in (0, 1)]
            keys = caches[0][0]
            shape = (*keys.stride()[:3], keys.shape[0], keys.shape[2])
            self._pages = caches, addresses, (*map(ctypes.addressof, addresses), *shape)
        return self._pages[2]

    def _layer(self, layer: LayerWeights) -> _Layer:
        return _Layer(
            self._matrix(layer.qkv, self._bits),
            self._matrix(layer.out, self._bits),
            self._gate_and_up(layer),
            self._matrix(layer.down, self._bits),
            self._float(layer.attention_norm),
            self._float(layer.mlp_norm),
            layer.window or 0,
        )

    def _matrix(self, projection: Projection, bits: int) -> _Matrix:
        out_features, in_features = projection.weight.shape
        bias = None if projection.bias is None else self._float(projection.bias)
        return _Matrix(self._keep(self._panels(projection.weight, bits)), bias, in_features, out_features, bits)

    def _gate_and_up(self, layer: LayerWeights) -> _Matrix:
        """Their panels by turns, so that both halves of a product end up side by side."""
        parts = [self._panels(each.weight, self._bits) for each in (layer.gate, layer.up)]
        panels = torch.stack(parts, dim=1)
        num_pairs, width = panels.shape[0], self.cpu.calls.duopool_panel_width(self.cpu.isa)
        bias = None
        if layer.gate.bias is not None and layer.up.bias is not None:
            both = torch.zeros(2, num_pairs * width)
            both[0, : len(layer.gate.bias)] = layer.gate.bias
            both[1, : len(layer.up.bias)] = layer.up.bias
            bias = self._float(both.view(2, num_pairs, width).transpose(0, 1))
        return _Matrix(self._keep(panels), bias, layer.gate.weight.shape[1], 2 * num_pairs * width, self._bits)

    def _panels(self, weight: Tensor, bits: int) -> Tensor:
        if weight.dtype != self.dtype:
            raise ValueError(f"a weight is {weight.dtype}, the embedding {self.dtype}")
        if bits:
            return linear_cpu.pack_quantised(weight, bits, self.cpu)
        panels = linear_cpu.pack(weight, linear_cpu.ANY_ROWS, self.cpu).panels
        assert panels is not None
        return panels

    def _float(self, tensor: Tensor) -> int:
        return self._keep(tensor.detach().to(torch.float32, copy=True).contiguous())

    def _keep(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()


def decoder_stack(
    stack: PackedStack,
    caches: Sequence[tuple[Tensor, Tensor]],
    batch: RaggedBatch,
    logits_rows: array[int],
    draws: Sequence[Draw] = (),
    out: Tensor | None = None,
) -> tuple[Tensor, Drawn]:
    """See `duopool.kernels.ops.decoder_stack`; raises ValueError before anything is written."""
    num_requests, num_rows = len(batch.kv_lengths), len(logits_rows)
    blocks_per_request = len(batch.block_tables) // max(1, num_requests)
    logits = torch.empty(num_rows, stack.vocab_size) if out is None else out
    token_ids, best = array("q", bytes(8 * len(draws))), array("f", bytes(4 * len(draws)))
    call = _Call(
        *stack.pages(caches),
        batch.token_ids.buffer_info()[0],
        batch.positions.buffer_info()[0],
        batch.slots.buffer_info()[0],
        batch.block_tables.buffer_info()[0],
        blocks_per_request,
        batch.query_starts.buffer_info()[0],
        batch.kv_lengths.buffer_info()[0],
        logits_rows.buffer_info()[0],
        logits.data_ptr(),
        packed_draws(draws) if draws else None,
        packed_rules(draws, stack.vocab_size),
        token_ids.buffer_info()[0],
        best.buffer_info()[0],
        len(batch.token_ids),
        num_requests,
        num_rows,
        num_threads(),
    )
    status = stack.cpu.calls.duopool_decoder_stack(stack.model_address, ctypes.byref(call))
    if status:
        raise ValueError(_PROBLEMS[status])
    return logits, Drawn(token_ids.tolist(), best.tolist())
