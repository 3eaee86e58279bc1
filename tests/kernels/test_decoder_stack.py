"""A whole decoder in one call gives what the plain one gives, for ragged batches over scattered pages."""

from __future__ import annotations

from array import array
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from compiled import ISAS, compiled, needs_library
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from duopool.kernels import ops
from duopool.kernels.cpu_library import Isa
from duopool.kernels.decoder_stack import cpu
from duopool.kernels.decoder_stack.cpu import PackedStack
from duopool.kernels.decoder_stack.reference import decoder_stack as reference
from duopool.kernels.decoder_stack.weights import LayerWeights, Projection, StackWeights
from duopool.kernels.linear.reference import rounded_to
from duopool.kernels.ragged_batch import RaggedBatch
from duopool.kernels.sample_tokens.draw import Draw, Drawn
from duopool.kernels.sample_tokens.rules import Rules

BLOCK_SIZE = 4
NUM_BLOCKS = 40
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def make_weights(
    generator: torch.Generator,
    dtype: torch.dtype,
    *,
    kv_heads: int = 2,
    group: int = 3,
    head_dim: int = 10,
    intermediate: int = 45,
    vocab_size: int = 77,
    has_bias: bool = False,
    windows: tuple[int | None, ...] = (None, 5),
) -> StackWeights:
    hidden = kv_heads * group * head_dim + 2

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    def projection(out_features: int, in_features: int) -> Projection:
        bias = random(out_features) if has_bias else None
        return Projection(weight=random(out_features, in_features, scale=in_features**-0.5), bias=bias)

    angles = torch.arange(64.0)[:, None] * torch.rand(head_dim // 2, generator=generator)
    return StackWeights(
        embedding=random(vocab_size, hidden),
        layers=[
            LayerWeights(
                attention_norm=random(hidden),
                qkv=projection((group + 2) * kv_heads * head_dim, hidden),
                out=projection(hidden, group * kv_heads * head_dim),
                mlp_norm=random(hidden),
                gate=projection(intermediate, hidden),
                up=projection(intermediate, hidden),
                down=projection(hidden, intermediate),
                window=window,
            )
            for window in windows
        ],
        final_norm=random(hidden),
        head=projection(vocab_size, hidden),
        cos_PD=angles.cos(),
        sin_PD=angles.sin(),
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        eps=1e-5,
        scale=head_dim**-0.5,
    )


def make_batch(generator: torch.Generator, vocab_size: int, spans: list[tuple[int, int]]) -> list[Tensor]:
    """Arguments of a step from (tokens stored, tokens to compute) per request; pages are handed out at random."""
    blocks = torch.randperm(NUM_BLOCKS, generator=generator).tolist()
    tables, positions, slots, starts = [], [], [], [0]
    for stored, new in spans:
        own = [blocks.pop() for _ in range(-(-(stored + new) // BLOCK_SIZE))]
        tables.append(own)
        positions += range(stored, stored + new)
        slots += [own[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE for at in range(stored, stored + new)]
        starts.append(starts[-1] + new)
    width = max(map(len, tables))
    return [
        torch.randint(0, vocab_size, (starts[-1],), generator=generator),
        torch.tensor(positions),
        torch.tensor(slots),
        torch.tensor([own + [0] * (width - len(own)) for own in tables], dtype=torch.int32),
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor([stored + new for stored, new in spans], dtype=torch.int32),
        torch.tensor([end - 1 for end in starts[1:]]),
    ]


def arguments(batch: list[Tensor]) -> tuple[RaggedBatch, array[int]]:
    """The same as the op takes it."""
    arrays = [array("i" if each.dtype == torch.int32 else "q", each.flatten().tolist()) for each in batch]
    ids, positions, slots, tables, starts, lengths, rows = arrays
    inputs = RaggedBatch(
        token_ids=ids, positions=positions, slots=slots, block_tables=tables, query_starts=starts, kv_lengths=lengths
    )
    return inputs, rows


def rows_of(starts: list[int], wanted: list[int], order: str) -> Tensor:
    """Some tokens of each request: mostly its last ones, as a scheduler asks for them, but anything is allowed."""
    rows: list[int] = []
    for (start, end), count in zip(pairwise(starts), wanted, strict=False):
        rows += range(start, end)[:count] if order == "first ones" else range(start, end)[max(0, end - start - count) :]
    return torch.tensor(rows[::-1] if order == "backwards" else rows, dtype=torch.int64)


def make_caches(generator: torch.Generator, weights: StackWeights, batch: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Pages with all layers side by side, random where a request has stored tokens, and not-a-number elsewhere."""
    _, _, _, tables, starts, lengths, _ = batch
    kv_heads, dim = weights.num_kv_heads, weights.head_dim
    pages = torch.full((NUM_BLOCKS, len(weights.layers), 2, kv_heads, BLOCK_SIZE, dim), float("nan"))
    for row, (length, new) in enumerate(zip(lengths.tolist(), starts.diff().tolist(), strict=True)):
        for at in range(length - new):
            shape = (len(weights.layers), 2, kv_heads, dim)
            pages[tables[row, at // BLOCK_SIZE], :, :, :, at % BLOCK_SIZE] = torch.randn(*shape, generator=generator)
    pages = pages.to(weights.embedding.dtype)
    return [(pages[:, layer, 0], pages[:, layer, 1]) for layer in range(len(weights.layers))]


def copied(caches: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    pages = torch.stack([torch.stack(pair, dim=1) for pair in caches], dim=1)
    return [(pages[:, layer, 0], pages[:, layer, 1]) for layer in range(len(caches))]


@needs_library
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name.lower())
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
@given(
    seed=st.integers(0, 1 << 30),
    spans=st.lists(st.tuples(st.integers(0, 14), st.integers(1, 17)), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([2, 10, 64]),
    intermediate=st.sampled_from([1, 45, 130]),
    has_bias=st.booleans(),
    num_threads=st.integers(1, 3),
    wanted=st.lists(st.integers(0, 3), min_size=5, max_size=5),
    order=st.sampled_from(["in order", "backwards", "first ones"]),
)
def test_agrees_with_the_reference(
    isa: Isa,
    seed: int,
    spans: list[tuple[int, int]],
    dtype: torch.dtype,
    kv_heads: int,
    group: int,
    head_dim: int,
    intermediate: int,
    has_bias: bool,
    num_threads: int,
    wanted: list[int],
    order: str,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = make_weights(
        generator,
        dtype,
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        intermediate=intermediate,
        has_bias=has_bias,
    )
    batch = make_batch(generator, 77, spans)
    batch[-1] = rows_of(batch[4].tolist(), wanted, order)
    caches = make_caches(generator, weights, batch)
    expected_caches = copied(caches)
    expected = reference(weights, expected_caches, *batch)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    found, _ = cpu.decoder_stack(PackedStack(compiled(isa), weights), caches, *arguments(batch))
    torch.set_num_threads(before)
    limit = TOLERANCE[dtype]
    if len(expected):
        torch.testing.assert_close(found, expected, rtol=limit, atol=limit * float(expected.abs().max()))
    for (keys, values), (expected_keys, expected_values) in zip(caches, expected_caches, strict=True):
        for mine, other in ((keys, expected_keys), (values, expected_values)):
            worst = float(other.nan_to_num().abs().max())
            torch.testing.assert_close(mine, other, rtol=limit, atol=limit * worst, equal_nan=True)


@needs_library
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name.lower())
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_few_bits_are_rounded_as_the_reference_rounds_them(isa: Isa, bits: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(11)
    for intermediate, spans, has_bias in ((45, [(3, 1)], False), (64, [(0, 15), (9, 4)], True)):
        weights = make_weights(generator, dtype, intermediate=intermediate, has_bias=has_bias)
        batch = make_batch(generator, 77, spans)
        caches = make_caches(generator, weights, batch)
        expected = reference(rounded_weights(weights, bits), copied(caches), *batch)
        found, _ = cpu.decoder_stack(PackedStack(compiled(isa), weights, bits), caches, *arguments(batch))
        # Activations are bytes: half a step of 1/127 of the largest in its group each, averaged over the inputs.
        limit = 0.05 * float(expected.abs().max())
        assert float((found - expected).abs().max()) < limit
        assert float((found - expected).abs().mean()) < limit / 5


def rounded_weights(weights: StackWeights, bits: int) -> StackWeights:
    def rounded(projection: Projection, to: int) -> Projection:
        return Projection(weight=rounded_to(projection.weight, to), bias=projection.bias)

    names = ("qkv", "out", "gate", "up", "down")
    layers = [
        replace(layer, **{name: rounded(getattr(layer, name), bits) for name in names}) for layer in weights.layers
    ]
    return replace(weights, layers=layers, head=rounded(weights.head, 8))


@needs_library
@pytest.mark.parametrize("bits", [8, 4])
def test_not_a_number_survives_weights_of_few_bits(bits: int) -> None:
    generator = torch.Generator().manual_seed(12)
    weights = make_weights(generator, torch.bfloat16)
    weights.embedding[5, 3] = float("nan")
    batch = make_batch(generator, 77, [(0, 1), (0, 1)])
    batch[0] = torch.tensor([5, 6])
    stack = PackedStack(compiled(ISAS[-1]), weights, bits)
    found, _ = cpu.decoder_stack(stack, make_caches(generator, weights, batch), *arguments(batch))
    assert found[0].isnan().all()
    assert found[1].isfinite().all()


@needs_library
def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    generator = torch.Generator().manual_seed(5)
    weights = make_weights(generator, torch.bfloat16)
    batch = make_batch(generator, 77, [(9, 1), (3, 1), (0, 1), (12, 1), (7, 1)])
    caches = make_caches(generator, weights, batch)
    stack = PackedStack(compiled(ISAS[-1]), weights)
    together, _ = cpu.decoder_stack(stack, copied(caches), *arguments(batch))
    ids, positions, slots, tables, _, lengths, _ = batch
    for row in range(5):
        one = slice(row, row + 1)
        starts, rows = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0])
        step = [ids[one], positions[one], slots[one], tables[one], starts, lengths[one], rows]
        alone, _ = cpu.decoder_stack(stack, copied(caches), *arguments(step))
        assert torch.equal(alone[0], together[row])


RULES = Rules(
    forbidden=array("q", [3]),
    bias_tokens=array("q", [5]),
    bias=array("f", [4.0]),
    repetition_penalty=1.7,
    seen=array("q", range(20)),
    presence_penalty=0.3,
    frequency_penalty=0.2,
    output=array("q", [1, 1, 5]),
    allowed=np.arange(77) % 3 != 0,
)


@needs_library
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name.lower())
def test_tokens_are_drawn_as_from_the_logits_alone(isa: Isa) -> None:
    generator = torch.Generator().manual_seed(9)
    weights = make_weights(generator, torch.bfloat16)
    batch = make_batch(generator, 77, [(9, 1), (3, 4), (0, 1), (12, 1)])
    caches = make_caches(generator, weights, batch)
    stack = PackedStack(compiled(isa), weights)
    kinds = [(0.0, 1.0, 0.0, 0), (1.0, 1.0, 0.0, 0), (0.8, 0.7, 0.0, 0), (1.5, 1.0, 0.01, 9)]
    for seed in range(20):
        draws = [Draw(*kind, seed, 3 * row, RULES if seed % 4 == row else None) for row, kind in enumerate(kinds)]
        logits, drawn = cpu.decoder_stack(stack, copied(caches), *arguments(batch), draws)
        assert drawn == ops.sample_tokens(logits, draws)
    without, nothing = cpu.decoder_stack(stack, copied(caches), *arguments(batch))
    assert torch.equal(without, logits)
    assert nothing == Drawn([], [])
    room = torch.empty_like(logits)
    again, _ = ops.decoder_stack(stack, copied(caches), *arguments(batch), draws, room)
    assert again is room
    assert torch.equal(room, logits)
    for wrong in (room[:3], room.t().contiguous().t(), room.double()):
        with pytest.raises(ValueError, match="out is"):
            ops.decoder_stack(stack, caches, *arguments(batch), draws, wrong)
    narrow = RULES._replace(allowed=np.ones(76, dtype=np.bool_))
    with pytest.raises(ValueError, match="vocabulary of 77"):
        ops.decoder_stack(stack, caches, *arguments(batch), [draws[0]._replace(rules=narrow)] * 4)
    with pytest.raises(ValueError, match="3 draws"):
        ops.decoder_stack(stack, caches, *arguments(batch), draws[:3])


@needs_library
def test_a_negative_slot_is_written_nowhere_and_no_rows_give_no_logits() -> None:
    generator = torch.Generator().manual_seed(6)
    weights = make_weights(generator, torch.float32)
    batch = make_batch(generator, 77, [(8, 3)])
    batch[2] = torch.full_like(batch[2], -1)
    batch[6] = batch[6][:0]
    caches = make_caches(generator, weights, batch)
    before = copied(caches)
    logits, _ = cpu.decoder_stack(PackedStack(compiled(ISAS[-1]), weights), caches, *arguments(batch))
    assert logits.shape == (0, 77)
    for (keys, values), (old_keys, old_values) in zip(caches, before, strict=True):
        torch.testing.assert_close(keys, old_keys, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(values, old_values, rtol=0, atol=0, equal_nan=True)


@needs_library
@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        (0, 77, "token id"),
        (1, 64, "position"),
        (2, NUM_BLOCKS * BLOCK_SIZE, "slot"),
        (3, NUM_BLOCKS, "block table"),
        (4, 1, "query_starts"),
        (5, 99, "kv_length"),
        (6, 99, "row of logits"),
    ],
)
def test_what_lies_outside_is_refused_and_nothing_is_written(argument: int, value: int, message: str) -> None:
    generator = torch.Generator().manual_seed(7)
    weights = make_weights(generator, torch.float32)
    batch = make_batch(generator, 77, [(6, 2), (1, 3)])
    caches = make_caches(generator, weights, batch)
    before = copied(caches)
    batch[argument] = batch[argument].clone()
    batch[argument].view(-1)[0] = value
    stack = ops.pack_stack(weights)
    if stack is None:
        pytest.skip("this machine goes layer by layer")
    with pytest.raises(ValueError, match=message):
        ops.decoder_stack(stack, caches, *arguments(batch))
    for (keys, _), (old_keys, _) in zip(caches, before, strict=True):
        torch.testing.assert_close(keys, old_keys, rtol=0, atol=0, equal_nan=True)


@needs_library
def test_shapes_and_types_that_do_not_fit_are_refused() -> None:
    generator = torch.Generator().manual_seed(8)
    weights = make_weights(generator, torch.float32)
    batch = make_batch(generator, 77, [(6, 2)])
    caches = make_caches(generator, weights, batch)
    stack = PackedStack(compiled(ISAS[0]), weights)
    with pytest.raises(ValueError, match="caches"):
        ops.decoder_stack(stack, caches[:1], *arguments(batch))
    for argument, wrong in (
        (0, batch[0][:1]),
        (0, batch[0].int()),
        (3, batch[3].long()),
        (5, batch[5][:0]),
        (6, batch[6].int()),
    ):
        changed = [*batch[:argument], wrong, *batch[argument + 1 :]]
        with pytest.raises(ValueError, match=r"token ids|block tables|kv_lengths|rows"):
            ops.decoder_stack(stack, caches, *arguments(changed))


@pytest.mark.parametrize("codes_used", [16, 12, 9])
def test_weights_that_come_from_4_bits_stay_as_they_are(codes_used: int) -> None:
    """Whatever scale and least value their groups had, and also where a group does not use all its codes."""
    generator = torch.Generator().manual_seed(13)
    codes = torch.randint(codes_used, (6, 3, 32), generator=generator)
    codes[:, :, 0], codes[:, :, 1] = 0, codes_used - 1
    steps = torch.rand(6, 3, 1, generator=generator) + 0.1
    offsets = (1 - codes_used) * torch.rand(6, 3, 1, generator=generator)
    weight = (steps * (codes + offsets)).view(6, 96)
    missed = (rounded_to(weight, 4) - weight).abs().view(6, 3, 32) / steps
    # Scales and least values are kept to a part in 256.
    assert float(missed.max()) < 2 * 15 / 256
