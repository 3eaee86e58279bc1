"""Which instruction set a process uses, and that a strange library is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from duopool.kernels import cpu_library
from duopool.kernels.cpu_library import Isa

find = cpu_library.library.__wrapped__
needs_library = pytest.mark.skipif(cpu_library.library() is None, reason="the compiled kernels are not built")


def test_torch_alone_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUOPOOL_CPU_ISA", "torch")
    assert find() is None


@needs_library
def test_one_instruction_set_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUOPOOL_CPU_ISA", "portable")
    assert find().isa is Isa.PORTABLE


@needs_library
def test_a_name_that_means_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUOPOOL_CPU_ISA", "sse9")
    with pytest.raises(ValueError, match="sse9"):
        find()


def test_a_missing_or_broken_library_means_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DUOPOOL_CPU_ISA", raising=False)
    broken = tmp_path / "broken.so"
    monkeypatch.setattr(cpu_library, "_path", lambda: broken)
    assert find() is None
    broken.write_bytes(b"not a library")
    assert find() is None
    monkeypatch.setenv("DUOPOOL_CPU_ISA", "avx2")
    with pytest.raises(ValueError, match=r"broken\.so"):
        find()


@needs_library
def test_a_library_of_another_build_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DUOPOOL_CPU_ISA", raising=False)
    monkeypatch.setattr(cpu_library, "ABI", cpu_library.ABI + 1)
    assert find() is None
