"""Every CPU implementation of paged attention gives what the reference gives, whatever the batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import AttentionCase, attention_cases, cpu_attentions
from compiled import ISAS, compiled, needs_library
from hypothesis import HealthCheck, given, settings
from torch.nn.functional import scaled_dot_product_attention

from duopool.kernels import ops
from duopool.kernels.cpu_library import Isa, library
from duopool.kernels.paged_attention import cpu
from duopool.kernels.paged_attention.reference import paged_attention as reference

ATTENTIONS = cpu_attentions()
CASE = AttentionCase(
    seed=1,
    dtype=torch.float32,
    requests=((1, 40), (7, 3), (1, 0)),
    kv_heads=2,
    group=3,
    key_dim=16,
    value_dim=16,
    block_size=4,
)


@pytest.mark.parametrize("name", sorted(ATTENTIONS))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
@given(case=attention_cases())
def test_agrees_with_the_reference(name: str, case: AttentionCase) -> None:
    case.check(ATTENTIONS[name])


@pytest.mark.parametrize("name", sorted(ATTENTIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_and_long_contexts(name: str, dtype: torch.dtype) -> None:
    """Several row tiles per request, tiles split over keys, a group larger than a row tile, heads that go together."""
    case = replace(CASE, dtype=dtype, key_dim=64, value_dim=64, block_size=16)
    for changes in (
        {"requests": ((260, 130), (1, 700))},
        {"requests": ((1, 1500),), "window": 900},
        {"requests": ((3, 900),), "kv_heads": 1, "group": 200, "sinks": True},
        {"requests": tuple((1, 9 * n) for n in range(20)), "kv_heads": 3, "group": 5, "key_dim": 40, "sinks": True},
        {"requests": tuple((1, 100 + 9 * n) for n in range(12)), "window": 90, "soft_cap": 3.0},
    ):
        replace(case, **changes).check(ATTENTIONS[name])


@pytest.mark.skipif(library() is None, reason="the compiled kernels are not built")
@pytest.mark.parametrize("threads", [1, 3, 8])
def test_number_of_threads_does_not_matter(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "num_threads", lambda: threads)
    case = replace(CASE, requests=((1, 2000), (1, 10), (90, 0)), key_dim=64, value_dim=32, soft_cap=3.0, sinks=True)
    case.check(ops.paged_attention)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_of_a_decoding_row_are_the_same_in_any_batch_and_on_any_threads(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = (2500, 70, 1300, 1100, 30, 1024, 640, 900, 2000)  # enough for all heads of a token to go together
    case = replace(CASE, dtype=dtype, requests=tuple((1, n - 1) for n in lengths), key_dim=64, value_dim=64)
    (query, keys, values, tables, starts, kv_lengths), options = case.build()
    together = ops.paged_attention(query, keys, values, tables, starts, kv_lengths, **options)
    for threads in (1, 3):
        monkeypatch.setattr(cpu, "num_threads", lambda threads=threads: threads)
        for row in range(len(lengths)):
            one = slice(row, row + 1)
            args = (query[one], keys, values, tables[one], starts[:2], kv_lengths[one])
            assert torch.equal(ops.paged_attention(*args, **options), together[one])


@pytest.mark.skipif(Isa.AVX512_DOTS not in ISAS, reason="float32 sums of few rows have another order")
def test_bits_of_a_prompt_are_the_same_wherever_it_is_cut() -> None:
    case = replace(CASE, dtype=torch.bfloat16, requests=((1300, 0),), key_dim=64, value_dim=64)
    (query, keys, values, table, _, _), options = case.build()

    def run(first: int, last: int) -> torch.Tensor:
        bounds, length = torch.tensor([0, last - first]).int(), torch.tensor([last]).int()
        tensors = (query[first:last], keys, values, table, bounds, length)
        return cpu.paged_attention(compiled(Isa.AVX512_DOTS), *tensors, **options)

    whole = run(0, 1300)
    for cut in (2, 240, 1024, 1298):
        assert torch.equal(torch.cat([run(0, cut), run(cut, 1300)]), whole)


def test_reference_is_causal_attention_when_pages_lie_in_order() -> None:
    tokens, heads, dim = 13, 2, 8
    query, key, value = torch.randn(3, tokens, heads, dim, generator=torch.Generator().manual_seed(0)).unbind(0)
    pages = [torch.cat([x, torch.zeros(3, heads, dim)]).view(4, 4, heads, dim).transpose(1, 2) for x in (key, value)]
    table = torch.arange(4, dtype=torch.int32)[None]
    starts, lengths = torch.tensor([0, tokens], dtype=torch.int32), torch.tensor([tokens], dtype=torch.int32)
    got = reference(query, *pages, table, starts, lengths, scale=0.3)
    rows = [x.transpose(0, 1) for x in (query, key, value)]
    wanted = scaled_dot_product_attention(*rows, is_causal=True, scale=0.3)
    torch.testing.assert_close(got, wanted.transpose(0, 1))


@pytest.mark.parametrize("name", sorted(ATTENTIONS))
def test_a_prompt_in_chunks_is_the_prompt_at_once(name: str) -> None:
    case = replace(CASE, requests=((30, 0),), window=12, sinks=True)
    (query, keys, values, table, _, _), options = case.build()

    def run(first: int, last: int) -> torch.Tensor:
        starts, length = torch.tensor([0, last - first]).int(), torch.tensor([last]).int()
        return ATTENTIONS[name](query[first:last], keys, values, table, starts, length, **options)

    parts = torch.cat([run(0, 11), run(11, 12), run(12, 30)])
    torch.testing.assert_close(parts, run(0, 30), rtol=1e-5, atol=1e-5)


def test_an_empty_batch_gives_an_empty_answer() -> None:
    (query, keys, values, table, _, _), options = CASE.build()
    nothing = torch.zeros(0, dtype=torch.int32)
    got = ops.paged_attention(query[:0], keys, values, table[:0], torch.zeros(1).int(), nothing, **options)
    assert got.shape == (0, 6, 16)


@pytest.mark.skipif(library() is None, reason="the compiled kernels are not built")
@pytest.mark.parametrize(
    ("index", "place", "value", "words"),
    [
        (3, (0, 0), 99, "outside the caches"),
        (3, (1, 1), -1, "outside the caches"),
        (4, (3,), 8, "query_starts"),
        (4, (1,), 9, "query_starts"),
        (5, (1,), 6, "kv_length"),
        (5, (0,), 300, "kv_length"),
    ],
)
def test_wrong_indices_are_refused_before_anything_is_written(
    index: int, place: tuple[int, ...], value: int, words: str
) -> None:
    tensors, options = CASE.build()
    out = torch.full((9, 6, 16), 5.0)
    tensors[index][place] = value
    with pytest.raises(ValueError, match=words):
        ops.paged_attention(*tensors, **options, out=out)
    assert (out == 5.0).all()


def test_wrong_shapes_and_dtypes_are_refused() -> None:
    tensors, options = CASE.build()

    def refused(**changes: torch.Tensor) -> None:
        names = ("q_THD", "key_cache_NGSD", "value_cache_NGSE", "block_tables_BM", "query_starts", "kv_lengths")
        with pytest.raises(ValueError, match=r"\d"):
            ops.paged_attention(**{**dict(zip(names, tensors, strict=True)), **options, **changes})

    refused(q_THD=tensors[0][:, :5])
    refused(q_THD=tensors[0].double())
    refused(key_cache_NGSD=tensors[1][..., :8])
    refused(block_tables_BM=tensors[3].long())
    refused(kv_lengths=tensors[5][:2])
    refused(sinks_H=torch.zeros(5))
    refused(out=torch.zeros(9, 6, 8))
