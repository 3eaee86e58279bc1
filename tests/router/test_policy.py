"""Laws of the routing policy."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from duopool.core.handoff.request import Member
from duopool.core.messages import WorkerLoad
from duopool.core.types import Incarnation, WorkerId
from duopool.router.policy import Candidate, choose, choose_decode, decode_cost, prefill_cost

BLOCK = 16


@st.composite
def pool(draw: st.DrawFn, role: str, min_size: int = 1) -> list[Candidate]:
    size = draw(st.integers(min_size, 4))
    count = st.integers(0, 2000)
    return [
        Candidate(
            member=Member(WorkerId(f"{role}-{n}"), Incarnation(1)),
            num_hit_tokens=BLOCK * draw(st.integers(0, 40)),
            load=WorkerLoad(
                num_running=draw(st.integers(0, 64)),
                num_waiting=draw(st.integers(0, 64)),
                num_pending_tokens=draw(count),
                num_blocks=1000,
                num_free_blocks=draw(st.integers(0, 1000)),
            ),
            num_unseen_tokens=draw(count),
            num_unseen_sequences=draw(st.integers(0, 8)),
        )
        for n in range(size)
    ]


tokens = st.integers(1, 700)
local = st.integers(0, 128)


@given(pool("prefill"), pool("decode"), tokens, local, st.integers(0, 100))
def test_each_side_gets_the_least_work(prefill, decode, num_tokens, local_max, rotation) -> None:
    decision = choose(
        prefill,
        decode,
        num_tokens=num_tokens,
        block_size=BLOCK,
        local_prefill_max_tokens=local_max,
        rotation=rotation,
    )
    assert decision is not None
    by_member = {candidate.member: candidate for candidate in (*prefill, *decode)}
    chosen = by_member[decision.route.decode]
    assert decode_cost(chosen, num_tokens, BLOCK) == min(decode_cost(one, num_tokens, BLOCK) for one in decode)
    least = min(prefill_cost(one, num_tokens) for one in prefill)
    if decision.route.prefill is None:
        assert 1 <= decision.num_prefill_tokens <= local_max
        assert decision.num_prefill_tokens < least
    else:
        source = by_member[decision.route.prefill]
        assert prefill_cost(source, num_tokens) == least
        assert decision.num_prefill_tokens == max(1, num_tokens - source.num_hit_tokens)


@given(pool("prefill"), tokens)
def test_no_route_without_both_sides(prefill, num_tokens) -> None:
    for one, other in ((prefill, []), ([], prefill), ([], [])):
        assert choose(one, other, num_tokens=num_tokens, block_size=BLOCK, local_prefill_max_tokens=64) is None
    assert choose_decode([], num_tokens=num_tokens, block_size=BLOCK) is None


@given(st.integers(2, 5), st.integers(0, 50), tokens)
def test_equals_are_taken_in_turn(size, start, num_tokens) -> None:
    decode = [
        Candidate(member=Member(WorkerId(f"d-{n}"), Incarnation(1)), num_hit_tokens=0, load=WorkerLoad())
        for n in range(size)
    ]
    chosen = [
        choose_decode(decode, num_tokens=num_tokens, block_size=BLOCK, rotation=start + turn) for turn in range(size)
    ]
    assert set(chosen) == {one.member for one in decode}


@given(pool("prefill", 2), pool("decode"), tokens, st.integers(0, 9), st.data())
def test_more_reuse_never_loses_a_worker_the_request(prefill, decode, num_tokens, rotation, data) -> None:
    settings = {"num_tokens": num_tokens, "block_size": BLOCK, "local_prefill_max_tokens": 0, "rotation": rotation}
    before = choose(prefill, decode, **settings)
    assert before is not None
    winner = next(one for one in prefill if one.member == before.route.prefill)
    warmer = replace(winner, num_hit_tokens=winner.num_hit_tokens + BLOCK * data.draw(st.integers(1, 10)))
    after = choose([warmer if one is winner else one for one in prefill], decode, **settings)
    assert after is not None
    assert after.route.prefill == winner.member


@given(pool("decode", 2), st.data())
def test_a_full_pool_is_taken_only_when_all_are(decode, data) -> None:
    num_tokens = 1000 * BLOCK  # more than any of them has room for
    empty = data.draw(st.sampled_from(decode))
    roomy = replace(empty, num_hit_tokens=0, load=WorkerLoad(num_blocks=2000, num_free_blocks=2000, num_running=500))
    pool_of = [roomy if one is empty else replace(one, num_hit_tokens=0) for one in decode]
    assert choose_decode(pool_of, num_tokens=num_tokens, block_size=BLOCK) == roomy.member
