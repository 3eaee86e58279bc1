"""The compiled CPU kernels, if this machine has them: finds the library, picks the instruction set, declares the calls.

Owns the C boundary and nothing else. The library is optional: without it, or with DUOPOOL_CPU_ISA=torch, `library()` is
None and ops.py uses torch. DUOPOOL_CPU_ISA=avx512_dots, avx512, avx2 or portable forces one instruction set.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import sysconfig
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import torch  # loads the OpenMP runtime that the library's own symbols are resolved against

log = logging.getLogger(__name__)

ABI = 6


class Isa(IntEnum):
    """Instruction sets of every_isa.h."""

    PORTABLE = 0
    AVX2 = 1
    AVX512 = 2
    AVX512_DOTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuLibrary:
    """The loaded library and the instruction set in use."""

    calls: ctypes.CDLL
    isa: Isa
    torch_has_bfloat16_tiles: bool
    """The processor has matrix tiles for bfloat16 (AMX), and torch makes use of them."""


def _path() -> Path:
    return Path(__file__).parent / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"


def _load() -> ctypes.CDLL | None:
    path = _path()
    if not path.exists():
        return None
    try:
        if not hasattr(ctypes.CDLL(None), "GOMP_parallel"):
            ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
        calls = ctypes.CDLL(str(path), mode=os.RTLD_NOW)
    except OSError:
        return None
    if hasattr(calls, "duopool_abi") and calls.duopool_abi() == ABI:
        return calls
    log.warning("%s is of another build and is not used: run `python setup.py build_ext --inplace`", path)
    return None


def _declare(calls: ctypes.CDLL) -> None:
    pointer, number, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    calls.duopool_panel_width.argtypes = [flag]
    calls.duopool_panel_width.restype = number
    calls.duopool_pack_weight.argtypes = [flag, flag, pointer, number, number, number, pointer]
    calls.duopool_pack_weight.restype = None
    calls.duopool_quantised_panel_bytes.argtypes = [flag, flag, number]
    calls.duopool_quantised_panel_bytes.restype = number
    calls.duopool_pack_quantised.argtypes = [flag, flag, pointer, number, number, number, pointer]
    calls.duopool_pack_quantised.restype = None
    calls.duopool_linear.argtypes = [
        *(flag, flag, flag, pointer, number, number, pointer),
        *(number, number, pointer, pointer, number, flag),
    ]
    calls.duopool_linear.restype = None
    calls.duopool_paged_attention.argtypes = [pointer]
    calls.duopool_paged_attention.restype = flag
    calls.duopool_write_kv.argtypes = [pointer]
    calls.duopool_write_kv.restype = flag
    calls.duopool_decoder_stack.argtypes = [pointer, pointer]
    calls.duopool_decoder_stack.restype = flag
    calls.duopool_copy_blocks.argtypes = [pointer, number, number, number, pointer, pointer, number, flag]
    calls.duopool_copy_blocks.restype = flag
    calls.duopool_sample_tokens.argtypes = [
        *(flag, pointer, number, number, number),
        *(ctypes.c_char_p, ctypes.c_char_p, pointer, pointer, flag),
    ]
    calls.duopool_sample_tokens.restype = None
    calls.duopool_token_logprobs.argtypes = [
        *(flag, pointer, number, number, number, pointer, pointer),
        *(number, pointer, pointer, pointer, pointer, flag),
    ]
    calls.duopool_token_logprobs.restype = None
    calls.duopool_contenders.argtypes = [
        *(flag, pointer, number, number, number, pointer, pointer),
        *(number, pointer, pointer, flag),
    ]
    calls.duopool_contenders.restype = None
    calls.duopool_top_candidates.argtypes = [
        *(flag, pointer, number, number, number, pointer, pointer, pointer),
        *(number, pointer, pointer, pointer, pointer, flag),
    ]
    calls.duopool_top_candidates.restype = None
    calls.duopool_crc32.argtypes = [pointer, number]
    calls.duopool_crc32.restype = ctypes.c_uint32
    calls.duopool_copy_pages.argtypes = [pointer, pointer, number, pointer, pointer, number, pointer]
    calls.duopool_copy_pages.restype = None


@functools.cache
def library() -> CpuLibrary | None:
    """The kernels to use in this process; ValueError when DUOPOOL_CPU_ISA names what cannot run here."""
    wanted = os.environ.get("DUOPOOL_CPU_ISA", "").lower()
    if wanted == "torch":
        return None
    calls = _load()
    if calls is None:
        if wanted:
            raise ValueError(f"DUOPOOL_CPU_ISA={wanted}, but the compiled kernels cannot be loaded from {_path()}")
        return None
    best = Isa(calls.duopool_best_isa())
    if wanted and wanted.upper() not in Isa.__members__:
        raise ValueError(f"DUOPOOL_CPU_ISA={wanted} is none of avx512_dots, avx512, avx2, portable, torch")
    isa = Isa[wanted.upper()] if wanted else best
    if isa > best:
        raise ValueError(f"DUOPOOL_CPU_ISA={wanted}, but this processor goes up to {best.name.lower()}")
    _declare(calls)
    return CpuLibrary(
        calls=calls,
        isa=isa,
        torch_has_bfloat16_tiles=bool(calls.duopool_has_bfloat16_tiles()),
    )


def num_threads() -> int:
    """Threads a call may use: torch's own number."""
    return torch.get_num_threads()
