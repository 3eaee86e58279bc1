"""A fake model whose KV is a function of the whole prefix, in pages of real bytes.

The KV of a position is a hash of the KV before it and of its token, as a real model's depends on all tokens before; the
next token is a hash of every page's bytes. A page that is wrong, stale, torn or another request's changes the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from hashlib import blake2b

from duopool.core.sampling_params import SamplingParams
from duopool.core.step import Chunk, SampledToken, StepPlan, StepResult
from duopool.core.types import BlockId, FinishReason

BLOCK_SIZE = 4
KV_BYTES = 8
PAGE_BYTES = BLOCK_SIZE * KV_BYTES
VOCAB_SIZE = 97
EOS = 7


class Pages:
    """A `PageStore` of one process's own memory."""

    page_bytes = PAGE_BYTES
    base_address = 0
    shared_memory = None
    digest = "simulated"

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._bytes = memoryview(bytearray(b"\xee" * (num_blocks * PAGE_BYTES)))

    def page(self, block_id: BlockId) -> memoryview:
        return self._bytes[block_id * PAGE_BYTES : (block_id + 1) * PAGE_BYTES]


def kv_of(before: bytes, token_id: int) -> bytes:
    return blake2b(before + token_id.to_bytes(2, "little"), digest_size=KV_BYTES).digest()


def token_after(context: bytes, seed: int) -> int:
    """The next token, from the KV of everything before it."""
    digest = blake2b(context, digest_size=8, key=(seed % 2**64).to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little") % VOCAB_SIZE


class SimulatedRunner:
    """Executes plans on pages. `pause` lets time pass within a step; `watch` sees every chunk that is computed."""

    def __init__(
        self,
        pages: Pages,
        *,
        step_s: Callable[[StepPlan], float],
        pause: Callable[[float], None],
        watch: Callable[[Chunk], None],
    ) -> None:
        self._pages = pages
        self._step_s = step_s
        self._pause = pause
        self._watch = watch

    def execute(self, plan: StepPlan) -> StepResult:
        step_s = self._step_s(plan)
        self._pause(step_s / 2)
        for copy in plan.copies:
            self._pages.page(copy.target)[:] = self._pages.page(copy.source)
        tokens = {}
        for chunk in plan.chunks:
            self._watch(chunk)
            self._write(chunk)
            if chunk.samples:
                context = self._context(chunk, chunk.start + len(chunk.token_ids))
                seeds = (spec.params.seed for spec in chunk.samples)
                tokens[chunk.request_id] = tuple(SampledToken(token_id=token_after(context, seed)) for seed in seeds)
        self._pause(step_s / 2)
        return StepResult(tokens=tokens)

    def _write(self, chunk: Chunk) -> None:
        before = self._kv(chunk, chunk.start - 1) if chunk.start else b""
        for position, token_id in enumerate(chunk.token_ids, chunk.start):
            before = kv_of(before, token_id)
            begin = position % BLOCK_SIZE * KV_BYTES
            self._pages.page(chunk.block_ids[position // BLOCK_SIZE])[begin : begin + KV_BYTES] = before

    def _kv(self, chunk: Chunk, position: int) -> bytes:
        begin = position % BLOCK_SIZE * KV_BYTES
        return bytes(self._pages.page(chunk.block_ids[position // BLOCK_SIZE])[begin : begin + KV_BYTES])

    def _context(self, chunk: Chunk, end: int) -> bytes:
        num_blocks = -(-end // BLOCK_SIZE)
        return b"".join(self._pages.page(chunk.block_ids[index]) for index in range(num_blocks))[: end * KV_BYTES]


@lru_cache(maxsize=4096)
def expected_output(prompt: tuple[int, ...], params: SamplingParams) -> tuple[tuple[int, ...], FinishReason]:
    """What a request gives when nothing ever fails."""
    context, before = bytearray(), b""
    for token_id in prompt:
        before = kv_of(before, token_id)
        context += before
    output: list[int] = []
    while True:
        token_id = token_after(bytes(context), params.seed)
        output.append(token_id)
        if token_id == EOS and not params.ignore_eos and len(output) > params.min_tokens:
            return tuple(output), FinishReason.STOP
        if len(output) >= params.max_tokens:
            return tuple(output), FinishReason.LENGTH
        before = kv_of(before, token_id)
        context += before


@lru_cache(maxsize=4096)
def expected_pages(tokens: tuple[int, ...]) -> tuple[bytes, ...]:
    """Bytes of all full blocks of a sequence."""
    before, entries = b"", []
    for token_id in tokens:
        before = kv_of(before, token_id)
        entries.append(before)
    return tuple(b"".join(entries[end - BLOCK_SIZE : end]) for end in range(BLOCK_SIZE, len(tokens) + 1, BLOCK_SIZE))
