"""What a carrier has to say goes to the lives of its choices: its route, its workers' messages, their first tokens.

A choice is carried until the decode worker has its prompt, or until it has ended before. If a carrier loses what was
computed when first tokens are out, the outputs differ already: it sets its choices down, and each goes on by itself
from the token that it has. A carrier with nobody to carry ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from duopool.core.errors import DuopoolError
from duopool.core.handoff.request import Phase, RequestState
from duopool.core.messages import Tokens
from duopool.core.types import RequestId
from duopool.router.pools import RequestMessage
from duopool.router.request_life import RequestLife
from duopool.router.route_search import pinned_prefill
from duopool.router.watch import RequestRecord


class Choices:
    """The audience of a carrier. Implements `request_life.Audience`."""

    def __init__(self, lives: Sequence[RequestLife]) -> None:
        self.error: DuopoolError | None = None
        self._lives: Mapping[RequestId, RequestLife] = {life.request_id: life for life in lives}
        self._has_tokens = False

    @property
    def carried(self) -> list[RequestLife]:
        return [life for life in self._lives.values() if life.is_carried]

    def begin(self, output: tuple[int, ...]) -> bool:
        return False

    def seeks(self, state: RequestState) -> None:
        if self._has_tokens and pinned_prefill(state) is None:
            for life in self.carried:
                life.set_down(state)

    def routed(self, state: RequestState) -> None:
        for life in self.carried:
            life.carry(state)

    def note(self, state: RequestState, message: RequestMessage) -> None:
        for life in self.carried:
            life.note(message)

    def decodes(self) -> None:
        """A carrier never does."""

    def show(self, state: RequestState, tokens: Tokens) -> bool:
        self._has_tokens = True
        if state.route is not None and state.route.prefill is not None:
            self._lives[tokens.request_id].hear(state.route.prefill, tokens)
        return False

    def end(self, state: RequestState, phase: Phase, error: DuopoolError | None) -> None:
        if phase is not Phase.DONE:
            for life in self.carried:
                life.stop(phase, error)

    def record(self, state: RequestState, error: DuopoolError | None) -> RequestRecord:
        """The first choice's, as far as it goes for all."""
        one = next(iter(self._lives.values())).record()
        return replace(one, request_id=state.request.request_id, phase=state.phase, num_output_tokens=0)


def carrier_of(lives: Sequence[RequestLife], make: Callable[[Choices], RequestLife]) -> RequestLife:
    """The life that carries these; `make` gives it its audience."""
    choices = Choices(lives)
    carrier = make(choices)

    def parted() -> None:
        if not choices.carried:
            carrier.stop(Phase.DONE)

    for life in lives:
        life.on_parted = parted
    return carrier
