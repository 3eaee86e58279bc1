"""What the router lets through fits everything behind it: the wire between processes and the kernels that draw."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duopool.core.errors import InvalidRequest
from duopool.core.sampling_params import SamplingParams
from duopool.core.step import SampleSpec
from duopool.engine.sampler import draws_of
from duopool.kernels.sample_tokens.cpu import packed_draws, packed_rules
from duopool.proto import codec

INTEGERS = ("max_tokens", "min_tokens", "top_k", "seed", "logprobs", "prompt_logprobs")
FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
EDGES = [sign * (1 << bits) + step for bits in (0, 31, 32, 63, 64, 70, 1400) for sign in (1, -1) for step in (-1, 0, 1)]
WHOLE = st.sampled_from(EDGES) | st.integers()
ANY = st.floats() | WHOLE


@given(st.dictionaries(st.sampled_from(INTEGERS), WHOLE, max_size=2), st.dictionaries(st.sampled_from(FLOATS), ANY))
def test_what_passes_goes_over_the_wire_and_into_the_draw(integers: dict[str, int], floats: dict[str, float]) -> None:
    params = SamplingParams(**integers, **floats)  # type: ignore[arg-type]
    refused = refused_field(params)
    if refused is not None:
        assert refused in {**integers, **floats, "min_tokens": 0}
        return
    assert msgspec.msgpack.decode(codec.encode(params), type=SamplingParams) == params
    spec = SampleSpec(params=params, prompt_token_ids=[1], output_token_ids=[2])
    draws = draws_of([spec])
    assert packed_draws(draws)
    packed_rules(draws, 10)


@pytest.mark.parametrize("field", [*INTEGERS, *FLOATS])
@pytest.mark.parametrize("value", [10**400, -(10**400)], ids=["above", "below"])
def test_what_no_float_can_hold_is_refused_by_name(field: str, value: int) -> None:
    assert refused_field(SamplingParams(**{field: value})) == field  # type: ignore[arg-type]


def refused_field(params: SamplingParams) -> str | None:
    try:
        params.check()
    except InvalidRequest as error:
        return error.field
    return None
