"""What the router knows of one request, what may happen to it and what is to be done about it: plain values.

What follows from what is in `request.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from duopool.core.messages import (
    Accepted,
    BlocksReady,
    Command,
    Copied,
    GenerationRequest,
    Joined,
    Nack,
    Reserved,
    Tokens,
)
from duopool.core.types import Incarnation, WorkerId

POISON_LIMIT = 3
"""A request whose attempts took this many workers down with them, without a decoded token in between, is given up.

See docs/decisions/0004-three-deaths-are-poison.md.
"""


class Phase(StrEnum):
    CARRIED = "carried"
    """Another request, the carrier, brings the prompt of this one to a decode worker."""
    ADMITTED = "admitted"
    PREFILLING = "prefilling"
    LEASED = "leased"
    READING = "reading"
    DECODING = "decoding"
    MIGRATING = "migrating"
    """Decoding on one worker while another one copies its blocks."""
    DONE = "done"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def is_final(self) -> bool:
        return self in (Phase.DONE, Phase.CANCELLED, Phase.FAILED)


@dataclass(frozen=True, slots=True)
class Member:
    """One process in a pool: the worker's name and which life of it."""

    worker_id: WorkerId
    incarnation: Incarnation


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Where an attempt goes; without `prefill` the decode worker computes the prefix itself."""

    prefill: Member | None
    decode: Member


def must_be_on(member: Member, *, phase: Phase, prefill: Member | None, decode: Member | None) -> bool:
    """Whether the worker would have said so if it had dropped the current attempt.

    A lease ends without a word to the router, by the decode worker's release or by time, and one that is carried is not
    known by its own name.
    """
    if phase.is_final or phase in (Phase.ADMITTED, Phase.CARRIED):
        return False
    return member == decode or (member == prefill and phase is Phase.PREFILLING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shadow:
    """The next attempt of a migrating request: it gets the blocks, and nothing that it says reaches the client yet."""

    attempt: int
    decode: Member
    num_known_tokens: int
    """Leading output tokens that its Reserve told."""
    num_listed_blocks: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestState:
    """All that the router must know of one request to go on with it anywhere."""

    request: GenerationRequest
    phase: Phase = Phase.ADMITTED
    attempt: int = 0
    """The one that counts: the fence."""
    newest_attempt: int = 0
    """Highest number given out; above `attempt` if the newest one is or was a shadow."""
    route: Route | None = None
    shadow: Shadow | None = None
    """Set as long as the request is migrating."""
    reserved: bool = False
    ready: tuple[BlocksReady, ...] = ()
    """What P sealed in this attempt, kept so that another D can be told."""
    output: tuple[int, ...] = ()
    retries_left: int = 3
    excluded: frozenset[Member] = frozenset()
    """Members that failed this request."""
    missing: frozenset[Member] = frozenset()
    """Members that were lost while they worked on this request and have not come back: dead, or only out of reach."""
    dead: frozenset[Member] = frozenset()
    """Those of them whose end is certain. A token from a decode worker clears both."""

    @property
    def is_suspect(self) -> bool:
        """So many members were lost over it in a row that it goes on only when some of them turn out to live."""
        return len(self.missing) + len(self.dead) >= POISON_LIMIT

    def attempt_on(self, member: Member) -> int | None:
        """The attempt that the worker must have, if there is one."""
        if self.shadow is not None and member == self.shadow.decode:
            return self.shadow.attempt
        route = self.route
        if route is None or not must_be_on(member, phase=self.phase, prefill=route.prefill, decode=route.decode):
            return None
        return self.attempt

    @property
    def is_handed_over(self) -> bool:
        """P has finished its part of the current attempt."""
        return bool(self.ready) and self.ready[-1].first_token is not None


# ---- events besides the workers' messages ----------------------------------------------------------------------------

WorkerMessage = Accepted | BlocksReady | Copied | Reserved | Joined | Tokens | Nack
"""What a worker says of one attempt of one request."""


@dataclass(frozen=True, slots=True)
class Routed:
    """The policy chose workers for the attempt that was asked for."""

    route: Route


@dataclass(frozen=True, slots=True)
class Carried:
    """The carrier has begun this attempt: what workers say of it counts."""

    attempt: int
    route: Route


@dataclass(frozen=True, slots=True)
class SetDown:
    """The carrier cannot go on for all its choices: each goes on from the tokens that it has."""

    carrier: RequestState


@dataclass(frozen=True, slots=True)
class Lost:
    """A member died, restarted, stalled or fell out of the membership; or only the stream to it broke."""

    member: Member


@dataclass(frozen=True, slots=True)
class Returned:
    """A member can be reached (again) in the same life: if it had been lost, it had not died."""

    member: Member


@dataclass(frozen=True, slots=True)
class Gone:
    """The supervisor has struck the member off: its life is over for certain."""

    member: Member


@dataclass(frozen=True, slots=True)
class Moved:
    """The decode worker is to be left, without a pause: `decode` takes the request over with its blocks."""

    decode: Member


@dataclass(frozen=True, slots=True)
class Evicted:
    """A decode worker that drains is to be left now: go on elsewhere from the tokens that are there."""

    member: Member


@dataclass(frozen=True, slots=True)
class Stopped:
    """The router itself ends the request: client gone, deadline, stop string, slow reader."""

    phase: Phase
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Heard:
    """A worker's message about this request."""

    member: Member
    message: WorkerMessage


RequestEvent = Routed | Carried | SetDown | Lost | Returned | Gone | Moved | Evicted | Stopped | Heard


# ---- actions ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NeedRoute:
    """Choose workers (not the excluded ones) and come back with `Routed`."""

    excluded: frozenset[Member]
    prefill: Member | None = None
    """Its finished work is still leased: only a decode worker is wanted."""


@dataclass(frozen=True, slots=True)
class Send:
    member: Member
    command: Command


@dataclass(frozen=True, slots=True)
class Emit:
    """Hand tokens to the client: the only action that the client sees."""

    tokens: Tokens


@dataclass(frozen=True, slots=True)
class Finish:
    """The one terminal action of a request."""

    phase: Phase
    reason: str = ""
    nack: Nack | None = field(default=None)
    """The worker's refusal, if that ended the request."""
    is_poison: bool = False
    """The request itself is suspected of having ended the workers."""


Action = NeedRoute | Send | Emit | Finish
Step = tuple[RequestState, tuple[Action, ...]]
