"""Laws of the page layout: a page belongs to one block, over all its layers, and to nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duopool.engine.kv_layout import KVLayout, LayerShape
from duopool.engine.kv_store import KVStore

SHAPES = st.builds(
    LayerShape, num_kv_heads=st.integers(1, 3), key_dim=st.sampled_from([4, 8]), value_dim=st.sampled_from([4, 12])
)
LAYOUTS = st.builds(
    KVLayout,
    layers=st.lists(SHAPES, min_size=1, max_size=3).map(tuple),
    block_size=st.sampled_from([1, 4, 16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)


@settings(max_examples=40, deadline=None)
@given(LAYOUTS, st.integers(1, 5), st.data())
def test_writing_a_block_through_its_layers_fills_its_page_and_no_other(
    layout: KVLayout, num_blocks: int, data: st.DataObject
) -> None:
    store = KVStore(layout, num_blocks)
    block = data.draw(st.integers(0, num_blocks - 1))
    for index, shape in enumerate(layout.layers):
        key, value = store.layer(index)
        assert key.shape == (num_blocks, shape.num_kv_heads, layout.block_size, shape.key_dim)
        assert value.shape == (num_blocks, shape.num_kv_heads, layout.block_size, shape.value_dim)
        # Each half is written once: an overlap would leave another half's number behind.
        key[block] = 2 * index + 1
        value[block] = 2 * index + 2
    for other in range(num_blocks):
        filled = np.frombuffer(store.page(other), np.uint8).any()
        assert filled == (other == block)
    for index in range(len(layout.layers)):
        key, value = store.layer(index)
        assert (key[block] == 2 * index + 1).all()
        assert (value[block] == 2 * index + 2).all()
    assert not (store.pages[block] == 0).any()


@settings(max_examples=20, deadline=None)
@given(LAYOUTS)
def test_bytes_carry_a_page_to_another_store(layout: KVLayout) -> None:
    source, target = KVStore(layout, 2), KVStore(layout, 3)
    assert source.digest == target.digest
    source.pages[1] = torch.randn(layout.page_elements)
    target.page(2)[:] = source.page(1)
    assert torch.equal(target.pages[2], source.pages[1])
    assert not target.pages[:2].any()
    assert len(source.page(0)) == source.page_bytes
    assert source.base_address + source.page_bytes == source.pages[1].data_ptr()


def test_digest_tells_layouts_apart() -> None:
    shape = LayerShape(num_kv_heads=2, key_dim=8, value_dim=8)
    base = KVLayout(layers=(shape,), block_size=4, dtype=torch.float32)
    others = [
        KVLayout(layers=(shape, shape), block_size=4, dtype=torch.float32),
        KVLayout(layers=(shape,), block_size=8, dtype=torch.float32),
        KVLayout(layers=(shape,), block_size=4, dtype=torch.bfloat16),
        KVLayout(layers=(LayerShape(num_kv_heads=4, key_dim=4, value_dim=4),), block_size=4, dtype=torch.float32),
    ]
    assert len({each.digest for each in (base, *others)}) == 5


def test_a_store_needs_a_block() -> None:
    layout = KVLayout(layers=(LayerShape(num_kv_heads=1, key_dim=4, value_dim=4),), block_size=4, dtype=torch.float32)
    with pytest.raises(ValueError, match="at least one"):
        KVStore(layout, 0)
