"""The choices of one prompt and their carrier: whose word counts until the decode worker has the prompt, and after."""

from __future__ import annotations

from dataclasses import replace

import pytest

from duopool.core.handoff.request import (
    Carried,
    Emit,
    Finish,
    Heard,
    Lost,
    Member,
    NeedRoute,
    Phase,
    RequestState,
    Route,
    Routed,
    Send,
    SetDown,
    Stopped,
    begin,
    transition,
)
from duopool.core.messages import (
    BlocksReady,
    Cancel,
    Choice,
    GenerationRequest,
    Joined,
    LeaseRef,
    Nack,
    NackReason,
    Prefill,
    Rebind,
    Reserve,
    SealedBlock,
    Tokens,
)
from duopool.core.sampling_params import SamplingParams
from duopool.core.types import BlockId, FinishReason, Incarnation, LeaseId, RequestId, WorkerId

CARRIER, ONE, OTHER = RequestId("carrier"), RequestId("one"), RequestId("other")
P, D, D2 = (Member(WorkerId(name), Incarnation(1)) for name in ("p", "d", "d2"))
REQUEST = GenerationRequest(
    request_id=CARRIER,
    prompt_token_ids=(1, 2, 3),
    params=SamplingParams(max_tokens=6, seed=40),
    choices=(Choice(ONE, 40), Choice(OTHER, 41)),
)
BEGUN = Carried(1, Route(prefill=P, decode=D))


def token(request_id: RequestId, index: int = 0, *, attempt: int = 1, reason: FinishReason | None = None) -> Tokens:
    return Tokens(request_id=request_id, attempt=attempt, index=index, token_ids=(index,), finish_reason=reason)


def ready(*first_tokens: Tokens, attempt: int = 1) -> BlocksReady:
    return BlocksReady(
        request_id=CARRIER,
        attempt=attempt,
        lease=LeaseRef(lease_id=LeaseId(7), worker_id=P.worker_id, incarnation=P.incarnation, source_address="p:1"),
        first_block=0,
        blocks=(SealedBlock(BlockId(0), 1, 0),),
        first_token=Tokens(request_id=CARRIER, attempt=attempt, index=0, token_ids=()),
        first_tokens=first_tokens,
    )


def after(state: RequestState, *events: object) -> tuple[RequestState, list]:
    actions: list = []
    for event in events:
        state, more = transition(state, event)  # type: ignore[arg-type]
        actions += more
    return state, actions


def carrier(*events: object) -> tuple[RequestState, list]:
    return after(RequestState(request=REQUEST), Routed(BEGUN.route), *events)


def choice(*events: object) -> tuple[RequestState, list]:
    return after(RequestState(request=REQUEST.outputs[0], phase=Phase.CARRIED), BEGUN, *events)


def test_choices_differ_in_name_and_seed_alone() -> None:
    outputs = REQUEST.outputs
    assert [(each.request_id, each.params.seed) for each in outputs] == [(ONE, 40), (OTHER, 41)]
    assert all(replace(each.params, seed=40) == REQUEST.params and not each.choices for each in outputs)
    assert outputs[0].outputs == (outputs[0],)


def test_a_carrier_asks_once_for_all_and_emits_every_first_token() -> None:
    state, actions = carrier(Heard(P, ready(token(ONE), token(OTHER))))
    commands = [action.command for action in actions if isinstance(action, Send)]
    assert [type(command) for command in commands] == [Prefill, Reserve, BlocksReady]
    assert commands[0].request == commands[1].request == REQUEST
    assert [action.tokens.request_id for action in actions if isinstance(action, Emit)] == [ONE, OTHER]
    assert (state.phase, state.output) == (Phase.LEASED, ())


def test_first_tokens_of_others_cost_a_retry() -> None:
    for wrong in ((), (token(ONE),), (token(OTHER), token(ONE)), (token(ONE), token(OTHER), token(OTHER))):
        state, actions = carrier(Heard(P, ready(*wrong)))
        assert (state.phase, state.retries_left) == (Phase.ADMITTED, 2)
        assert not any(isinstance(action, Emit) for action in actions)


def test_nothing_is_handed_over_when_every_choice_ends_with_its_first_token() -> None:
    ended = [token(name, reason=FinishReason.STOP) for name in (ONE, OTHER)]
    _, actions = carrier(Heard(P, ready(*ended)))
    assert not any(isinstance(action, Send) and isinstance(action.command, BlocksReady) for action in actions)


def test_a_carrier_whose_decode_worker_is_lost_brings_the_lease_to_another() -> None:
    state, actions = carrier(
        Heard(P, ready(token(ONE, reason=FinishReason.STOP), token(OTHER))),
        Lost(D),
        Routed(Route(prefill=P, decode=D2)),
    )
    told = [action.command for action in actions if isinstance(action, Send) and action.member == D2]
    assert [type(command) for command in told] == [Reserve, BlocksReady]
    assert told[0].request == REQUEST
    assert [(each.attempt, each.finish_reason) for each in told[1].first_tokens] == [(2, FinishReason.STOP), (2, None)]
    assert any(isinstance(action, Send) and isinstance(action.command, Rebind) for action in actions)
    assert state.attempt == 2


def test_a_choice_asks_for_no_route_and_leaves_faults_to_its_carrier() -> None:
    state = RequestState(request=REQUEST.outputs[0], phase=Phase.CARRIED)
    assert begin(state) == (state, ())
    state, actions = after(state, BEGUN, Lost(P), Lost(D))
    assert (state.phase, state.attempt, actions) == (Phase.CARRIED, 1, [])


@pytest.mark.parametrize("message", [Joined, Tokens])
def test_a_choice_is_carried_until_its_decode_worker_speaks_of_it(message: type) -> None:
    state, actions = choice(Heard(P, token(ONE)))
    assert (state.phase, state.output) == (Phase.CARRIED, (0,))
    assert actions == [Emit(token(ONE))]
    joined = Joined(request_id=ONE, attempt=1, num_pulled_blocks=0, num_pulled_bytes=0, transfer_s=0.0)
    state, _ = after(state, Heard(D, joined if message is Joined else token(ONE, 1)))
    assert state.phase is Phase.DECODING
    state, actions = after(state, Lost(D))
    assert (state.phase, state.retries_left) == (Phase.ADMITTED, 2)


def test_only_the_carrier_s_attempt_counts() -> None:
    state, _ = choice(Carried(2, Route(prefill=P, decode=D2)))
    assert after(state, Heard(P, token(ONE, attempt=1)))[0] == state
    assert after(state, Heard(D, token(ONE, attempt=2)))[0] == state, "D is not on the route any more"
    assert after(state, Heard(P, token(ONE, attempt=2)))[0].output == (0,)


def test_a_first_token_that_comes_twice_is_shown_once() -> None:
    _, actions = choice(Heard(P, token(ONE)), Heard(P, token(ONE)))
    assert actions == [Emit(token(ONE))]


def test_a_choice_that_is_set_down_goes_on_from_its_token() -> None:
    excluded = replace(carrier()[0], excluded=frozenset({P}), retries_left=1, missing=frozenset({P}))
    state, actions = choice(Heard(P, token(ONE)), SetDown(excluded))
    assert actions[1:] == [Send(D, Cancel(request_id=ONE, attempt=1)), NeedRoute(frozenset({P}))]
    assert (state.phase, state.retries_left, state.missing) == (Phase.ADMITTED, 1, {P})
    state, actions = after(state, Heard(D, token(ONE, 1)), Routed(Route(prefill=P, decode=D2)))
    prefill = next(action.command for action in actions if isinstance(action, Send) and action.member == P)
    assert (prefill.attempt, prefill.request.output_token_ids) == (2, (0,))
    assert after(state, SetDown(excluded), Carried(9, BEGUN.route))[0] == state, "it is nobody's load any more"


@pytest.mark.parametrize("event", [Stopped(Phase.CANCELLED), Heard(P, token(ONE, reason=FinishReason.LENGTH))])
def test_a_choice_that_ends_before_it_is_there_is_cancelled_on_the_decode_worker_alone(event: object) -> None:
    state, actions = choice(event)
    assert state.phase.is_final
    assert [action for action in actions if isinstance(action, Send)] == [Send(D, Cancel(request_id=ONE, attempt=1))]
    assert isinstance(actions[-1], Finish)


def test_a_gap_or_a_refusal_of_one_choice_costs_that_choice_a_retry() -> None:
    for event in (
        Heard(D, token(ONE, 3)),
        Heard(D, Nack(request_id=ONE, attempt=1, reason=NackReason.STALE)),
    ):
        state, actions = choice(event)
        assert (state.phase, state.retries_left) == (Phase.ADMITTED, 2)
        assert isinstance(actions[-1], NeedRoute)
