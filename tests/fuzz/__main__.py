"""`python -m tests.fuzz --cases 20000`: wrong input on every wire, beside streams that must not notice.

Exit status 0 if no process ended, no call took longer than `--hang-s`, none was answered INTERNAL or UNKNOWN, the
neighbours' streams stayed the same token for token, and audits and the workers' own checks found nothing in the end.
A call that is answered with tokens may take as much longer as the neighbours' streams did for so many, on the average.
Then workers lie to a router, and KV sources to readers (`liars.py`, `lying_source.py`), in a twentieth of the cases.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random

from duopool.client import CallFailed, Client
from duopool.engine.transfer.factory import available_transports
from duopool.proto import inference_pb2 as pb
from duopool.proto.internal_access import CREDENTIAL_VARIABLE

from .cases import Cases, Outcome
from .liars import Lies, lie_to_router
from .lying_source import lie_to_reader
from .target import Target
from .tiny import make_tiny_model

NUM_THREADS = 6
NUM_STREAM_TOKENS = 40
LIES_SHARE = 80
"""One of so many cases goes to each of the four kinds of liars."""
MAX_SHOWN = 12
STREAM_TIMEOUT_S = 60.0
WRONG = ("INTERNAL", "UNKNOWN")


@dataclass(slots=True)
class Report:
    """What came of it."""

    codes: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    num_hangs: int = 0
    num_long: int = 0
    """Answers that took more than a hang's time, for all their tokens."""
    slowest_s: float = 0.0
    """Without the time of the answer's tokens."""
    num_streams: int = 0
    streams_s: float = 0.0
    """Time of all neighbours' streams together."""
    changed: list[str] = field(default_factory=list)
    exits: int = 0
    remains: list[str] = field(default_factory=list)

    @property
    def token_s(self) -> float:
        """What each token of a neighbour's stream took."""
        return self.streams_s / (self.num_streams * NUM_STREAM_TOKENS) if self.num_streams else 0.0

    def judge(self, name: str, outcome: Outcome, seconds: float, *, hang_s: float) -> None:
        """Take in how a case ended, once all streams have."""
        self.codes[outcome.code] += 1
        self.kinds[outcome.kind.split(" ")[0]] += 1
        beyond_s = seconds - outcome.num_tokens * self.token_s
        self.slowest_s = max(self.slowest_s, beyond_s)
        self.num_long += beyond_s <= hang_s < seconds
        if outcome.code == "HANG" or beyond_s > hang_s:
            self.num_hangs += 1
            self.wrong.append(f"{name} {outcome.kind}: {outcome.code} after {seconds:.2f} s")
        elif outcome.code in WRONG:
            self.wrong.append(f"{name} {outcome.kind}: {outcome.code} {outcome.detail}")

    @property
    def is_good(self) -> bool:
        return not (self.wrong or self.num_hangs or self.changed or self.exits or self.remains)

    def __str__(self) -> str:
        num_wrong = sum(self.codes[code] for code in WRONG)
        lines = [
            f"{sum(self.codes.values())} cases: {self.exits} processes ended, {self.num_hangs} hangs (slowest case "
            f"{self.slowest_s:.2f} s), {num_wrong} answered {' or '.join(WRONG)}; {self.num_streams} neighbours' "
            f"streams, {len(self.changed)} changed; {len(self.remains)} things left behind",
            f"a neighbour's token took {1000 * self.token_s:.1f} ms, {self.num_long} answers as long for all theirs",
            "codes: " + ", ".join(f"{code} {count}" for code, count in self.codes.most_common()),
            "kinds: " + ", ".join(f"{kind} {count}" for kind, count in sorted(self.kinds.items())),
        ]
        return "\n".join([*lines, *self.wrong[:MAX_SHOWN], *self.changed[:MAX_SHOWN], *self.remains[:MAX_SHOWN]])


def fuzz(num_cases: int, seed: int, *, hang_s: float, model: Path) -> Report:
    """Run the cases; the same seed draws the same cases, in `NUM_THREADS` streams of them."""
    report, lock, is_over = Report(), threading.Lock(), threading.Event()
    taken: list[tuple[str, Outcome, float]] = []

    def attack(thread: int) -> None:
        cases = Cases(target, Random(f"{seed} {thread}"))
        try:
            for number in range(thread, num_cases, NUM_THREADS):
                began = time.monotonic()
                try:
                    outcome = cases.run()
                except Exception as error:  # a mistake of the fuzzer's is a finding too
                    outcome = Outcome("fuzzer", "UNKNOWN", repr(error))
                taken.append((f"seed {seed} case {number}", outcome, time.monotonic() - began))
                if target.exits:
                    return
        finally:
            cases.close()

    def stream(client: Client, at: int) -> list[int]:
        sampled = {"temperature": 0.8, "seed": at} if at % 2 else {"temperature": 0.0}
        asked = {"token_ids": range(40 + at, 80 + at), "max_tokens": NUM_STREAM_TOKENS, "ignore_eos": True, **sampled}
        events = client.generate(timeout_s=STREAM_TIMEOUT_S, **asked)
        return [token for event in events if isinstance(event, pb.TokenChunk) for token in event.token_ids]

    def live_beside(at: int, expected: list[int]) -> None:
        with Client(target.address) as client:
            while not is_over.is_set():
                began = time.monotonic()
                try:
                    tokens = stream(client, at)
                except CallFailed as error:
                    if not target.exits:
                        report.changed.append(f"neighbour {at}: {error}")
                    return
                with lock:
                    report.num_streams += 1
                    report.streams_s += time.monotonic() - began
                if tokens != expected:
                    report.changed.append(f"neighbour {at}: {tokens}, expected {expected}")

    with Target(model) as target:
        with Client(target.address) as client:
            expected = [stream(client, at) for at in range(2)]
        neighbours = [threading.Thread(target=live_beside, args=(at, expected[at])) for at in range(2)]
        attackers = [threading.Thread(target=attack, args=(thread,)) for thread in range(NUM_THREADS)]
        for thread in (*neighbours, *attackers):
            thread.start()
        for thread in attackers:
            thread.join()
        is_over.set()
        for thread in neighbours:
            thread.join()
        report.exits = target.exits
        if not report.exits:
            report.remains = target.come_to_rest()
    for name, outcome, seconds in taken:
        report.judge(name, outcome, seconds, hang_s=hang_s)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hang-s", type=float, default=1.0, help="a call that takes longer hangs")
    given = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="duopool-fuzz-") as folder:
        report = fuzz(given.cases, given.seed, hang_s=given.hang_s, model=make_tiny_model(Path(folder) / "tiny"))
    print(f"{report}\nseed {given.seed}, {time.monotonic() - began:.0f} s", flush=True)
    lies = list(lie(given.cases // LIES_SHARE, given.seed))
    return 0 if report.is_good and all(told.is_good for told in lies) else 1


def lie(num_cases: int, seed: int) -> Iterator[Lies]:
    """Requests beside liars, requests that liars get, reads from a source that lies: as many of each."""
    os.environ.setdefault(CREDENTIAL_VARIABLE, secrets.token_urlsafe(32))
    parts: dict[str, Callable[[], Lies]] = {
        "workers that lie about others' requests": partial(lie_to_router, num_cases, seed, serves=False),
        "workers that lie about their own": partial(lie_to_router, num_cases, seed, serves=True),
    }
    for transport in available_transports():
        parts[f"KV sources, {transport}"] = partial(lie_to_reader, num_cases, seed, transport=transport)
    for name, part in parts.items():
        began = time.monotonic()
        told = part()
        print(f"{name}: {told}\n{time.monotonic() - began:.0f} s", flush=True)
        yield told


if __name__ == "__main__":
    sys.exit(main())
