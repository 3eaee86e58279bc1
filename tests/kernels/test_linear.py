"""Linear layers over packed weights give float32 products rounded once, for every shape, dtype and instruction set."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compiled import COMPILED, ISAS, compiled, needs_library
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from duopool.kernels import ops
from duopool.kernels.cpu_library import Isa
from duopool.kernels.linear import cpu
from duopool.kernels.linear.reference import linear as reference

dtypes = st.sampled_from([torch.float32, torch.bfloat16])


@needs_library
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name.lower())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
@given(
    seed=st.integers(0, 1 << 30),
    rows=st.one_of(st.integers(0, 9), st.integers(10, 130)),
    in_features=st.one_of(st.integers(1, 40), st.integers(41, 700)),
    out_features=st.integers(1, 100),
    x_dtype=dtypes,
    weight_dtype=dtypes,
    has_bias=st.booleans(),
)
def test_agrees_with_the_reference(
    isa: Isa,
    seed: int,
    rows: int,
    in_features: int,
    out_features: int,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    has_bias: bool,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, in_features + 3, generator=generator).to(x_dtype)[:, 1 : in_features + 1]
    weight = torch.randn(out_features, in_features + 2, generator=generator).to(weight_dtype)[:, :in_features]
    bias = torch.randn(out_features, generator=generator).to(x_dtype) if has_bias else None
    packed = cpu.pack(weight, cpu.ANY_ROWS, compiled(isa))
    got = cpu.linear(compiled(isa), x, packed, bias)
    assert got.dtype == x_dtype
    wanted = reference(x, weight, bias)
    tolerance = 2e-5 if x_dtype == torch.float32 else 8e-3
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance * in_features**0.5)


@needs_library
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name.lower())
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_inputs_too_deep_for_one_slice(isa: Isa, weight_dtype: torch.dtype) -> None:
    x = torch.randn(7, 5000, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(33, 5000, generator=torch.Generator().manual_seed(1)).to(weight_dtype)
    got = cpu.linear(compiled(isa), x, cpu.pack(weight, cpu.ANY_ROWS, compiled(isa)), None)
    torch.testing.assert_close(got, reference(x, weight), rtol=1e-4, atol=1e-3)


@needs_library
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name.lower())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_whole_numbers_are_exact_and_rounded_once_to_even(isa: Isa, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-30, 31, (40, 90), generator=generator).to(dtype)
    weight = torch.randint(-30, 31, (50, 90), generator=generator).bfloat16()
    packed = cpu.pack(weight, cpu.ANY_ROWS, compiled(isa))
    assert torch.equal(cpu.linear(compiled(isa), x, packed, None), (x.long() @ weight.long().t()).float().to(dtype))


@needs_library
def test_not_a_number_stays_one_and_touches_no_other_row() -> None:
    x = torch.ones(9, 20).bfloat16()
    x[4, 3] = float("nan")
    x[5, 0] = float("inf")
    got = ops.linear(x, ops.pack_weight(torch.ones(18, 20).bfloat16()))
    assert got[4].isnan().all()
    assert (got[5] == float("inf")).all()
    assert (got[[0, 1, 2, 3, 6, 7, 8]] == 20).all()


@needs_library
def test_many_rows_go_to_torch_where_it_has_bfloat16_tiles() -> None:
    machine = replace(compiled(COMPILED.isa), torch_has_bfloat16_tiles=True)
    weight = torch.randn(40, 24).bfloat16()
    most = cpu.most_rows(weight.dtype, machine)
    packed = cpu.pack(weight, most, machine)
    assert packed.original is weight
    x = torch.randn(most + 1, 24).bfloat16()
    assert torch.equal(cpu.linear(machine, x, packed, None), torch.nn.functional.linear(x, weight))
    few = cpu.linear(machine, x[:most], packed, None)
    torch.testing.assert_close(few, reference(x[:most], weight))


def test_without_the_library_weights_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "library", lambda: None)
    weight, bias, x = torch.randn(6, 5), torch.randn(6), torch.randn(3, 5)
    assert not ops.linear_is_worthwhile(torch.bfloat16)
    packed = ops.pack_weight(weight)
    assert packed.original is weight
    torch.testing.assert_close(ops.linear(x, packed, bias), reference(x, weight, bias))


def test_wrong_shapes_and_dtypes_are_refused() -> None:
    packed = ops.pack_weight(torch.zeros(6, 5, dtype=torch.bfloat16))
    for x, bias in (
        (torch.zeros(2, 4), None),
        (torch.zeros(5), None),
        (torch.zeros(2, 5), torch.zeros(5)),
        (torch.zeros(2, 5), torch.zeros(6).bfloat16()),
        (torch.zeros(2, 5).double(), None),
    ):
        with pytest.raises(ValueError, match=r"float|shape"):
            ops.linear(x, packed, bias)
