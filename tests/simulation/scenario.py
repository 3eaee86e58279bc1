"""What one seed stands for: the size of the system, its timers, who asks for what, and what goes wrong when."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from duopool.core.config import HandoffConfig, SchedulerConfig
from duopool.core.sampling_params import SamplingParams

from .model import VOCAB_SIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One client's request; `params.seed` is its own and names it in every message."""

    at: float
    prompt: tuple[int, ...]
    params: SamplingParams
    salt: bytes
    timeout_s: float | None
    cancel_after_s: float | None
    cancel_after_tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Crash:
    """A process is killed. Silent: its host vanishes with it, so that nobody is told."""

    at: float
    place: str
    silent: bool
    back_after_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    at: float
    place: str
    for_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockJump:
    at: float
    place: str
    by_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """Nothing passes from `source` to `target`, nor back unless `one_way`."""

    at: float
    source: str
    target: str
    for_s: float
    one_way: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Break:
    """The streams between two places break; each end hears of it in its own time, or (None) not at all."""

    at: float
    one: str
    other: str
    one_after_s: float | None
    other_after_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferTrouble:
    """For a while reads and verdicts are lost, doubled, slow or damaged, each with a probability."""

    at: float
    for_s: float
    lost: float
    doubled: float
    slow: float
    slowness_s: float
    damaged: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Wild:
    """For a while single session messages are lost, doubled or overtaken, which gRPC itself excludes."""

    at: float
    for_s: float
    lost: float
    doubled: float
    overtaken: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """A worker takes nothing new and is replaced once it is idle."""

    at: float
    place: str


Fault = Crash | Stall | ClockJump | Partition | Break | TransferTrouble | Wild | Drain


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
    faults: tuple[Fault, ...]

    @property
    def workers(self) -> tuple[str, ...]:
        return self.prefill + self.decode

    @property
    def may_lose_messages(self) -> bool:
        """Single messages of a stream vanish or are overtaken: only a deadline is sure to end a request then."""
        return any(isinstance(fault, Wild) and (fault.lost or fault.overtaken) for fault in self.faults)


FAST = {"heartbeat_s": 0.1, "lease_ttl_s": 1.5, "orphan_ttl_s": 0.6, "progress_watchdog_s": 0.6}


def scenario(seed: int) -> Scenario:
    random = Random(seed)
    has_digests = random.random() < 0.75
    prefill = tuple(f"prefill-{index}" for index in range(random.choice((1, 1, 2))))
    decode = tuple(f"decode-{index}" for index in range(random.choice((1, 2, 2, 3))))
    routers = tuple(f"router-{index}" for index in range(random.choice((1, 1, 2))))
    faults = _faults(random, prefill + decode, routers, has_digests=has_digests)
    wild = any(isinstance(fault, Wild) and (fault.lost or fault.overtaken) for fault in faults)
    timers = FAST if random.random() < 0.85 else {}
    return Scenario(
        seed=seed,
        timers=HandoffConfig(**timers, local_prefill_max_tokens=random.choice((0, 0, 6, 16))),
        scheduler=SchedulerConfig(
            max_num_batched_tokens=random.choice((6, 12, 16, 64)), max_num_seqs=random.choice((2, 4, 8))
        ),
        routers=routers,
        prefill=prefill,
        decode=decode,
        num_prefill_blocks=random.randint(20, 48),
        num_decode_blocks=random.randint(22, 48),
        step_s=random.choice((0.005, 0.015, 0.03)),
        one_sided=random.random() < 0.5,
        has_digests=has_digests,
        keeps_addresses=random.random() < 0.5,
        asks=_asks(random, needs_deadline=wild),
        faults=faults,
    )


def _asks(random: Random, *, needs_deadline: bool) -> tuple[Ask, ...]:
    prefixes = [_tokens(random, random.choice((4, 8, 13, 20))) for _ in range(2)]
    asks = []
    for index in range(random.randint(2, 7)):
        prompt = (random.choice(prefixes) if random.random() < 0.6 else ()) + _tokens(random, random.randint(1, 18))
        end = random.random()
        asks.append(
            Ask(
                at=0.3 + 2.0 * random.random(),
                prompt=prompt,
                params=SamplingParams(
                    max_tokens=random.choice((1, 2, 5, 12, 24, 40)),
                    seed=1000 + index,
                    temperature=0.0,
                    ignore_eos=random.random() < 0.8,
                ),
                salt=random.choice((b"", b"", b"tenant")),
                timeout_s=random.uniform(0.3, 6.0) if needs_deadline or random.random() < 0.1 else None,
                cancel_after_s=random.uniform(0.0, 1.0) if end < 0.12 else None,
                cancel_after_tokens=random.randint(1, 8) if 0.12 <= end < 0.24 else None,
            )
        )
    return tuple(asks)


def _tokens(random: Random, count: int) -> tuple[int, ...]:
    return tuple(random.randrange(VOCAB_SIZE) for _ in range(count))


def _faults(
    random: Random, workers: tuple[str, ...], routers: tuple[str, ...], *, has_digests: bool
) -> tuple[Fault, ...]:
    kinds = random.choices(
        ("crash", "router crash", "stall", "jump", "partition", "break", "transfer", "wild", "drain"),
        weights=(4, 2, 3, 1, 4, 3, 4, 3, 1),
        k=random.choice((0, 1, 2, 2, 3, 4, 5)),
    )
    return tuple(
        sorted((_fault(random, kind, workers, routers, has_digests) for kind in kinds), key=lambda one: one.at)
    )


def _fault(random: Random, kind: str, workers: tuple[str, ...], routers: tuple[str, ...], has_digests: bool) -> Fault:
    at = 0.3 + 3.0 * random.random()
    worker, router = random.choice(workers), random.choice(routers)
    for_s = random.choice((0.05, 0.3, 1.0, 2.5)) * (0.5 + random.random())
    match kind:
        case "crash":
            silent = random.random() < 0.3
            return Crash(at=at, place=worker, silent=silent, back_after_s=random.uniform(0.1, 2.0))
        case "router crash":
            silent = random.random() < 0.3
            return Crash(at=at, place=router, silent=silent, back_after_s=random.uniform(0.1, 2.0))
        case "stall":
            return Stall(at=at, place=random.choice((worker, worker, router)), for_s=for_s)
        case "jump":
            return ClockJump(at=at, place=random.choice((worker, router)), by_s=for_s)
        case "partition":
            pairs = [(router, worker), (worker, router)]
            if worker.startswith("decode"):
                source = random.choice([one for one in workers if one.startswith("prefill")])
                pairs += [(source, worker), (worker, source)]
            if random.random() < 0.1:
                pairs = [("client", router), (router, "client")]
            source, target = random.choice(pairs)
            return Partition(at=at, source=source, target=target, for_s=for_s, one_way=random.random() < 0.5)
        case "break":
            one, other = random.choice(((router, worker), (router, worker), ("client", router)))
            after = (0.0, 0.02, 0.5, None)
            return Break(
                at=at, one=one, other=other, one_after_s=random.choice(after[:3]), other_after_s=random.choice(after)
            )
        case "transfer":
            return TransferTrouble(
                at=at,
                for_s=for_s,
                lost=random.choice((0.0, 0.2, 0.6)),
                doubled=random.choice((0.0, 0.5)),
                slow=random.choice((0.0, 0.2, 0.7)),
                slowness_s=random.choice((0.1, 0.5, 3.0)),
                damaged=random.choice((0.0, 0.0, 0.1)) if has_digests else 0.0,
            )
        case "wild":
            return Wild(
                at=at,
                for_s=for_s,
                lost=random.choice((0.0, 0.0, 0.1)),
                doubled=random.choice((0.0, 0.3)),
                overtaken=random.choice((0.0, 0.0, 0.2)),
            )
        case _:
            return Drain(at=at, place=worker)
