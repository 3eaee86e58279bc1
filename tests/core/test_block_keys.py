"""Block keys: names of prefixes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duopool.core.block_keys import KEY_BYTES, KeyChain, block_keys

TOKENS = st.lists(st.integers(min_value=0, max_value=2**31 - 1), max_size=40)
SIZES = st.integers(min_value=1, max_value=9)


@given(pieces=st.lists(TOKENS, max_size=5), block_size=SIZES, salt=st.binary(max_size=80))
def test_appending_in_any_pieces_gives_the_keys_of_the_whole(
    pieces: list[list[int]], block_size: int, salt: bytes
) -> None:
    chain = KeyChain(block_size, salt=salt, namespace=b"model")
    whole: list[int] = []
    for piece in pieces:
        before = chain.copy()
        chain.extend(piece)
        whole += piece
        assert before.num_tokens == len(whole) - len(piece)
        assert chain.num_tokens == len(whole)
        assert tuple(chain.keys) == block_keys(whole, block_size, salt=salt, namespace=b"model")
    assert len(chain.keys) == len(whole) // block_size


@given(first=TOKENS, second=TOKENS, block_size=SIZES)
def test_keys_agree_exactly_as_far_as_full_blocks_agree(first: list[int], second: list[int], block_size: int) -> None:
    keys = zip(block_keys(first, block_size), block_keys(second, block_size), strict=False)
    for index, (one, other) in enumerate(keys):
        end = (index + 1) * block_size
        assert (one == other) == (first[:end] == second[:end])
        assert len(one) == KEY_BYTES


@given(
    roots=st.lists(st.tuples(st.binary(max_size=70), st.binary(max_size=70)), min_size=2, max_size=5, unique=True),
)
def test_other_salts_and_namespaces_never_share_a_key(roots: list[tuple[bytes, bytes]]) -> None:
    keys = [key for salt, namespace in roots for key in block_keys(range(6), 2, salt=salt, namespace=namespace)]
    assert len(set(keys)) == len(keys) == 3 * len(roots)


def test_keys_are_the_same_on_every_machine() -> None:
    """Workers and routers on different machines must agree; this pins format and byte order."""
    assert [key.hex() for key in block_keys([1, 2, 3, 4], 2, salt=b"tenant", namespace=b"model")] == GOLDEN


def test_token_that_is_no_int32_is_refused_and_nothing_changes() -> None:
    chain = KeyChain(2)
    chain.extend([5])
    with pytest.raises(OverflowError):
        chain.extend([6, 2**31])
    assert chain.num_tokens == 1


GOLDEN = ["5f76d3f7bac885a77ef2b5ade44e58be", "e64c8f34cc66005f3d54c0730790ef48"]
