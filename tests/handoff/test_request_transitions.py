"""The router's side under duplicated, reordered and late messages, lost workers and changing routes."""

from __future__ import annotations

from dataclasses import replace

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from duopool.core.handoff.request import (
    POISON_LIMIT,
    Action,
    Emit,
    Evicted,
    Finish,
    Gone,
    Heard,
    Lost,
    Member,
    Moved,
    NeedRoute,
    Phase,
    RequestState,
    Returned,
    Route,
    Routed,
    Send,
    Stopped,
    begin,
    transition,
)
from duopool.core.messages import (
    Accepted,
    BlocksReady,
    Cancel,
    Copied,
    GenerationRequest,
    Joined,
    LeaseRef,
    Migrate,
    Nack,
    NackReason,
    Prefill,
    Rebind,
    Reserve,
    Reserved,
    SealedBlock,
    Tokens,
)
from duopool.core.sampling_params import SamplingParams
from duopool.core.types import BlockId, FinishReason, Incarnation, LeaseId, RequestId, WorkerId

REQUEST_ID = RequestId("0" * 32)
NUM_TOKENS = 6
MAX_RETRIES = 3
REQUEST = GenerationRequest(
    request_id=REQUEST_ID, prompt_token_ids=(1, 2, 3), params=SamplingParams(max_tokens=NUM_TOKENS)
)


def token_at(index: int) -> int:
    """The stream is a function of the position, on whichever worker it is computed."""
    return 1000 + index


def tokens_of(attempt: int, index: int) -> Tokens:
    last = index == NUM_TOKENS - 1
    return Tokens(
        request_id=REQUEST_ID,
        attempt=attempt,
        index=index,
        token_ids=(token_at(index),),
        finish_reason=FinishReason.LENGTH if last else None,
    )


def listing(member: Member, attempt: int, first_block: int, first_token: Tokens | None) -> BlocksReady:
    """Two more blocks of a source."""
    lease = LeaseRef(
        lease_id=LeaseId(attempt), worker_id=member.worker_id, incarnation=member.incarnation, source_address="p:1"
    )
    return BlocksReady(
        request_id=REQUEST_ID,
        attempt=attempt,
        lease=lease,
        first_block=first_block,
        blocks=tuple(SealedBlock(BlockId(first_block + n), 1, 0) for n in range(2)),
        first_token=first_token,
    )


class World:
    """Honest workers: everything they may ever say lands in `said` and stays there."""

    def __init__(self) -> None:
        self.said: list[tuple[Member, object]] = []
        self.refusals: list[tuple[Member, Nack]] = []
        """What they would say if something went wrong."""
        self.holders: dict[Member, int] = {}
        """Who may hold something for the request, under which attempt."""

    def take(self, member: Member, command: object) -> None:
        match command:
            case Prefill(request=request, attempt=attempt):
                self.holders[member] = attempt
                self._prefill(member, attempt, first_index=len(request.output_token_ids))
            case Migrate(to_attempt=to_attempt):
                self._depart(member, to_attempt)
            case BlocksReady(attempt=attempt, first_block=first_block, blocks=blocks, first_token=None):
                num_blocks = first_block + len(blocks)
                self._say(member, Copied(request_id=REQUEST_ID, attempt=attempt, num_blocks=num_blocks))
            case Reserve(request=request, attempt=attempt, local_prefill=local):
                self.holders[member] = attempt
                self._say(member, Reserved(request_id=REQUEST_ID, attempt=attempt, num_cached_tokens=0))
                self._nacks(member, attempt)
                if local:
                    self._decode(member, attempt, first_index=len(request.output_token_ids))
            case BlocksReady(attempt=attempt, first_token=Tokens(index=index)):
                self._decode(member, attempt, first_index=index + 1)
            case Rebind(attempt=attempt):
                assert member in self.holders, "a rebind went to a worker that holds no lease"
                self.holders[member] = attempt
            case Cancel(attempt=attempt):
                if self.holders.get(member, attempt + 1) <= attempt:
                    del self.holders[member]
            case _:
                pass

    def _prefill(self, member: Member, attempt: int, *, first_index: int) -> None:
        self._say(member, Accepted(request_id=REQUEST_ID, attempt=attempt, num_cached_tokens=0))
        for first_block in (0, 2):
            first_token = tokens_of(attempt, first_index) if first_block else None
            self._say(member, listing(member, attempt, first_block, first_token))
        self._nacks(member, attempt)

    def _depart(self, member: Member, attempt: int) -> None:
        """Behind which token the source stops is said later, by `stop_behind`."""
        for first_block in (0, 2):
            self._say(member, listing(member, attempt, first_block, None))
        self._nacks(member, attempt)

    def stop_behind(self, member: Member, attempt: int, index: int) -> None:
        self._say(member, listing(member, attempt, 4, tokens_of(attempt, index)))

    def _decode(self, member: Member, attempt: int, *, first_index: int) -> None:
        self._say(
            member,
            Joined(request_id=REQUEST_ID, attempt=attempt, num_pulled_blocks=4, num_pulled_bytes=4, transfer_s=0.0),
        )
        for index in range(first_index, NUM_TOKENS):
            self._say(member, tokens_of(attempt, index))

    def _nacks(self, member: Member, attempt: int) -> None:
        for reason in (NackReason.BUSY, NackReason.LEASE_LOST, NackReason.TOO_LARGE):
            self.refusals.append((member, Nack(request_id=REQUEST_ID, attempt=attempt, reason=reason)))

    def _say(self, member: Member, message: object) -> None:
        self.said.append((member, message))


class RequestMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.lost: set[Member] = set()
        self.wanted: NeedRoute | None = None
        self.emitted: list[int] = []
        self.finishes: list[Finish] = []
        self.num_routes = 0
        self.num_evictions = 0
        self.num_busy = 0
        self.num_moves = 0
        self.num_heard = 0
        self.next_incarnation = 100
        self.state, actions = begin(RequestState(request=REQUEST, retries_left=MAX_RETRIES))
        self.perform(actions)

    def feed(self, event: object) -> None:
        before = self.state
        self.state, actions = transition(before, event)  # type: ignore[arg-type]
        assert before.attempt <= self.state.attempt <= self.state.newest_attempt <= before.newest_attempt + 1
        assert (self.state.phase is Phase.MIGRATING) == (self.state.shadow is not None)
        if isinstance(event, Routed) and self.state.phase is not Phase.ADMITTED:
            self.wanted = None
        self.perform(actions)
        if before.phase.is_final:
            assert all(isinstance(action, Send) and isinstance(action.command, Cancel) for action in actions)
        route = self.state.route
        if self.state.phase is Phase.DECODING and route is not None and route.prefill is not None:
            self.world.holders.pop(route.prefill, None)  # D released it when it joined

    def perform(self, actions: tuple[Action, ...]) -> None:
        for action in actions:
            match action:
                case NeedRoute():
                    self.wanted = action
                case Send(member=member, command=command):
                    self.world.take(member, command)
                case Emit(tokens=tokens):
                    assert not self.finishes, "tokens after the end"
                    assert tokens.index == len(self.emitted)
                    self.emitted += tokens.token_ids
                case Finish():
                    self.finishes.append(action)

    def member(self, name: str, number: int) -> Member:
        member = Member(WorkerId(f"{name}-{number}"), Incarnation(number))
        while member in self.lost:
            self.next_incarnation += 1
            member = Member(member.worker_id, Incarnation(self.next_incarnation))
        return member

    @initialize(num=st.integers(0, 12), moves=st.booleans(), num_after=st.sampled_from([1, 6, 8]))
    def get_going(self, num: int, moves: bool, num_after: int) -> None:
        """Most trouble begins later in a request's life."""
        self.route(0, 0, True)
        for _ in range(num):
            if self.num_heard < len(self.world.said):
                self.hear_next(1)
        if moves and self.state.phase is Phase.DECODING:
            self.move(6, num_after)

    @precondition(lambda self: self.wanted is not None and not self.finishes)
    @rule(prefill=st.sampled_from([None, 0, 1]), decode=st.sampled_from([0, 1]), obey=st.booleans())
    def route(self, prefill: int | None, decode: int, obey: bool) -> None:
        assert self.wanted is not None
        chosen = None if prefill is None else self.member("p", prefill)
        if obey and self.wanted.prefill is not None:
            chosen = self.wanted.prefill
        self.num_routes += 1
        self.feed(Routed(Route(prefill=chosen, decode=self.member("d", decode))))

    @precondition(lambda self: self.num_heard < len(self.world.said))
    @rule(num=st.integers(1, 6))
    def hear_next(self, num: int) -> None:
        """What was said, in order."""
        for _ in range(min(num, len(self.world.said) - self.num_heard)):
            self.num_heard += 1
            self.hear_from(*self.world.said[self.num_heard - 1])

    @precondition(lambda self: self.world.said)
    @rule(place=st.integers(0, 200))
    def hear_any(self, place: int) -> None:
        """Any message that was ever said: early, late or again."""
        self.hear_from(*self.world.said[-1 - place % len(self.world.said)])

    @precondition(lambda self: self.world.refusals)
    @rule(place=st.integers(0, 20), dice=st.integers(0, 3))
    def hear_refusal(self, place: int, dice: int) -> None:
        if dice == 0:
            self.hear_from(*self.world.refusals[-1 - place % len(self.world.refusals)])

    def hear_from(self, member: Member, message: object) -> None:
        if member in self.lost:
            return
        self.num_busy += isinstance(message, Nack) and message.reason is NackReason.BUSY
        self.feed(Heard(member, message))  # type: ignore[arg-type]
        is_last = isinstance(message, Nack) or (isinstance(message, Tokens) and message.finish_reason is not None)
        if is_last and self.world.holders.get(member) == message.attempt:  # type: ignore[attr-defined]
            del self.world.holders[member]  # by its own word
            route = self.state.route
            if isinstance(message, Tokens) and route is not None and member == route.decode and route.prefill:
                self.world.holders.pop(route.prefill, None)  # who decodes has joined, and released P when it did

    @rule(name=st.sampled_from("pd"), number=st.sampled_from([0, 1]), dice=st.integers(0, 2), for_good=st.booleans())
    def lose(self, name: str, number: int, dice: int, for_good: bool) -> None:
        if dice != 0:
            return
        member = self.member(name, number)
        self.lost.add(member)
        self.world.holders.pop(member, None)
        self.feed(Lost(member))
        if for_good:
            self.feed(Gone(member))

    @rule(name=st.sampled_from("pd"), number=st.sampled_from([0, 1]))
    def find_again(self, name: str, number: int) -> None:
        """A session begins; nothing but a suspicion can change."""
        before, member = self.state, self.member(name, number)
        self.feed(Returned(member))
        assert replace(self.state, missing=before.missing) == before
        assert self.state.missing == before.missing - {member}

    @precondition(lambda self: self.state.phase is Phase.DECODING)
    @rule(num_before=st.sampled_from([0, 1, 6, 6]), num_after=st.sampled_from([0, 1, 2, 6, 8]))
    def move(self, num_before: int, num_after: int) -> None:
        """The request is to change its decode worker; what is said then comes in its order, as far as it comes."""
        route, heard = self.state.route, len(self.world.said)
        assert route is not None
        number = 1 - int(route.decode.worker_id.removeprefix("d-"))
        self.feed(Moved(self.member("d", number)))
        self.num_moves += self.state.phase is Phase.MIGRATING
        heard = self.hear_from_place(heard, num_before)
        if self.state.shadow is not None:
            self.world.stop_behind(route.decode, self.state.shadow.attempt, len(self.emitted) - 1)
            self.hear_from_place(heard, num_after)

    def hear_from_place(self, place: int, num: int) -> int:
        """`num` messages from there on, those included that are said meanwhile; returns the place behind them."""
        end = place + num
        while place < min(end, len(self.world.said)):
            place += 1
            self.hear_from(*self.world.said[place - 1])
        return place

    @rule(number=st.sampled_from([0, 1]), dice=st.integers(0, 2))
    def evict(self, number: int, dice: int) -> None:
        """A decode worker drains: its request goes on elsewhere, and that costs no retry."""
        member, before = self.member("d", number), self.state
        if dice == 0 and member not in self.lost:
            is_decoding = before.phase in (Phase.DECODING, Phase.MIGRATING)
            self.num_evictions += is_decoding and before.route.decode == member  # type: ignore[union-attr]
            self.feed(Evicted(member))
            assert self.state.retries_left == before.retries_left

    @rule(phase=st.sampled_from([Phase.CANCELLED, Phase.FAILED, Phase.DONE]), dice=st.integers(0, 14))
    def stop(self, phase: Phase, dice: int) -> None:
        if dice == 14:
            self.feed(Stopped(phase))

    @invariant()
    def the_stream_is_the_stream(self) -> None:
        assert self.emitted == [token_at(index) for index in range(len(self.emitted))]
        assert self.state.output == tuple(self.emitted)

    @invariant()
    def a_request_ends_once(self) -> None:
        assert len(self.finishes) == int(self.state.phase.is_final)
        if self.finishes:
            assert self.finishes[0].phase is self.state.phase

    @invariant()
    def attempts_are_bounded(self) -> None:
        """One attempt at first and one per retry; a lease lost while no route is there costs no attempt.

        Who is evicted, or refused because a worker is busy, has failed at nothing.
        """
        num_free = self.num_evictions + self.num_busy
        assert self.state.newest_attempt <= 1 + MAX_RETRIES + num_free + self.num_moves
        assert self.num_routes <= 1 + MAX_RETRIES + num_free

    @invariant()
    def nobody_holds_what_was_given_up(self) -> None:
        """Who may hold something is on the current route, or was sent a Cancel, or is gone."""
        holders = set(self.world.holders)
        route = self.state.route
        if self.state.phase.is_final:
            assert holders == set()
        elif self.state.phase is Phase.ADMITTED:
            assert holders <= ({route.prefill} if self.state.ready and route is not None else set())
        else:
            assert route is not None
            shadow = self.state.shadow
            may_hold = {route.prefill: self.state.attempt, route.decode: self.state.attempt}
            if shadow is not None:
                may_hold[shadow.decode] = shadow.attempt
            assert self.world.holders.items() <= may_hold.items()

    @invariant()
    def a_request_without_a_route_has_asked_for_one(self) -> None:
        if not self.state.phase.is_final:
            assert (self.state.phase is Phase.ADMITTED) == (self.wanted is not None)

    @invariant()
    def no_hope_is_set_on_the_dead(self) -> None:
        route = self.state.route
        if self.wanted is not None and not self.finishes:
            assert self.wanted.prefill not in self.lost
        elif route is not None and not self.finishes:
            assert route.decode not in self.lost
            assert self.state.shadow is None or self.state.shadow.decode not in self.lost
            is_decoding = self.state.phase in (Phase.DECODING, Phase.MIGRATING)
            assert is_decoding or route.prefill not in self.lost

    def teardown(self) -> None:
        """From wherever it is, the request still ends well if nothing fails any more."""
        for _ in range(3):
            if self.wanted is not None and not self.finishes:
                prefill = self.wanted.prefill or self.member("p", 0)
                self.num_routes += 1
                self.feed(Routed(Route(prefill=prefill, decode=self.member("d", 1))))
            heard = 0
            while heard < len(self.world.said) and not self.finishes:
                heard += 1
                self.hear_from(*self.world.said[heard - 1])
        assert self.finishes
        if self.finishes[0].phase is Phase.DONE and len(self.emitted) != NUM_TOKENS:
            assert self.state.phase is Phase.DONE  # stopped from outside
        self.nobody_holds_what_was_given_up()
        self.the_stream_is_the_stream()


TestRequest = RequestMachine.TestCase
TestRequest.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)


def leased() -> tuple[RequestState, Member, Member, World]:
    """A request whose prefill is done and leased at `p`, reserved at nobody yet."""
    world = World()
    p, d = Member(WorkerId("p"), Incarnation(1)), Member(WorkerId("d"), Incarnation(2))
    state, actions = transition(RequestState(request=REQUEST), Routed(Route(prefill=p, decode=d)))
    for action in actions:
        assert isinstance(action, Send)
        world.take(action.member, action.command)
    for member, message in tuple(world.said):
        if isinstance(message, BlocksReady):
            state, _ = transition(state, Heard(member, message))
    assert state.phase is Phase.LEASED
    return state, p, d, world


def test_a_lost_decode_worker_costs_no_second_prefill() -> None:
    state, p, d, _ = leased()
    state, actions = transition(state, Lost(d))
    assert actions[-1] == NeedRoute(frozenset({d}), p)
    other = Member(WorkerId("d2"), Incarnation(3))
    state, actions = transition(state, Routed(Route(prefill=p, decode=other)))
    commands = [(action.member, action.command) for action in actions if isinstance(action, Send)]
    assert [type(command) for _, command in commands] == [Rebind, Reserve, BlocksReady, BlocksReady]
    assert all(command.attempt == 2 for _, command in commands)  # type: ignore[union-attr]
    reserve = commands[1][1]
    assert isinstance(reserve, Reserve)
    assert reserve.request.output_token_ids == ()
    last = commands[-1][1]
    assert isinstance(last, BlocksReady)
    assert last.first_token == msgspec.structs.replace(tokens_of(1, 0), attempt=2)


def three_lost() -> tuple[RequestState, Member, list[Member]]:
    """Three decode workers were lost one after the other; `p` keeps the finished work."""
    state, p, d, _ = leased()
    lost = [d]
    state, _ = transition(state, Lost(d))
    while len(lost) < POISON_LIMIT:
        assert not state.is_suspect
        lost.append(Member(WorkerId(f"d{len(lost)}"), Incarnation(10 + len(lost))))
        state, _ = transition(state, Routed(Route(prefill=p, decode=lost[-1])))
        state, _ = transition(state, Lost(lost[-1]))
    return state, p, lost


def test_dead_workers_one_after_the_other_end_a_request_that_may_be_poison() -> None:
    state, p, lost = three_lost()
    for member in lost:
        assert state.phase is Phase.ADMITTED
        assert state.is_suspect
        state, actions = transition(state, Gone(member))
    assert state.phase is Phase.FAILED
    assert Send(p, Cancel(request_id=REQUEST_ID, attempt=POISON_LIMIT)) in actions
    (finish,) = [action for action in actions if isinstance(action, Finish)]
    assert finish.is_poison


def test_a_suspect_goes_on_as_soon_as_one_of_the_lost_turns_out_to_live() -> None:
    state, _, lost = three_lost()
    state, _ = transition(state, Gone(lost[0]))
    state, actions = transition(state, Returned(lost[1]))
    assert actions == ()
    assert not state.is_suspect
    state, _ = transition(state, Gone(lost[1]))  # in its own time, not over this request
    state, _ = transition(state, Gone(lost[2]))
    assert state.phase is Phase.ADMITTED
    assert state.dead == {lost[0], lost[2]}


def test_dead_workers_are_not_held_against_a_request_that_goes_on_in_between() -> None:
    state, p, d, _ = leased()
    for number in range(2, 2 + MAX_RETRIES):
        state, _ = transition(state, Lost(d))
        d = Member(WorkerId(f"d{number}"), Incarnation(number))
        state, _ = transition(state, Routed(Route(prefill=p, decode=d)))
        state, _ = transition(state, Heard(d, tokens_of(state.attempt, len(state.output))))
    assert state.phase is Phase.DECODING
    state, _ = transition(state, Lost(d))
    assert state.phase is Phase.FAILED  # the retries are used up


def test_a_worker_that_comes_back_had_not_died() -> None:
    state, p, d, _ = leased()
    for _ in range(MAX_RETRIES):
        state, _ = transition(state, Lost(d))
        state, actions = transition(state, Returned(d))
        assert actions == ()
        state, _ = transition(state, Routed(Route(prefill=p, decode=d)))
    state, actions = transition(state, Lost(d))
    assert actions[-1] == Finish(Phase.FAILED, "worker d was lost and no retries are left")


def test_a_successor_does_not_speak_for_the_worker_that_died() -> None:
    state, _, d, _ = leased()
    state, _ = transition(state, Lost(d))
    state, _ = transition(state, Returned(replace(d, incarnation=Incarnation(9))))
    assert state.missing == {d}


def test_workers_that_only_keep_room_or_blocks_may_die_without_making_the_request_suspect() -> None:
    state, p, d, _ = leased()
    state, _ = transition(state, Lost(p))
    assert not state.missing
    other = Member(WorkerId("p2"), Incarnation(3))
    state, _ = transition(state, Routed(Route(prefill=other, decode=d)))
    state, _ = transition(state, Lost(d))
    assert (state.missing, state.phase) == (frozenset(), Phase.ADMITTED)


def without_decode_worker() -> tuple[RequestState, Member]:
    """Back without a route, while `p` still keeps the finished work."""
    state, p, d, _ = leased()
    state, _ = transition(state, Lost(d))
    assert state.phase is Phase.ADMITTED
    return state, p


def test_a_lease_is_cancelled_when_the_request_ends_without_a_route() -> None:
    state, p = without_decode_worker()
    state, actions = transition(state, Stopped(Phase.CANCELLED))
    assert actions == (Send(p, Cancel(request_id=REQUEST_ID, attempt=1)), Finish(Phase.CANCELLED))


def test_a_lease_is_cancelled_when_the_next_route_does_without_it() -> None:
    state, p = without_decode_worker()
    other = Member(WorkerId("p2"), Incarnation(4))
    state, actions = transition(state, Routed(Route(prefill=other, decode=Member(WorkerId("d2"), Incarnation(3)))))
    assert actions[0] == Send(p, Cancel(request_id=REQUEST_ID, attempt=1))
    assert [type(action.command) for action in actions if isinstance(action, Send)] == [Cancel, Prefill, Reserve]


def test_a_lost_lease_asks_for_a_whole_route_again() -> None:
    state, p = without_decode_worker()
    state, actions = transition(state, Lost(p))
    assert [type(action) for action in actions] == [NeedRoute]
    assert isinstance(actions[0], NeedRoute)
    assert actions[0].prefill is None
    assert p in actions[0].excluded


def test_a_prefill_worker_cannot_refuse_what_is_decoding() -> None:
    state, p, d, world = leased()
    joined = Joined(request_id=REQUEST_ID, attempt=1, num_pulled_blocks=4, num_pulled_bytes=4, transfer_s=0.0)
    state, _ = transition(state, Heard(d, joined))
    for member, nack in world.refusals:
        if member == p:
            assert transition(state, Heard(p, nack)) == (state, ())


def unknown(attempt: int) -> Nack:
    return Nack(request_id=REQUEST_ID, attempt=attempt, reason=NackReason.UNKNOWN)


def test_a_worker_that_does_not_have_the_request_is_left_for_another() -> None:
    p, d = Member(WorkerId("p"), Incarnation(1)), Member(WorkerId("d"), Incarnation(2))
    state, _ = transition(RequestState(request=REQUEST), Routed(Route(prefill=p, decode=d)))
    for member in (p, d):
        assert state.attempt_on(member) == 1
        after, actions = transition(state, Heard(member, unknown(1)))
        assert actions[-1] == NeedRoute(frozenset({member}))
        assert after.retries_left == MAX_RETRIES - 1
        assert after.attempt_on(member) is None


def test_the_leased_work_outlives_a_decode_worker_that_does_not_have_the_request() -> None:
    state, p, d, _ = leased()
    _, actions = transition(state, Heard(d, unknown(1)))
    assert actions[-1] == NeedRoute(frozenset({d}), p)


def test_a_prefill_worker_need_not_have_what_was_taken_from_it() -> None:
    """It was asked before its last word came, and its lease is over since."""
    state, p, _, _ = leased()
    assert state.attempt_on(p) is None
    assert transition(state, Heard(p, unknown(1))) == (state, ())


def test_a_gap_in_the_tokens_is_a_new_attempt() -> None:
    """The worker will not say again what the wire lost: to wait for it would be to wait for ever."""
    state, p, d, _ = leased()
    state, actions = transition(state, Heard(d, tokens_of(1, 2)))
    assert actions == (
        Send(d, Cancel(request_id=REQUEST_ID, attempt=1)),
        Send(p, Cancel(request_id=REQUEST_ID, attempt=1)),
        NeedRoute(frozenset()),
    )
    assert state.output == (token_at(0),)
    assert state.retries_left == MAX_RETRIES - 1


def test_a_gap_in_the_listed_blocks_is_a_new_attempt() -> None:
    world = World()
    p, d = Member(WorkerId("p"), Incarnation(1)), Member(WorkerId("d"), Incarnation(2))
    state, actions = transition(RequestState(request=REQUEST, retries_left=0), Routed(Route(prefill=p, decode=d)))
    for action in actions:
        assert isinstance(action, Send)
        world.take(action.member, action.command)
    late = [message for _, message in world.said if isinstance(message, BlocksReady)][1]
    retrying, actions = transition(replace(state, retries_left=1), Heard(p, late))
    assert retrying.phase is Phase.ADMITTED
    assert isinstance(actions[-1], NeedRoute)
    state, actions = transition(state, Heard(p, late))
    assert state.phase is Phase.FAILED
    assert isinstance(actions[-1], Finish)
