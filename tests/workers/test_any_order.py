"""Any order of commands, steps, reads, failures, cancels, retries and silence: streams stay right, blocks come back."""

from __future__ import annotations

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from worker_fakes import BLOCK_SIZE, Pair, expected_stream, make_pair

from duopool.core.messages import BlocksReady, Cancel, Choice, Command, GenerationRequest, Prefill, Reserve
from duopool.core.types import RequestId

NAMES = st.sampled_from(["r0", "r1", "r2", "r3"])
ANY_NAMES = st.one_of(NAMES, st.sampled_from(["r0a", "r0b", "r1a", "r1c", "r2b"]))
"""Carriers' choices have a letter."""


class AnyOrder(RuleBasedStateMachine):
    """A router that forgets nothing and repeats itself at will."""

    pair: Pair

    @initialize(
        num_prefill_blocks=st.integers(8, 20),
        num_decode_blocks=st.integers(9, 20),
        budget=st.integers(3, 24),
        is_counted=st.booleans(),
    )
    def begin(self, num_prefill_blocks: int, num_decode_blocks: int, budget: int, is_counted: bool) -> None:
        self.pair = make_pair(
            num_prefill_blocks=num_prefill_blocks,
            num_decode_blocks=num_decode_blocks,
            prefill={"max_num_batched_tokens": budget, "max_num_seqs": 3},
            decode={"max_num_batched_tokens": budget, "max_num_seqs": 3},
        )
        self.pair.reader.is_counted = is_counted
        self.requests: dict[str, GenerationRequest] = {}
        self.carriers: dict[str, GenerationRequest] = {}
        self.attempts: dict[str, int] = {}
        self.said: list[tuple[bool, Command]] = []

    @rule(
        name=NAMES,
        shared=st.integers(0, 12),
        own=st.integers(1, 8),
        is_local=st.booleans(),
        rest=st.integers(1, 8),
        num_choices=st.sampled_from([1, 1, 2, 3]),
        priority=st.sampled_from([0, 0, 1, -1]),
    )
    def send(
        self, name: str, shared: int, own: int, is_local: bool, rest: int, num_choices: int = 1, priority: int = 0
    ) -> None:
        """A new request, or another attempt of a known one behind what it has emitted."""
        pair = self.pair
        if name not in self.requests and name not in self.carriers:
            prompt = [*range(shared), *[int(name[1])] * own]
            request = pair.request(name, prompt, max_tokens=rest, ignore_eos=True)
            request = msgspec.structs.replace(request, priority=priority)
            if num_choices == 1:
                self.requests[name] = request
            else:
                choices = tuple(Choice(RequestId(name + "abc"[seed]), seed) for seed in range(num_choices))
                self.carriers[name] = carrier = msgspec.structs.replace(request, choices=choices)
                self.requests |= {str(output.request_id): output for output in carrier.outputs}
        if name in self.carriers:
            self.send_carrier(self.carriers[name], is_local=is_local)
        else:
            self.send_again(name, is_local=is_local)

    def send_carrier(self, carrier: GenerationRequest, *, is_local: bool) -> None:
        """Once it has brought a token, its choices go on by themselves."""
        names = [str(output.request_id) for output in carrier.outputs]
        if any(self.pair.streams.get(name) for name in names):
            for name in names:
                self.send_again(name, is_local=is_local)
            return
        attempt = self.attempts.get(carrier.request_id, 0) + 1
        self.attempts |= dict.fromkeys([carrier.request_id, *names], attempt)
        self.say_both(carrier, attempt, is_local=is_local)

    def send_again(self, name: str, *, is_local: bool) -> None:
        pair = self.pair
        if name in pair.finished:
            return
        first = self.requests[name]
        output = tuple(pair.streams.get(name, ()))
        request = GenerationRequest(
            request_id=first.request_id,
            prompt_token_ids=first.prompt_token_ids,
            output_token_ids=output,
            params=first.params,
            priority=first.priority,
        )
        attempt = self.attempts[name] = self.attempts.get(name, 0) + 1
        self.say_both(request, attempt, is_local=is_local)

    def say_both(self, request: GenerationRequest, attempt: int, *, is_local: bool) -> None:
        if not is_local:
            self.say(True, Prefill(request=request, attempt=attempt))
        self.say(False, Reserve(request=request, attempt=attempt, local_prefill=is_local))

    def say(self, is_for_prefill: bool, command: Command) -> None:
        self.said.append((is_for_prefill, command))
        (self.pair.to_prefill if is_for_prefill else self.pair.to_decode)(command)

    @precondition(lambda self: self.said)
    @rule(choice=st.randoms(use_true_random=False))
    def repeat(self, choice: object) -> None:
        """Something that was said before comes once more."""
        ready = [(False, event) for event in self.pair.events if isinstance(event, BlocksReady)]
        is_for_prefill, command = choice.choice([*self.said, *ready])  # type: ignore[attr-defined]
        (self.pair.to_prefill if is_for_prefill else self.pair.to_decode)(command)

    @rule(count=st.integers(1, 3))
    def step_prefill(self, count: int) -> None:
        for _ in range(count):
            self.pair.step_prefill()

    @rule(count=st.integers(1, 3))
    def step_decode(self, count: int) -> None:
        for _ in range(count):
            self.pair.step_decode()

    @precondition(lambda self: self.pair.reader.pending)
    @rule(choice=st.randoms(use_true_random=False), error=st.sampled_from(["", "", "", "broken"]))
    def run_read(self, choice: object, error: str) -> None:
        self.pair.reader.run(choice.randrange(len(self.pair.reader.pending)), error=error)  # type: ignore[attr-defined]
        self.pair.collect()

    @rule(name=ANY_NAMES, is_for_prefill=st.booleans())
    def cancel_on_one_side(self, name: str, is_for_prefill: bool) -> None:
        """The other side does not hear of it: its timers must do."""
        if name in self.attempts:
            self.say(is_for_prefill, Cancel(request_id=RequestId(name), attempt=self.attempts[name]))

    @rule(name=ANY_NAMES, is_for_prefill=st.booleans())
    def cancel_during_a_step(self, name: str, is_for_prefill: bool) -> None:
        pair = self.pair
        runner = pair.prefill_runner if is_for_prefill else pair.decode_runner
        runner.during_step = lambda: (self.cancel_on_one_side(name, is_for_prefill), self.ledgers_agree())
        (pair.step_prefill if is_for_prefill else pair.step_decode)()
        runner.during_step = lambda: None

    @rule(seconds=st.sampled_from([0.1, 1.0, 3.0, 6.0]), heartbeat=st.booleans())
    def pass_time(self, seconds: float, heartbeat: bool) -> None:
        self.pair.pass_time(seconds, heartbeat=heartbeat)

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        if hasattr(self, "pair"):
            self.pair.prefill.check()
            self.pair.decode.check()

    @invariant()
    def ledgers_agree(self) -> None:
        if hasattr(self, "pair"):
            assert self.pair.audit() == []

    @invariant()
    def streams_are_right_so_far(self) -> None:
        for name, request in getattr(self, "requests", {}).items():
            stream = self.pair.streams.get(name, [])
            whole = expected_stream(request.prompt_token_ids, request.params)
            assert stream == whole[: len(stream)]
            assert (name in self.pair.finished) == (stream == whole)

    def send_all(self) -> None:
        carried = {choice.request_id for carrier in self.carriers.values() for choice in carrier.choices}
        for name in [*self.carriers, *(name for name in self.requests if name not in carried)]:
            self.send(name, 0, 1, False, 1)

    def teardown(self) -> None:
        """Every request is finished by a last attempt, and then nothing is held."""
        if not hasattr(self, "pair"):
            return
        pair = self.pair
        self.send_all()
        pair.pass_time(0.1)
        for _ in range(3):  # one that lost its lease or its turn gets another attempt
            pair.run()
            self.send_all()
        pair.run()
        self.streams_are_right_so_far()
        assert set(pair.finished) == set(self.requests)
        for name, attempt in self.attempts.items():
            pair.cancel(name, attempt)
        pair.pass_time(6.0)
        pair.run_reads()
        pair.assert_nothing_is_held()
        pair.assert_kv_events_tell_what_is_cached()
        assert pair.decode_manager.num_blocks * BLOCK_SIZE >= 36


AnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAnyOrder = AnyOrder.TestCase
