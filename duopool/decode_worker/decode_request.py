"""One request on a decode worker, from its reservation to its last token: state and messages. Decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from duopool.core.handoff.slot import Slot
from duopool.core.messages import Copied, GenerationRequest, Joined, Reserved, Tokens
from duopool.core.step import Chunk, sample_specs
from duopool.core.types import BlockId, BlockKey, FinishReason, RequestId, TokenLogprob
from duopool.core.worker import SessionId


class DecodePhase(Enum):
    WAITING = auto()
    """No block is held: new, nothing listed yet, or preempted."""
    PULLING = auto()
    """Blocks are held for a handoff; `slot` says how far it is."""
    RUNNING = auto()
    PARKED = auto()
    """All but its place in the batch: it made its last step here and waits for its new worker to take over."""
    ENDED = auto()
    """Forgotten; the table goes as soon as no running step and no read writes to it."""


@dataclass(eq=False, slots=True, kw_only=True)
class DecodeRequest:
    """One attempt of one request."""

    table: RequestId
    """Name of the block table: of this attempt alone, so that an older attempt may still hold its own."""
    request: GenerationRequest
    attempt: int
    session: SessionId
    order: int
    """Position in the order of arrival."""
    deadline_at: float | None
    due_at: float
    """What waiting requests are ordered by, among those that have not begun."""
    keys: tuple[BlockKey, ...]
    """Of the full blocks of the prefix that it came with."""
    slot: Slot | None
    """The handoff; None when the prefix is computed here."""
    output: list[int]
    """Tokens emitted so far, over all attempts."""
    told_at: float
    """When the router was last told that the request is here; at first, when it said so itself."""
    phase: DecodePhase = DecodePhase.WAITING
    is_in_step: bool = False
    """A running step writes to the table."""
    is_fork: bool = False
    """One of several choices: others may count on its newest block, which is copied before it is written to."""
    has_begun: bool = False
    """The router knows that the request was taken; deadlines are the router's from here on."""
    num_cached_tokens: int = 0
    num_computed_tokens: int = 0
    """Leading tokens whose KV is in the table."""
    num_pulled_blocks: int = 0
    num_pulled_bytes: int = 0
    reading_since: float = 0.0
    transfer_s: float = 0.0
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def request_id(self) -> RequestId:
        return self.request.request_id

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_sequences(self) -> int:
        """What it takes of the batch: a carrier will be one sequence for each choice."""
        return self.request.num_outputs

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + len(self.output)

    @property
    def num_missing_tokens(self) -> int:
        """Tokens to compute before the next one can be sampled: 1 when decoding."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def is_decoding(self) -> bool:
        return self.num_missing_tokens == 1 and self.num_tokens > self.num_prompt_tokens

    @property
    def num_prompt_logprobs(self) -> int | None:
        """Alternatives wanted per prompt token; None when they were delivered, here or by another worker."""
        return self.request.params.prompt_logprobs if self.slot is None and not self.output else None

    @property
    def max_cached_tokens(self) -> int:
        """A handoff may find all its blocks here; otherwise the last token's logits are wanted, or all of them."""
        if self.slot is not None:
            return self.num_tokens
        return self.num_tokens - 1 if self.num_prompt_logprobs is None else 0

    @property
    def is_handed_over(self) -> bool:
        """Its blocks come, or are to come, from another worker."""
        return self.slot is not None and self.phase in (DecodePhase.WAITING, DecodePhase.PULLING)

    @property
    def wants_blocks(self) -> bool:
        """Whether there is a use for blocks: a handoff may have to wait for its source first."""
        return self.slot is None or self.slot.wants_blocks

    @property
    def urgency(self) -> tuple[int, bool, float, int]:
        """What waits is ordered by this: by priority those that had begun in their old order, then the deadlines."""
        return (self.request.priority, not self.has_begun, 0.0 if self.has_begun else self.due_at, self.order)

    @property
    def seat(self) -> tuple[int, int]:
        """What runs is ordered by this; whoever comes last is preempted first."""
        return (self.request.priority, self.order)

    def is_late(self, *, now: float) -> bool:
        return not self.has_begun and self.deadline_at is not None and now >= self.deadline_at

    def tokens(self, start: int, end: int) -> Sequence[int]:
        """Token ids at positions [start, end) of prompt and output together."""
        prompt, split = self.request.prompt_token_ids, self.num_prompt_tokens
        if start >= split:
            return self.output[start - split : end - split]
        if end <= split:
            return prompt[start:end]
        return [*prompt[start:], *self.output[: end - split]]

    def chunk(self, num_tokens: int, block_ids: Sequence[BlockId], eos_token_ids: frozenset[int]) -> Chunk:
        """The next `num_tokens` tokens; when they are the last ones known, a new token is sampled behind them."""
        start, end = self.num_computed_tokens, self.num_computed_tokens + num_tokens
        is_last = end == self.num_tokens
        samples = sample_specs(self.request, self.output, eos_token_ids) if is_last else ()
        return Chunk(
            request_id=self.table,
            token_ids=self.tokens(start, end),
            start=start,
            block_ids=block_ids,
            samples=samples,
            prompt_logprobs=self.num_prompt_logprobs,
            next_token_id=None if is_last else self.tokens(end, end + 1)[0],
        )

    def fork(self, choice: GenerationRequest, first: Tokens, *, order: int) -> DecodeRequest:
        """One choice of this carrier, behind its first token."""
        return DecodeRequest(
            table=table_name(choice.request_id, self.attempt),
            request=choice,
            attempt=self.attempt,
            session=self.session,
            order=order,
            deadline_at=self.deadline_at,
            due_at=self.due_at,
            keys=self.keys,
            slot=None,
            output=list(first.token_ids),
            has_begun=True,
            is_fork=True,
            told_at=self.told_at,
            num_cached_tokens=self.num_cached_tokens,
            num_computed_tokens=self.num_tokens,
        )

    def account_for(self, carrier: DecodeRequest) -> None:
        """The transfer was made once for all choices: this one reports it."""
        self.num_pulled_blocks = carrier.num_pulled_blocks
        self.num_pulled_bytes = carrier.num_pulled_bytes
        self.transfer_s = carrier.transfer_s

    def reserved(self) -> Reserved:
        return Reserved(request_id=self.request_id, attempt=self.attempt, num_cached_tokens=self.num_cached_tokens)

    def copied(self, num_blocks: int) -> Copied:
        return Copied(request_id=self.request_id, attempt=self.attempt, num_blocks=num_blocks)

    def cut_off(self) -> Tokens:
        """The end of a request that can get no further token here."""
        return Tokens(
            request_id=self.request_id,
            attempt=self.attempt,
            index=len(self.output),
            token_ids=(),
            finish_reason=FinishReason.LENGTH,
        )

    def joined(self) -> Joined:
        return Joined(
            request_id=self.request_id,
            attempt=self.attempt,
            num_pulled_blocks=self.num_pulled_blocks,
            num_pulled_bytes=self.num_pulled_bytes,
            transfer_s=self.transfer_s,
        )


def table_name(request_id: RequestId, attempt: int) -> RequestId:
    """Block tables are named by request and attempt."""
    return RequestId(f"{request_id}/{attempt}")
