"""The compiled kernels as tests take them: each instruction set that this machine has."""

from __future__ import annotations

from dataclasses import replace

import pytest

from duopool.kernels.cpu_library import CpuLibrary, Isa, library

COMPILED = library()
ISAS = [isa for isa in Isa if COMPILED is not None and isa <= COMPILED.isa]
needs_library = pytest.mark.skipif(COMPILED is None, reason="the compiled kernels are not built")


def compiled(isa: Isa) -> CpuLibrary:
    assert COMPILED is not None
    return replace(COMPILED, isa=isa)
