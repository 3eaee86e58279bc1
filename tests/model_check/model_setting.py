"""What one search looks at: how many workers, which faults and how many of them, and which guards stand.

Owns the request that is served and what its tokens must be. A guard that is taken away shows what it is for: the search
must then find a counterexample.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from duopool.core.messages import GenerationRequest
from duopool.core.sampling_params import SamplingParams
from duopool.core.types import RequestId

REQUEST_ID = RequestId("request")
NUM_TOKENS = 3
"""P samples token 0; D decodes tokens 1 and 2."""
NUM_BLOCKS = 2
"""Blocks of the prefix: P lists them one by one, in two chunks."""
REQUEST = GenerationRequest(
    request_id=REQUEST_ID, prompt_token_ids=(1, 2, 3), params=SamplingParams(max_tokens=NUM_TOKENS)
)


class Violation(Exception):
    """A step did what must never happen."""


def token_at(index: int) -> int:
    """The right token is a function of its index."""
    return 1000 + index


WRONG_TOKEN = -1
"""What is sampled behind blocks that hold something else, or behind a wrong prefix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guards:
    """Every field is a guard of the protocol that stands; False takes it away."""

    attempt_fence: bool = True
    """R hears only the current attempt."""
    index_fence: bool = True
    """R emits only the next index."""
    end_is_final: bool = True
    """R ends a request once."""
    validate_after_read: bool = True
    """D asks P before it uses what it read."""
    lease_pins: bool = True
    """P keeps blocks under a lease until it is revoked."""
    generation_check: bool = True
    """P's verdict compares generations."""
    lease_ttl: bool = True
    """P revokes a lease when its time is over."""
    lease_fence: bool = True
    """P refuses a validate of another attempt than the lease's."""
    tombstones: bool = True
    """Workers drop commands of attempts that are over."""
    quarantine: bool = True
    """D keeps blocks until reads into them have ended."""
    reader_count: bool = True
    """P keeps blocks while it serves them itself (gRPC)."""
    incarnation_check: bool = True
    """A new life refuses what was meant for an old one."""
    orphan_ttl: bool = True
    """Workers end the requests of a session that fell silent."""
    listed_first: bool = True
    """D gives blocks only to a handoff of which something is listed, so that nobody who has some there waits for P."""
    digest: bool = True
    """D compares the digest of every page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One search."""

    num_prefill: int = 2
    num_decode: int = 2
    num_faults: int = 1
    faults: frozenset[str] = frozenset({"double", "delay", "crash", "break", "ttl", "read", "validate", "busy"})
    """double, delay: one message. break: a session ends while its worker lives, and what is on its wires is lost.
    crash: a worker comes back empty under a new incarnation. ttl: a lease runs out that is still wanted. read: a
    transfer fails or a page is damaged. validate: question or answer is lost or late. busy: a worker refuses.
    ask, not among these at first and no fault: a heartbeat asks a worker for what the router takes to be there."""
    cancels: bool = True
    """The client may go away at any time."""
    local_prefill: bool = False
    """A route may leave P out."""
    one_sided: bool = True
    """D reads P's memory by itself (NIXL); else P serves the pages and counts its readers (gRPC)."""
    room: int | None = None
    """Requests that find room for their blocks on a worker at a time; None: all."""
    pages_stay: bool = False
    """Blocks that nobody holds are overwritten when somebody takes them; else at once, the worst that others can do."""
    max_retries: int = 3
    may_fail: bool = True
    """False: a request that ends in failure is a violation."""
    guards: Guards = field(default=Guards())
