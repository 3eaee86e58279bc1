"""The kernels' only face: each op picks its implementation by where the tensors live.

Owns the contracts (shapes, dtypes, errors) and the choice. The implementations stand in one folder per op; Triton is
imported only when a CUDA tensor arrives.

Legend: T query tokens, B requests, H query heads, G kv heads, D key head dim, E value head dim, S block size, N blocks,
M most blocks of a request, X elements of a page, K input features.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from duopool.kernels.copy_blocks import cpu as copy_blocks_cpu
from duopool.kernels.copy_blocks import reference as copy_blocks_reference
from duopool.kernels.cpu_library import CpuLibrary, library
from duopool.kernels.crc32 import cpu as crc32_cpu
from duopool.kernels.crc32 import reference as crc32_reference
from duopool.kernels.decoder_stack import cpu as stack_cpu
from duopool.kernels.decoder_stack.cpu import PackedStack
from duopool.kernels.decoder_stack.weights import StackWeights
from duopool.kernels.linear import cpu as linear_cpu
from duopool.kernels.linear.packed_weight import PackedWeight
from duopool.kernels.paged_attention import cpu as attention_cpu
from duopool.kernels.paged_attention import torch_fallback as attention_fallback
from duopool.kernels.ragged_batch import RaggedBatch
from duopool.kernels.sample_tokens import cpu as sample_tokens_cpu
from duopool.kernels.sample_tokens import reference as sample_tokens_reference
from duopool.kernels.sample_tokens.draw import Draw, Drawn
from duopool.kernels.token_logprobs import cpu as token_logprobs_cpu
from duopool.kernels.token_logprobs import reference as token_logprobs_reference
from duopool.kernels.token_logprobs.found import FoundLogprobs
from duopool.kernels.write_kv import cpu as write_kv_cpu
from duopool.kernels.write_kv import reference as write_kv_reference

__all__ = [
    "PackedStack",
    "PackedWeight",
    "copy_blocks",
    "copy_pages",
    "crc32",
    "decoder_stack",
    "linear",
    "linear_is_worthwhile",
    "pack_stack",
    "pack_weight",
    "paged_attention",
    "sample_tokens",
    "token_logprobs",
    "write_kv",
]


def paged_attention(
    q_THD: Tensor,
    key_cache_NGSD: Tensor,
    value_cache_NGSE: Tensor,
    block_tables_BM: Tensor,
    query_starts: Tensor,
    kv_lengths: Tensor,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_H: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Causal attention of a ragged batch over paged keys and values, as [T, H, E].

    Request b owns queries `query_starts[b]:query_starts[b + 1]` (int32 [B + 1]); the i-th of its n queries stands at
    position `kv_lengths[b] - n + i` and sees the keys at positions up to its own, and with `window` only the last
    `window` of those. The key at position p lies in page `block_tables_BM[b, p // S]` (int32) at offset `p % S`.
    Scores are `scale * q.k`, then `soft_cap * tanh(score / soft_cap)`; `sinks_H` adds one score per head to the
    denominator alone. Prompt chunks and single decode tokens mix freely. Pages that no request names are never read.

    The caches may be views with any strides but the last. Raises ValueError when shapes or dtypes do not fit.
    """
    _check_attention(q_THD, key_cache_NGSD, value_cache_NGSE, block_tables_BM, query_starts, kv_lengths, sinks_H, out)
    call = _attention_for(q_THD, key_cache_NGSD, value_cache_NGSE)
    return call(
        q_THD,
        key_cache_NGSD,
        value_cache_NGSE,
        block_tables_BM,
        query_starts,
        kv_lengths,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        sinks_H=sinks_H,
        out=out,
    )


def _cpu_for(*tensors: Tensor) -> CpuLibrary | None:
    """The compiled kernels, when they take these tensors: on the CPU, of one dtype they know, contiguous at the end."""
    dtype = tensors[0].dtype
    if dtype is not torch.float32 and dtype is not torch.bfloat16:
        return None
    for tensor in tensors:
        if tensor.dtype is not dtype or not tensor.is_cpu or tensor.stride(-1) != 1:
            return None
    return library()


def _attention_for(q_THD: Tensor, key_cache_NGSD: Tensor, value_cache_NGSE: Tensor) -> Callable[..., Tensor]:
    if q_THD.is_cuda:
        from duopool.kernels.paged_attention.triton_kernel import paged_attention as on_cuda

        return on_cuda
    cpu = _cpu_for(q_THD, key_cache_NGSD, value_cache_NGSE)
    return attention_fallback.paged_attention if cpu is None else partial(attention_cpu.paged_attention, cpu)


def _check_attention(
    q_THD: Tensor,
    key_cache_NGSD: Tensor,
    value_cache_NGSE: Tensor,
    block_tables_BM: Tensor,
    query_starts: Tensor,
    kv_lengths: Tensor,
    sinks_H: Tensor | None,
    out: Tensor | None,
) -> None:
    num_tokens, num_heads, key_dim = q_THD.shape
    num_blocks, kv_heads, block_size, value_dim = value_cache_NGSE.shape
    if key_cache_NGSD.shape != (num_blocks, kv_heads, block_size, key_dim) or num_heads % kv_heads:
        raise ValueError(
            f"queries {tuple(q_THD.shape)}, keys {tuple(key_cache_NGSD.shape)} and values "
            f"{tuple(value_cache_NGSE.shape)} do not fit together"
        )
    requests = kv_lengths.shape[0]
    if block_tables_BM.shape[0] != requests or query_starts.shape[0] != requests + 1:
        raise ValueError(
            f"{requests} kv_lengths, {block_tables_BM.shape[0]} block tables, {query_starts.shape[0]} query_starts"
        )
    if not (block_tables_BM.dtype is query_starts.dtype is kv_lengths.dtype is torch.int32):
        raise ValueError("block_tables, query_starts and kv_lengths must be int32")
    if requests and block_tables_BM.stride(1) != 1 and block_tables_BM.shape[1] > 1:
        raise ValueError("a block table must be contiguous")
    if key_cache_NGSD.dtype != q_THD.dtype or value_cache_NGSE.dtype != q_THD.dtype:
        raise ValueError(f"queries are {q_THD.dtype}, caches {key_cache_NGSD.dtype} and {value_cache_NGSE.dtype}")
    if sinks_H is not None and sinks_H.shape != (num_heads,):
        raise ValueError(f"sinks have shape {tuple(sinks_H.shape)}, not ({num_heads},)")
    if out is not None and (out.shape != (num_tokens, num_heads, value_dim) or out.dtype != q_THD.dtype):
        wanted = (num_tokens, num_heads, value_dim)
        raise ValueError(f"out is {tuple(out.shape)} {out.dtype}, not {wanted} {q_THD.dtype}")
    if out is not None and out.stride(2) != 1:
        raise ValueError("out must be contiguous in its last dimension")


def write_kv(key_TGD: Tensor, value_TGE: Tensor, key_cache: Tensor, value_cache: Tensor, slots_T: Tensor) -> None:
    """Put token t's key and value at `slots_T[t]` (int64: `block_id * S + offset`; negative: nowhere)."""
    _check_write(key_TGD, value_TGE, key_cache, value_cache, slots_T)
    if key_cache.is_cuda:
        from duopool.kernels.write_kv.triton_kernel import write_kv as on_cuda

        on_cuda(key_TGD, value_TGE, key_cache, value_cache, slots_T)
    elif (cpu := _cpu_for(key_TGD, value_TGE, key_cache, value_cache)) is not None:
        write_kv_cpu.write_kv(cpu, key_TGD, value_TGE, key_cache, value_cache, slots_T)
    else:
        write_kv_reference.write_kv(key_TGD, value_TGE, key_cache, value_cache, slots_T)


def _check_write(key_TGD: Tensor, value_TGE: Tensor, key_cache: Tensor, value_cache: Tensor, slots_T: Tensor) -> None:
    _, kv_heads, _, key_dim = key_cache.shape
    value_dim = value_cache.shape[3]
    tokens = slots_T.shape[0]
    if key_TGD.shape != (tokens, kv_heads, key_dim) or value_TGE.shape != (tokens, kv_heads, value_dim):
        raise ValueError(
            f"keys {tuple(key_TGD.shape)} and values {tuple(value_TGE.shape)} do not fit {tokens} slots, "
            f"{kv_heads} heads of {key_dim} and {value_dim}"
        )
    if value_cache.shape[:3] != key_cache.shape[:3] or slots_T.dtype != torch.int64:
        raise ValueError(
            f"caches are {tuple(key_cache.shape)} and {tuple(value_cache.shape)}, slots {slots_T.dtype}, not int64"
        )


def copy_blocks(pages_NX: Tensor, sources: Tensor, targets: Tensor) -> None:
    """Copy page `sources[i]` onto page `targets[i]` (int64 [n]). A target is named once and is no source."""
    if sources.dtype != torch.int64 or targets.dtype != torch.int64 or sources.shape != targets.shape:
        raise ValueError(f"sources and targets must be int64 of one length, not {sources.shape} and {targets.shape}")
    if pages_NX.is_cuda:
        from duopool.kernels.copy_blocks.triton_kernel import copy_blocks as on_cuda

        on_cuda(pages_NX, sources, targets)
    elif (cpu := library()) is not None and pages_NX.is_cpu and pages_NX.stride(1) == 1:
        copy_blocks_cpu.copy_blocks(cpu, pages_NX, sources, targets)
    else:
        copy_blocks_reference.copy_blocks(pages_NX, sources, targets)


def linear_is_worthwhile(dtype: torch.dtype) -> bool:
    """Whether packed weights of `dtype` make linear layers on this machine's CPU faster than torch's own."""
    return linear_cpu.most_rows(dtype, library()) > 0


def pack_weight(weight: Tensor) -> PackedWeight:
    """Prepare a weight [out_features, in_features] for `linear`; keeps it as it is where torch's product is faster.

    Where the panels serve every call the result holds no reference to `weight`, so that its memory can be freed.
    """
    out_features, in_features = weight.shape
    cpu = library() if weight.device.type == "cpu" else None
    rows = linear_cpu.most_rows(weight.dtype, cpu)
    if cpu is None or rows == 0:
        return PackedWeight(
            out_features=out_features, in_features=in_features, most_rows=0, original=weight, panels=None
        )
    return linear_cpu.pack(weight, rows, cpu)


def linear(x_TK: Tensor, weight: PackedWeight | Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` as [T, out_features] in x's dtype (float32 or bfloat16); products are summed in float32.

    Raises ValueError when the shapes or dtypes do not fit.
    """
    if isinstance(weight, Tensor):
        return torch.nn.functional.linear(x_TK, weight, bias)
    if x_TK.dim() != 2 or x_TK.shape[1] != weight.in_features:
        raise ValueError(f"x has shape {tuple(x_TK.shape)}, the weight takes [T, {weight.in_features}]")
    if bias is not None and (bias.shape != (weight.out_features,) or bias.dtype != x_TK.dtype):
        raise ValueError(f"bias is {tuple(bias.shape)} {bias.dtype}, not [{weight.out_features}] {x_TK.dtype}")
    if x_TK.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"x is {x_TK.dtype}, not float32 or bfloat16")
    return linear_cpu.linear(library(), x_TK, weight, bias)


def pack_stack(weights: StackWeights, bits: int | None = None) -> PackedStack | None:
    """Prepare a whole decoder for `decoder_stack`; None where layer by layer is faster, or all there is.

    With `bits` (8 or 4) weights of products are rounded to nearest, in groups of 32 inputs with a bfloat16 scale each,
    and for 4 bits a least value; the head keeps 8 bits. Activations meet them as bytes, scaled by row and group.
    """
    if bits not in (None, 8, 4):
        raise ValueError(f"weights of {bits} bits; 8 and 4 are known")
    cpu = library() if weights.embedding.is_cpu else None
    if cpu is None or (cpu.torch_has_bfloat16_tiles and bits is None):
        return None
    return PackedStack(cpu, weights, bits)


def decoder_stack(
    stack: PackedStack,
    caches: Sequence[tuple[Tensor, Tensor]],
    batch: RaggedBatch,
    logits_rows: array[int],
    draws: Sequence[Draw] = (),
    out: Tensor | None = None,
) -> tuple[Tensor, Drawn]:
    """One step of a decoder of the Llama shape in one call: logits, float32 [R, vocabulary], of tokens `logits_rows`.

    `caches` are keys and values [N, G, S, D] per layer, all with the strides of the first; the step's own go to their
    slots before its attention. Rows are int64. With `draws`, one for each row, the rows' tokens are drawn as by
    `sample_tokens`. The residual stream is float32; factors of products, queries and pages have the weights' dtype.
    Logits go to `out` if there is one. Raises ValueError when something does not fit.
    """
    first = caches[0][0]
    if len(caches) != stack.num_layers or first.dtype != stack.dtype or first.stride(3) != 1:
        raise ValueError(f"{len(caches)} caches of {first.dtype} for {stack.num_layers} layers of {stack.dtype}")
    batch.check()
    if logits_rows.typecode != "q" or (draws and len(draws) != len(logits_rows)):
        raise ValueError(f"rows of logits must be int64, with a draw for each or none; got {len(draws)} draws")
    if out is not None:
        wanted = (len(logits_rows), stack.vocab_size)
        if out.shape != wanted or out.dtype != torch.float32 or not out.is_contiguous():
            raise ValueError(f"out is {tuple(out.shape)} {out.dtype}, not contiguous {wanted} float32")
    return stack_cpu.decoder_stack(stack, caches, batch, logits_rows, draws, out)


def sample_tokens(logits_RV: Tensor, draws: Sequence[Draw]) -> Drawn:
    """The next token of each row of float32 logits, drawn as `draws` says, and the row's largest logit.

    A draw's rules change a copy of the row first. Greedy rows take the first of the best. The others divide by the
    temperature, drop what min-p, then top-k, then top-p excludes (equal logits stay or go together), and take the best
    of logit plus Gumbel noise (`sample_tokens/noise.py`), which is a draw from the softmax. A row's token does not
    depend on its neighbours.
    Raises ValueError unless the logits are float32 with a draw for each row.
    """
    if logits_RV.dtype != torch.float32 or len(draws) != len(logits_RV):
        raise ValueError(f"{len(logits_RV)} rows of {logits_RV.dtype} logits, {len(draws)} draws; float32, one each")
    cpu = library() if logits_RV.is_cpu else None
    if cpu is None:
        return sample_tokens_reference.sample_tokens(logits_RV, draws)
    return sample_tokens_cpu.sample_tokens(cpu, logits_RV, draws)


def token_logprobs(logits_RV: Tensor, rows: Sequence[int], token_ids: Sequence[int], num_top: int) -> FoundLogprobs:
    """How likely token `token_ids[i]` is by row `rows[i]` of float32 logits, and the row's `num_top` likeliest tokens.

    Log-probabilities are those of the softmax; equal logits are listed in their order, a rank counts larger ones.
    Raises ValueError when a row, a token or `num_top` is not one of these logits.
    """
    count, size = logits_RV.shape
    if logits_RV.dtype != torch.float32 or len(rows) != len(token_ids) or not 0 <= num_top <= size:
        raise ValueError(f"{logits_RV.dtype} {count, size}: {len(rows)} rows, {len(token_ids)} tokens, top {num_top}")
    if not rows:
        return FoundLogprobs([], [], [], [])
    if not (0 <= min(rows) <= max(rows) < count and 0 <= min(token_ids) <= max(token_ids) < size):
        raise ValueError(f"rows {list(rows)} and tokens {list(token_ids)} are not all within logits {count, size}")
    cpu = library() if logits_RV.is_cpu else None
    if cpu is None:
        return token_logprobs_reference.token_logprobs(logits_RV, rows, token_ids, num_top)
    return token_logprobs_cpu.token_logprobs(cpu, logits_RV, rows, token_ids, num_top)


def crc32(data: bytes | memoryview) -> int:
    """CRC-32 of contiguous bytes: `zlib.crc32(data)`, ten times as fast where the processor multiplies polynomials."""
    cpu = library()
    return zlib.crc32(data) if cpu is None else crc32_cpu.crc32(cpu, data)


def copy_pages(
    source_address: int, sources: Sequence[int], target_address: int, targets: Sequence[int], *, page_bytes: int
) -> list[int]:
    """Copy page `sources[i]` of one memory over page `targets[i]` of another; the CRC-32 of each as it was written.

    A memory is pages of `page_bytes` side by side from its address, in this process; the two do not overlap. Nothing is
    checked: the caller knows that the pages are there, and that they stay. Python's lock is free meanwhile.
    """
    cpu = library()
    copy = crc32_reference.copy_pages if cpu is None else partial(crc32_cpu.copy_pages, cpu)
    return copy(source_address, sources, target_address, targets, page_bytes=page_bytes)
