"""Pages of a store on a device reach another one through host memory: as the step left them, or not at all.

The CPU stands for the device too: the store and its mirror are different memory there as well.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import ThreadPoolExecutor as Threads
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, VOCAB_SIZE, make

from duopool.core.config import CacheConfig
from duopool.core.messages import LeaseRef, ReadBlocks, SealedBlock, Validate, Verdict
from duopool.core.sampling_params import SamplingParams
from duopool.core.step import Chunk, SampleSpec, StepPlan
from duopool.core.types import BlockId, Incarnation, LeaseId, RequestId, WorkerId
from duopool.engine import page_mirror
from duopool.engine.kv_layout import KVLayout, LayerShape
from duopool.engine.kv_store import KVStore
from duopool.engine.model_loader import adopt
from duopool.engine.page_mirror import PageMirror, mirror_of
from duopool.engine.runner import ModelRunner
from duopool.engine.transfer.digest import seal
from duopool.engine.transfer.in_process import InProcessNetwork, InProcessReader
from duopool.engine.transfer.source import KvSource
from duopool.engine.transfer.transport import ReadOutcome
from duopool.engine.transfer.uploading_reader import UploadingReader

BLOCK_SIZE = 4
NUM_BLOCKS = 24
NUM_TURNS = 100
LIFE = Incarnation(7)
LAYOUT = KVLayout(
    layers=(LayerShape(num_kv_heads=2, key_dim=8, value_dim=4),), block_size=BLOCK_SIZE, dtype=torch.bfloat16
)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    ),
]
ORDERS = st.permutations(range(NUM_BLOCKS)).flatmap(
    lambda order: st.integers(1, NUM_BLOCKS).map(lambda size: [BlockId(block_id) for block_id in order[:size]])
)


class Keeper:
    """Every lease holds."""

    def begin_read(self, read: ReadBlocks) -> str:
        return ""

    def end_read(self, lease_id: LeaseId) -> None:
        pass

    def validate(self, validate: Validate) -> Verdict:
        return Verdict(ok=True)


class Pair:
    """A store and one that reads from it, their mirrors and the way between these."""

    def __init__(self, theirs: KVStore, own: KVStore) -> None:
        self.theirs, self.own = theirs.pages, own.pages
        self.source, self.target = PageMirror(theirs), PageMirror(own)
        self._network = InProcessNetwork()
        self._network.listen("source", KvSource(keeper=Keeper(), store=self.source.host, incarnation=LIFE))
        inner = InProcessReader(self.target.host, self._network, run=lambda work: work())
        self._reader = UploadingReader(inner, self.target.upload)

    def read(self, sealed: Sequence[SealedBlock], targets: Sequence[BlockId]) -> ReadOutcome:
        outcome: Future[ReadOutcome] = Future()
        lease = LeaseRef(
            lease_id=LeaseId(1), worker_id=WorkerId("prefill-0"), incarnation=LIFE, source_address="source"
        )
        self._reader.read(lease, 1, sealed, targets, outcome.set_result)
        return outcome.result(30)


def noise(seed: int, device: str) -> KVStore:
    store = KVStore(LAYOUT, NUM_BLOCKS, device)
    torch.manual_seed(seed)
    store.pages.copy_(torch.randn(store.pages.shape))
    return store


def once(block_ids: Sequence[BlockId]) -> list[int]:
    return [1] * len(block_ids)


@pytest.fixture(params=[1, 5, NUM_BLOCKS])
def _pages_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_mirror, "STRETCH_BYTES", request.param * LAYOUT.page_bytes)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.usefixtures("_pages_at_once")
@settings(max_examples=20)
@given(data=st.data())
def test_what_a_step_has_written_arrives_and_nothing_else_changes(device: str, data: st.DataObject) -> None:
    pair = Pair(noise(1, device), noise(2, device))
    block_ids = data.draw(ORDERS)
    targets = data.draw(st.permutations(range(NUM_BLOCKS)))[: len(block_ids)]
    expected = pair.own.clone()
    expected[targets] = pair.theirs[block_ids]
    sealed = pair.source.seal(block_ids, once(block_ids))
    assert sealed == seal(pair.source.host, block_ids, once(block_ids))
    pair.theirs.zero_()  # what is sealed has left the device
    outcome = pair.read(sealed, [BlockId(block_id) for block_id in targets])
    assert outcome == ReadOutcome(num_bytes=len(block_ids) * LAYOUT.page_bytes)
    assert torch.equal(pair.own, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_a_page_that_is_not_as_it_was_sealed_never_gets_to_the_device(device: str) -> None:
    pair = Pair(noise(1, device), noise(2, device))
    block_ids = [BlockId(3), BlockId(9)]
    sealed = pair.source.seal(block_ids, once(block_ids))
    pair.source.host.page(BlockId(9))[5] ^= 1
    before = pair.own.clone()
    outcome = pair.read(sealed, [BlockId(0), BlockId(1)])
    assert outcome.is_damaged
    assert torch.equal(pair.own, before)
    # Sealed again it is found well: the device has it still.
    assert pair.source.seal(block_ids, once(block_ids)) == sealed
    assert not pair.read(sealed, [BlockId(0), BlockId(1)]).error


@pytest.mark.parametrize("device", DEVICES)
def test_sealing_again_tells_of_a_page_that_was_written_meanwhile(device: str) -> None:
    store = noise(1, device)
    mirror = PageMirror(store)
    (first,) = mirror.seal([BlockId(4)], [1])
    store.pages[4, 11] += 1
    (second,) = mirror.seal([BlockId(4)], [1])
    assert first.digest != second.digest


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.usefixtures("_pages_at_once")
def test_pages_come_and_leave_at_once(device: str) -> None:
    """Readers upload, and steps and the check of a damaged request seal, each on a thread of its own."""
    store = noise(1, device)
    mirror = PageMirror(store)
    quarters = [[BlockId(each) for each in range(at, NUM_BLOCKS, 4)] for at in range(4)]
    sealed = [mirror.seal(quarter, once(quarter)) for quarter in quarters]
    begin = threading.Barrier(4)

    def uploads(quarter: list[BlockId]) -> bool:
        begin.wait()
        for turn in range(NUM_TURNS):
            mirror.host.pages[quarter] = turn + quarter[0]
            mirror.upload(quarter)
            if not (store.pages[quarter] == turn + quarter[0]).all():
                return False
        return True

    def seals(at: int) -> bool:
        begin.wait()
        return all(mirror.seal(quarters[at], once(quarters[at])) == sealed[at] for _ in range(NUM_TURNS))

    with Threads(4) as threads:
        work = [*(partial(uploads, quarter) for quarter in quarters[:2]), partial(seals, 2), partial(seals, 3)]
        assert all(each.result(60) for each in [threads.submit(one) for one in work])


def test_a_device_that_fails_fails_the_read() -> None:
    pair = Pair(noise(1, "cpu"), noise(2, "cpu"))

    def fail(block_ids: Sequence[BlockId]) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    pair._reader._upload = fail
    outcome = pair.read(pair.source.seal([BlockId(1)], [1]), [BlockId(0)])
    assert "illegal memory access" in outcome.error
    assert outcome.num_bytes == 0


def test_pages_in_host_memory_need_no_mirror() -> None:
    assert mirror_of(KVStore(LAYOUT, 2)) is None


# ---- two runners -----------------------------------------------------------------------------------------------------


def greedy(prompt: list[int], num_tokens: int, device: str) -> list[int]:
    """By transformers' own attention, without a cache of ours or theirs."""
    module = make(FAMILIES["llama"]()).to(device)
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(num_tokens):
            ids.append(int(module(input_ids=torch.tensor([ids], device=device)).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def next_token(runner: ModelRunner, token_ids: list[int], start: int, block_ids: list[BlockId]) -> int:
    spec = SampleSpec(params=SamplingParams(temperature=0), prompt_token_ids=[], output_token_ids=[])
    chunk = Chunk(request_id=RequestId("r"), token_ids=token_ids, start=start, block_ids=block_ids, samples=(spec,))
    (token,) = runner.execute(StepPlan(chunks=(chunk,))).tokens[RequestId("r")]
    return token.token_id


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_prompt_tokens", [1, BLOCK_SIZE, 21])
def test_a_prompt_of_one_runner_goes_on_in_another_as_transformers_would(device: str, num_prompt_tokens: int) -> None:
    cache = CacheConfig(block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS)
    prefill, decode = (ModelRunner.from_model(adopt(make(FAMILIES["llama"]()).to(device)), cache) for _ in range(2))
    for runner in (prefill, decode):
        runner.warm_up()
    pair = Pair(prefill.store, decode.store)
    prompt = [(31 * at + 5) % VOCAB_SIZE for at in range(num_prompt_tokens)]
    split = num_prompt_tokens * 2 // 3
    theirs = [BlockId(each) for each in (5, 1, 7, 3, 20, 11)][: -(-num_prompt_tokens // BLOCK_SIZE)]
    own = [BlockId(each) for each in (2, 9, 4, 17, 0, 23, 8, 6, 1, 12)]
    if split:
        next_token(prefill, prompt[:split], 0, theirs)
    tokens = [next_token(prefill, prompt[split:], split, theirs)]
    outcome = pair.read(pair.source.seal(theirs, once(theirs)), own[: len(theirs)])
    assert not outcome.error
    prefill.store.pages.zero_()
    while len(tokens) < 16:
        tokens.append(next_token(decode, tokens[-1:], num_prompt_tokens + len(tokens) - 1, own))
    assert tokens == greedy(prompt, 16, device)
