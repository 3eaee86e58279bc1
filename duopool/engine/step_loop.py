"""Runs a worker's steps on a thread of their own: step while there is work, rest in between as long as the worker asks
to, else wait to be woken; timers in between.

Owns the thread and its clock. A failing step is fatal: what the worker has to say about it is flushed, then the owner
of the process is told.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable

from duopool.core.worker import Worker

log = logging.getLogger(__name__)

TICK_S = 0.1


class StepLoop:
    """`start`, `wake` whenever there may be work, `stop`."""

    def __init__(
        self,
        worker: Worker,
        *,
        flush: Callable[[], None],
        on_fatal: Callable[[Exception], None],
        clock: Callable[[], float] = time.monotonic,
        niceness: int = 0,
    ) -> None:
        """`flush` sends the worker's events on their way; `on_fatal` hears why the loop has ended by itself.

        `niceness` is added to the process's own for the steps and the threads they start, not for the rest of it.
        """
        self._worker = worker
        self._flush = flush
        self._on_fatal = on_fatal
        self._clock = clock
        self._niceness = niceness
        self._next_tick = clock()
        self._next_step = clock()
        self._awake = threading.Event()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="duopool-steps", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """There may be something to do. Any thread; never waits."""
        self._awake.set()

    def stop(self, *, timeout_s: float = 10.0) -> None:
        """End after the step that runs now."""
        self._is_stopping = True
        self.wake()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def turn(self) -> float:
        """Tick if it is time, take a step if there is work and no rest; seconds until the next turn unless woken."""
        now = self._clock()
        if now >= self._next_tick:
            self._worker.tick(now=now)
            self._next_tick = now + TICK_S
        is_resting = now < self._next_step
        has_run = not is_resting and self._worker.step(now=now)
        self._flush()
        if has_run:
            self._next_step = self._clock() + self._worker.rest_s
        due = min(self._next_tick, self._next_step) if has_run or is_resting else self._next_tick
        return max(0.0, due - self._clock())

    def _run(self) -> None:
        if self._niceness:
            # Behind what the process has already: Ray may have niced it, and only root may take that back.
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + self._niceness)
        while not self._is_stopping:
            self._awake.clear()
            try:
                wait_s = self.turn()
            except Exception as error:
                log.exception("a step failed")
                self._flush()
                self._on_fatal(error)
                return
            if wait_s:
                self._awake.wait(wait_s)
