"""The Triton kernels: by the interpreter, compiled for CUDA without a device, and on a device if there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

HERE = Path(__file__).parent
OPS = ("paged_attention", "write_kv", "copy_blocks")


def run(op: str, device: str, **environment: str) -> None:
    paths = os.pathsep.join([str(HERE.parent.parent), *sys.path])
    command = [sys.executable, str(HERE / "triton_cases.py"), op, device]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("op", OPS)
def test_agrees_with_the_reference_in_the_interpreter(op: str) -> None:
    run(op, "cpu", TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("op", OPS)
def test_agrees_with_the_reference_on_a_device(op: str) -> None:
    run(op, "cuda")


def test_attention_compiles_for_cuda() -> None:
    """The interpreter accepts programs that the compiler refuses."""
    program = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from duopool.kernels.paged_attention.triton_kernel import _attend as kernel
constants = dict(GROUP=3, KEY_DIM=72, VALUE_DIM=64, KEY_PAD=128, VALUE_PAD=64, BLOCK_SIZE=16, ROWS=16, KEYS=32,
                 SPLITS=2, HAS_SINKS=True, HAS_CAP=True, HAS_WINDOW=True, WIDEN=False)
types = {name: "constexpr" for name in constants}
types |= {name: "*bf16" for name in ("query", "keys", "values", "out")}
types |= {name: "*i32" for name in ("block_tables", "query_starts", "kv_lengths", "tile_starts")}
types |= {name: "*fp32" for name in ("sinks", "partial_mixed", "partial_largest", "partial_total")}
types |= {name: "fp32" for name in ("scale", "soft_cap")}
signature = {name: types.get(name, "i32") for name in kernel.arg_names}
built = compile(ASTSource(kernel, signature=signature, constexprs=constants), target=GPUTarget("cuda", 90, 32))
assert "mma" in built.asm["ptx"]
"""
    paths = os.pathsep.join([str(HERE.parent.parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
