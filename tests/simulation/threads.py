"""A worker's step thread in virtual time: a greenlet, so that a step can take time while everything else goes on."""

from __future__ import annotations

from collections.abc import Callable

import greenlet

from .virtual_time import Process


class StepThread:
    """Runs turn after turn of a step loop. `pause`, called from within a step, lets time pass."""

    def __init__(self, process: Process, turn: Callable[[], float], *, on_fatal: Callable[[Exception], None]) -> None:
        self._process = process
        self._turn = turn
        self._on_fatal = on_fatal
        self._is_awake = False
        self._num_waits = 0
        """Names the wait under way: an earlier one's alarm is not for it."""
        self._is_idle = False
        self._greenlet = greenlet.greenlet(self._run)
        process.threads.append(self)

    def start(self) -> None:
        self._process.plan(0.0, self._greenlet.switch)

    def wake(self) -> None:
        self._is_awake = True
        if self._is_idle:
            self._is_idle = False
            self._alarm(0.0)

    def pause(self, for_s: float) -> None:
        """Let time pass in the middle of a step."""
        self._alarm(for_s)
        self._greenlet.parent.switch()

    def kill(self) -> None:
        """End it wherever it is."""
        if self._greenlet:
            self._greenlet.throw(greenlet.GreenletExit)

    def _run(self) -> None:
        while True:
            self._is_awake = False
            try:
                wait_s = self._turn()
            except Exception as error:
                self._on_fatal(error)
                return
            if wait_s and not self._is_awake:
                self._is_idle = True
                self._alarm(wait_s)
                self._greenlet.parent.switch()
                self._is_idle = False

    def _alarm(self, after_s: float) -> None:
        self._num_waits += 1
        number = self._num_waits

        def ring() -> None:
            if number == self._num_waits and self._greenlet:
                self._greenlet.switch()

        self._process.plan(after_s, ring)
