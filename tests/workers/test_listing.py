"""What a decode worker takes of a listing: every honest one, however it is cut, and nothing that cannot be."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duopool.core.handoff.slot import Slot
from duopool.core.messages import BlocksReady, Choice, GenerationRequest, LeaseRef, NackReason, SealedBlock, Tokens
from duopool.core.sampling_params import SamplingParams
from duopool.core.types import BlockId, Incarnation, LeaseId, RequestId, WorkerId
from duopool.decode_worker.decode_request import DecodeRequest
from duopool.decode_worker.listing import refusal
from duopool.engine.served_model import ServedModel

MODEL = ServedModel(vocab_size=50, max_model_len=100)
LEASE = LeaseRef(lease_id=LeaseId(1), worker_id=WorkerId("p"), incarnation=Incarnation(1), source_address="localhost:1")
FIRST = Tokens(request_id=RequestId("r"), attempt=1, index=0, token_ids=(7,))


def request_of(*, is_moving: bool = False, num_choices: int = 0) -> DecodeRequest:
    choices = tuple(Choice(RequestId(f"r{number}"), number) for number in range(num_choices))
    return DecodeRequest(
        table=RequestId("r/1"),
        request=GenerationRequest(
            request_id=RequestId("r"), prompt_token_ids=(1, 2, 3), params=SamplingParams(), choices=choices
        ),
        attempt=1,
        session=1,
        order=1,
        deadline_at=None,
        due_at=0.0,
        keys=(),
        slot=Slot(attempt=1, is_moving=is_moving),
        output=[],
        told_at=0.0,
    )


def listing(first_block: int, num_blocks: int, first_token: Tokens | None = None, **fields: object) -> BlocksReady:
    blocks = tuple(SealedBlock(BlockId(index), 0, 0) for index in range(num_blocks))
    message = BlocksReady(
        request_id=RequestId("r"),
        attempt=1,
        lease=LEASE,
        first_block=first_block,
        blocks=blocks,
        first_token=first_token,
    )
    return msgspec.structs.replace(message, **fields)


@given(num_wanted=st.integers(1, 9), cuts=st.sets(st.integers(0, 9)), is_moving=st.booleans())
def test_blocks_may_come_in_any_pieces(num_wanted: int, cuts: set[int], is_moving: bool) -> None:
    request = request_of(is_moving=is_moving)
    bounds = [0, *sorted(cut for cut in cuts if cut < num_wanted), num_wanted]
    for first, end in itertools.pairwise(bounds):
        message = listing(first, end - first, FIRST if end == num_wanted else None)
        assert refusal(message, request, model=MODEL, num_wanted=num_wanted) is None


@given(num_wanted=st.integers(1, 9), num_listed=st.integers(0, 12), is_moving=st.booleans(), is_last=st.booleans())
def test_only_a_request_that_moves_may_grow_and_only_until_its_last_listing(
    num_wanted: int, num_listed: int, is_moving: bool, is_last: bool
) -> None:
    message = listing(0, num_listed, FIRST if is_last else None)
    refused = refusal(message, request_of(is_moving=is_moving), model=MODEL, num_wanted=num_wanted)
    is_wrong = num_listed != num_wanted if is_last else num_listed > num_wanted and not is_moving
    assert (refused is not None) == is_wrong
    if refused is not None:
        assert refused.reason is NackReason.TRANSFER_FAILED
        assert refused.detail == f"{num_listed} blocks for a prefix of {num_wanted}"


@pytest.mark.parametrize(
    "wrong",
    [
        listing(-1, 2),
        listing(0, 1, msgspec.structs.replace(FIRST, token_ids=(50,))),
        listing(0, 1, msgspec.structs.replace(FIRST, token_ids=(-1,))),
        listing(0, 1, msgspec.structs.replace(FIRST, token_ids=())),
        listing(0, 1, msgspec.structs.replace(FIRST, token_ids=(1, 2))),
        listing(0, 1, FIRST, output=(3, 51)),
    ],
)
def test_what_cannot_be_is_refused(wrong: BlocksReady) -> None:
    refused = refusal(wrong, request_of(), model=MODEL, num_wanted=1)
    assert refused is not None
    assert refused.reason is NackReason.INTERNAL


@pytest.mark.parametrize("num_firsts", [0, 1, 2, 3, 4])
def test_a_carrier_needs_the_first_token_of_every_choice(num_firsts: int) -> None:
    own = msgspec.structs.replace(FIRST, token_ids=())
    message = listing(0, 1, own, first_tokens=(FIRST,) * num_firsts)
    refused = refusal(message, request_of(num_choices=3), model=MODEL, num_wanted=1)
    assert (refused is None) == (num_firsts == 3)
