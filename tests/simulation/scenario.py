"""What one seed stands for: the size of the system, its timers, who asks for what, and what goes wrong when."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from duopool.core.config import HandoffConfig, SchedulerConfig
from duopool.core.sampling_params import SamplingParams

from .model import VOCAB_SIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One client's request; `params.seed` and those of its choices are its own, and name it in every message."""

    at: float
    prompt: tuple[int, ...]
    params: SamplingParams
    salt: bytes
    timeout_s: float | None
    cancel_after_s: float | None
    cancel_after_tokens: int | None
    num_choices: int = 1
    priority: int = 0

    def of_choice(self, choice: int) -> SamplingParams:
        return replace(self.params, seed=self.params.seed + choice)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Right when something happens for the n-th time, so that faults hit every phase of a handoff."""

    kind: str
    """A message's name, as a worker takes it in or says it."""
    number: int
    after_s: float


THERE = "there"
"""As a place: the worker at which the moment came."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crash:
    """A process is killed. Silent: its host vanishes with it, so that nobody is told."""

    place: str
    silent: bool
    back_after_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    place: str
    for_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockJump:
    place: str
    by_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """Nothing passes from `source` to `target`, nor back unless `one_way`."""

    source: str
    target: str
    for_s: float
    one_way: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Break:
    """The streams between two places break; each end hears of it in its own time, or (None) not at all."""

    one: str
    other: str
    one_after_s: float | None
    other_after_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferTrouble:
    """For a while reads and verdicts are lost, doubled, slow or damaged, each with a probability."""

    for_s: float
    lost: float
    doubled: float
    slow: float
    slowness_s: float
    damaged: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Wild:
    """For a while single session messages are lost, doubled or overtaken, which gRPC itself excludes."""

    for_s: float
    lost: float
    doubled: float
    overtaken: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """A worker takes nothing new and is replaced once it is idle."""

    place: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Forget:
    """A worker drops one of its requests and tells nobody."""

    place: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Abandon:
    """The client whose request the moment was about does not want it any more."""


Fault = Crash | Stall | ClockJump | Partition | Break | TransferTrouble | Wild | Drain | Forget | Abandon


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A fault and when it comes: at a time in seconds, or at a moment (if that comes at all)."""

    when: float | Moment
    fault: Fault


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    seed: int
    timers: HandoffConfig
    scheduler: SchedulerConfig
    routers: tuple[str, ...]
    prefill: tuple[str, ...]
    decode: tuple[str, ...]
    num_prefill_blocks: int
    num_decode_blocks: int
    step_s: float
    """Time of a step, and of every 16 tokens in it."""
    one_sided: bool
    has_digests: bool
    keeps_addresses: bool
    """A restarted worker listens where the one before it did."""
    asks: tuple[Ask, ...]
    plan: tuple[Planned, ...]

    @property
    def workers(self) -> tuple[str, ...]:
        return self.prefill + self.decode


SEEDS_APART = 16
"""Seeds of choices count up from their request's."""
CHAOS_S = 4.0
"""Faults befall the system before this."""
LONGEST_JUMP_S = 2.0
"""Workers remember ended attempts for 3 s of their own clock; the latest copy of a command must come before that."""
FAST = {"heartbeat_s": 0.1, "lease_ttl_s": 1.5, "orphan_ttl_s": 0.6, "progress_watchdog_s": 0.6}


def scenario(seed: int) -> Scenario:
    random = Random(seed)
    has_digests = random.random() < 0.75
    prefill = tuple(f"prefill-{index}" for index in range(random.choice((1, 1, 2))))
    decode = tuple(f"decode-{index}" for index in range(random.choice((1, 2, 2, 3))))
    routers = tuple(f"router-{index}" for index in range(random.choice((1, 1, 2))))
    is_crowded = random.random() < 0.4
    plan = _plan(random, prefill, decode, routers, has_digests=has_digests)
    if is_crowded and random.random() < 0.6:
        plan += _pursuit(random, decode, routers)
    plan += _forgetting(Random(f"{seed} forgets"))
    # When single messages of a stream vanish or are overtaken, only a deadline is sure to end a request.
    is_lossy = any(isinstance(one.fault, Wild) and (one.fault.lost or one.fault.overtaken) for one in plan)
    timers = FAST if random.random() < 0.85 else {}
    return Scenario(
        seed=seed,
        timers=HandoffConfig(**timers, local_prefill_max_tokens=random.choice((0, 0, 6, 16))),
        scheduler=SchedulerConfig(
            max_num_batched_tokens=random.choice((6, 12, 16, 64)),
            max_num_seqs=random.choice((1, 2) if is_crowded else (2, 4, 8)),
            max_num_waiting=random.choice((1, 2, 1024) if is_crowded else (1024,)),
        ),
        routers=routers,
        prefill=prefill,
        decode=decode,
        num_prefill_blocks=random.randint(20, 48),
        num_decode_blocks=random.randint(22, 28 if is_crowded else 48),
        step_s=random.choice((0.005, 0.015, 0.03)),
        one_sided=random.random() < 0.5,
        has_digests=has_digests,
        keeps_addresses=random.random() < 0.5,
        asks=_asks(random, needs_deadline=is_lossy, within_s=0.8 if is_crowded else 2.5),
        plan=plan,
    )


def _asks(random: Random, *, needs_deadline: bool, within_s: float) -> tuple[Ask, ...]:
    prefixes = [_tokens(random, random.choice((4, 8, 13, 20))) for _ in range(2)]
    asks = []
    for index in range(random.randint(3, 12)):
        prompt = (random.choice(prefixes) if random.random() < 0.6 else ()) + _tokens(random, random.randint(1, 18))
        end = random.random()
        asks.append(
            Ask(
                at=0.3 + within_s * random.random(),
                prompt=prompt,
                params=SamplingParams(
                    max_tokens=random.choice((1, 2, 5, 12, 24, 40)),
                    seed=SEEDS_APART * (64 + index),
                    temperature=0.0,
                    ignore_eos=random.random() < 0.8,
                ),
                salt=random.choice((b"", b"", b"tenant")),
                timeout_s=random.uniform(0.3, 6.0) if needs_deadline or random.random() < 0.1 else None,
                cancel_after_s=random.uniform(0.0, 1.0) if end < 0.12 else None,
                cancel_after_tokens=random.randint(1, 8) if 0.12 <= end < 0.24 else None,
                num_choices=random.choice((1, 1, 1, 2, 4)),
                priority=(0, 0, -1, 5)[index % 4],
            )
        )
    return tuple(asks)


def _tokens(random: Random, count: int) -> tuple[int, ...]:
    return tuple(random.randrange(VOCAB_SIZE) for _ in range(count))


MOMENTS = (
    "Prefill",
    "Reserve",
    "BlocksReady",
    "Reserved",
    "Read",
    "Verdict",
    "Joined",
    "Tokens",
    "Rebind",
    "Cancel",
    "Copied",
)


def _plan(
    random: Random, prefill: tuple[str, ...], decode: tuple[str, ...], routers: tuple[str, ...], *, has_digests: bool
) -> tuple[Planned, ...]:
    planned = []
    for _ in range(random.choice((0, 1, 2, 3, 4, 5, 6, 8))):
        when: float | Moment = 0.3 + (CHAOS_S - 1.0) * random.random()
        place = random.choice(prefill + decode)
        if random.random() < 0.6:
            when = Moment(
                kind=random.choice(MOMENTS),
                number=random.choice((1, 2, 3, 5, 8, 13, 21)),
                after_s=random.choice((0.0, 0.0, 0.003, 0.05)) * random.random(),
            )
            place = THERE
        fault = _fault(random, place, prefill, routers, has_digests=has_digests)
        if not isinstance(fault, Abandon) or isinstance(when, Moment):
            planned.append(Planned(when=when, fault=fault))
    return tuple(planned)


def _pursuit(random: Random, decode: tuple[str, ...], routers: tuple[str, ...]) -> tuple[Planned, ...]:
    """Leases change hands again and again while what was said of them before still comes in."""
    doubled = Planned(when=0.3, fault=Wild(for_s=CHAOS_S, lost=0.0, doubled=0.6, overtaken=0.0))
    # Reads take so long that the streams to those who read break two or three times meanwhile.
    slow = TransferTrouble(for_s=2.5, lost=0.0, doubled=0.0, slow=0.7, slowness_s=1.0, damaged=0.0)
    first = 0.5 + random.random()
    breaks = tuple(
        Planned(when=first + after_s, fault=Break(one=router, other=worker, one_after_s=0.0, other_after_s=0.0))
        for after_s in (0.0, random.uniform(0.1, 0.4), random.uniform(0.3, 0.8))
        for router in routers
        for worker in decode
    )
    return (doubled, Planned(when=0.3, fault=slow), *breaks)


def _forgetting(random: Random) -> tuple[Planned, ...]:
    """A worker has a mistake of its own."""
    if random.random() < 0.7:
        return ()
    moment = Moment(kind=random.choice(MOMENTS), number=random.choice((1, 2, 3, 5, 8)), after_s=0.05 * random.random())
    return (Planned(when=moment, fault=Forget(place=THERE)),)


def _fault(
    random: Random, worker: str, prefill: tuple[str, ...], routers: tuple[str, ...], *, has_digests: bool
) -> Fault:
    (kind,) = random.choices(
        (Crash, Stall, ClockJump, Partition, Break, TransferTrouble, Wild, Drain, Abandon),
        weights=(6, 3, 1, 4, 4, 6, 5, 6, 3),
    )
    router = random.choice(routers)
    for_s = random.choice((0.05, 0.3, 1.0, 2.5)) * (0.5 + random.random())
    if kind is Crash:
        place, silent = random.choice((worker, worker, router)), random.random() < 0.3
        return Crash(place=place, silent=silent, back_after_s=random.uniform(0.1, 2.0))
    if kind is Stall:
        return Stall(place=random.choice((worker, worker, router)), for_s=for_s)
    if kind is ClockJump:
        return ClockJump(place=random.choice((worker, router)), by_s=min(for_s, LONGEST_JUMP_S))
    if kind is Partition:
        pairs = [(router, worker), (random.choice(prefill), worker), ("client", router)]
        one, other = random.choices(pairs, weights=(6, 3, 1))[0]
        source, target = random.choice(((one, other), (other, one)))
        return Partition(source=source, target=target, for_s=for_s, one_way=random.random() < 0.5)
    if kind is Break:
        one, other = random.choice(((router, worker), (router, worker), ("client", router)))
        after = (0.0, 0.02, 0.5, None)
        return Break(one=one, other=other, one_after_s=random.choice(after[:3]), other_after_s=random.choice(after))
    if kind is TransferTrouble:
        return TransferTrouble(
            for_s=for_s,
            lost=random.choice((0.0, 0.0, 0.2, 0.6)),
            doubled=random.choice((0.0, 0.5)),
            slow=random.choice((0.0, 0.2, 0.7)),
            slowness_s=random.choice((0.02, 0.1, 0.5, 3.0)),
            damaged=random.choice((0.0, 0.02, 0.2)) if has_digests else 0.0,
        )
    if kind is Wild:
        return Wild(
            for_s=for_s,
            lost=random.choice((0.0, 0.0, 0.1)),
            doubled=random.choice((0.0, 0.2, 0.6)),
            overtaken=random.choice((0.0, 0.0, 0.2)),
        )
    return Drain(place=worker) if kind is Drain else Abandon()
