"""write_kv and copy_blocks change exactly the slots and pages they are given."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duopool.kernels import ops
from duopool.kernels.copy_blocks import reference as copy_blocks_reference
from duopool.kernels.cpu_library import library
from duopool.kernels.write_kv import reference as write_kv_reference

WRITES = {"ops": ops.write_kv, "torch": write_kv_reference.write_kv}
COPIES = {"ops": ops.copy_blocks, "torch": copy_blocks_reference.copy_blocks}
needs_library = pytest.mark.skipif(library() is None, reason="the compiled kernels are not built")


@pytest.mark.parametrize("name", sorted(WRITES))
@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    heads=st.integers(1, 3),
    key_dim=st.integers(1, 40),
    value_dim=st.integers(1, 40),
    block_size=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_every_token_lands_in_its_slot_and_nowhere_else(
    name: str, data: st.DataObject, heads: int, key_dim: int, value_dim: int, block_size: int, dtype: torch.dtype
) -> None:
    num_blocks = 5
    slots = data.draw(st.lists(st.integers(0, num_blocks * block_size - 1), unique=True, max_size=30))
    skipped = [data.draw(st.booleans()) for _ in slots]
    dim = max(key_dim, value_dim)
    pages = torch.randn(num_blocks, 2, heads, block_size, dim).to(dtype)
    wanted = pages.clone()
    # Keys and values as a model gives them: heads before tokens, in one tensor with the queries.
    source = torch.randn(2, heads, len(slots), dim).to(dtype).transpose(1, 2)
    key, value = source[0, ..., :key_dim], source[1, ..., :value_dim]
    for token, (slot, skip) in enumerate(zip(slots, skipped, strict=True)):
        if not skip:
            block, offset = divmod(slot, block_size)
            wanted[block, 0, :, offset, :key_dim] = key[token]
            wanted[block, 1, :, offset, :value_dim] = value[token]
    given_slots = torch.tensor([-1 if skip else slot for slot, skip in zip(slots, skipped, strict=True)]).long()
    WRITES[name](key, value, pages[:, 0, ..., :key_dim], pages[:, 1, ..., :value_dim], given_slots)
    assert torch.equal(pages, wanted)


@pytest.mark.parametrize("name", sorted(COPIES))
@settings(max_examples=40, deadline=None)
@given(order=st.permutations(range(9)), count=st.integers(0, 4), width=st.integers(1, 50))
def test_whole_pages_are_copied_and_the_others_stay(name: str, order: list[int], count: int, width: int) -> None:
    pages = torch.randn(9, width + 2)[:, :width]
    wanted = pages.clone()
    sources, targets = torch.tensor(order[:count]).long(), torch.tensor(order[4 : 4 + count]).long()
    for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
        wanted[target] = wanted[source]
    COPIES[name](pages, sources, targets)
    assert torch.equal(pages, wanted)


@needs_library
def test_a_slot_behind_the_last_page_is_refused_and_nothing_written() -> None:
    cache, source = torch.zeros(3, 1, 4, 8), torch.ones(2, 1, 8)
    with pytest.raises(ValueError, match="3 blocks of 4"):
        ops.write_kv(source, source, cache, cache.clone(), torch.tensor([0, 12]))
    assert not cache.any()


@needs_library
@pytest.mark.parametrize("wrong", [-1, 3])
def test_a_page_that_does_not_exist_is_refused_and_nothing_copied(wrong: int) -> None:
    pages = torch.arange(6.0).view(3, 2)
    before = pages.clone()
    with pytest.raises(ValueError, match="3 pages"):
        ops.copy_blocks(pages, torch.tensor([0, wrong]), torch.tensor([1, 2]))
    assert torch.equal(pages, before)


def test_shapes_that_do_not_fit_are_refused() -> None:
    cache, source = torch.zeros(3, 1, 4, 8), torch.ones(2, 1, 8)
    with pytest.raises(ValueError, match="do not fit"):
        ops.write_kv(source, source, cache, cache, torch.tensor([0]))
    with pytest.raises(ValueError, match="int64"):
        ops.write_kv(source, source, cache, cache, torch.tensor([0, 1]).int())
    with pytest.raises(ValueError, match="one length"):
        ops.copy_blocks(torch.zeros(3, 2), torch.tensor([0]), torch.tensor([1, 2]))
