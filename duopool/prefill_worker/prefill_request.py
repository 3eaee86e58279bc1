"""One prompt on a prefill worker, from its arrival to the end of its lease: state and messages. Decides nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from duopool.core.handoff.lease import Lease
from duopool.core.messages import Accepted, BlocksReady, GenerationRequest, LeaseRef, SealedBlock, Tokens
from duopool.core.step import Chunk, sample_specs
from duopool.core.types import BlockId, BlockKey, RequestId, TokenLogprob
from duopool.core.worker import SessionId


class PrefillPhase(Enum):
    WAITING = auto()
    """No block is held."""
    FILLING = auto()
    LEASED = auto()
    """Everything is computed and listed; the table lives as long as the lease."""
    ENDED = auto()
    """Forgotten; the table goes as soon as no running step and no counted read needs it."""


@dataclass(eq=False, slots=True, kw_only=True)
class PrefillRequest:
    """One attempt of one request."""

    table: RequestId
    """Name of the block table: of this attempt alone, so that an older attempt may still hold its own."""
    request: GenerationRequest
    attempt: int
    session: SessionId
    arrived_at: float
    deadline_at: float | None
    due_at: float
    """What the queues are ordered by, among requests of one priority."""
    token_ids: tuple[int, ...]
    keys: tuple[BlockKey, ...]
    phase: PrefillPhase = PrefillPhase.WAITING
    is_in_step: bool = False
    """A running step writes to the table."""
    num_cached_tokens: int = 0
    num_computed_tokens: int = 0
    """Leading tokens whose KV is in the table."""
    num_listed_blocks: int = 0
    """Leading blocks that the decode worker was told of."""
    started_at: float = 0.0
    lease: Lease | None = None
    ready: list[BlocksReady] = field(default_factory=list)
    """What was said so far, for a command that comes twice."""
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def request_id(self) -> RequestId:
        return self.request.request_id

    @property
    def turn(self) -> tuple[int, float]:
        """What the queues are ordered by."""
        return (self.request.priority, self.due_at)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_missing_tokens(self) -> int:
        return self.num_tokens - self.num_computed_tokens

    @property
    def num_prompt_logprobs(self) -> int | None:
        """Alternatives wanted per prompt token; None when an earlier attempt has delivered them."""
        return None if self.request.output_token_ids else self.request.params.prompt_logprobs

    @property
    def max_cached_tokens(self) -> int:
        """The last token is always computed: its logits give the first new token. Prompt logits need all of them."""
        return self.num_tokens - 1 if self.num_prompt_logprobs is None else 0

    def is_late(self, *, now: float) -> bool:
        return self.deadline_at is not None and now >= self.deadline_at

    def chunk(self, num_tokens: int, block_ids: tuple[BlockId, ...], eos_token_ids: frozenset[int]) -> Chunk:
        """The next `num_tokens` tokens; the last ones of the prefix sample the first token."""
        start, end = self.num_computed_tokens, self.num_computed_tokens + num_tokens
        is_last = end == self.num_tokens
        samples = sample_specs(self.request, self.request.output_token_ids, eos_token_ids) if is_last else ()
        return Chunk(
            request_id=self.table,
            token_ids=self.token_ids[start:end],
            start=start,
            block_ids=block_ids,
            samples=samples,
            prompt_logprobs=self.num_prompt_logprobs,
            next_token_id=None if is_last else self.token_ids[end],
        )

    def accepted(self) -> Accepted:
        return Accepted(request_id=self.request_id, attempt=self.attempt, num_cached_tokens=self.num_cached_tokens)

    def list_blocks(
        self,
        blocks: tuple[SealedBlock, ...],
        lease: LeaseRef,
        first_tokens: tuple[Tokens, ...],
        *,
        now: float,
    ) -> BlocksReady:
        """Count the next blocks as listed, in the message that lists them; `first_tokens` come with the last one."""
        message = BlocksReady(
            request_id=self.request_id,
            attempt=self.attempt,
            lease=lease,
            first_block=self.num_listed_blocks,
            blocks=blocks,
            first_token=self._last_word(first_tokens),
            first_tokens=first_tokens if self.request.choices else (),
            queue_s=self.started_at - self.arrived_at,
            prefill_s=now - self.started_at,
            num_cached_tokens=self.num_cached_tokens,
        )
        self.num_listed_blocks += len(blocks)
        self.ready.append(message)
        return message

    def _last_word(self, first_tokens: tuple[Tokens, ...]) -> Tokens | None:
        """What tells that all is listed: the first token, or an empty one of a carrier."""
        if not first_tokens or not self.request.choices:
            return next(iter(first_tokens), None)
        index = len(self.request.output_token_ids)
        return Tokens(request_id=self.request_id, attempt=self.attempt, index=index, token_ids=())


def table_name(request_id: RequestId, attempt: int) -> RequestId:
    """Block tables are named by request and attempt."""
    return RequestId(f"{request_id}/{attempt}")
