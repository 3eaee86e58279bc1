"""Virtual time: everything that will happen, in one queue, and processes that live in it.

A process is an asyncio event loop with a clock of its own. It can die (nothing of it ever runs again, no `finally`
either), stand still (what is due waits until it goes on) and have its clock jump. Ties are broken by the order in which
things were planned, so one seed gives one history.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Coroutine
from itertools import count
from typing import Any


class VirtualTime:
    """The queue of all that is planned, and the one clock behind all clocks."""

    def __init__(self) -> None:
        self.now = 0.0
        self.failures: list[str] = []
        """Errors that nobody caught, in any process."""
        self.is_over = False
        """The run has ended: processes are only taken down any more, and nothing that they do counts."""
        self._queue: list[tuple[float, int, Process | None, Callable[[], None], asyncio.TimerHandle | None]] = []
        self._order = count()
        self._processes: list[Process] = []

    def process(self, place: str) -> Process:
        process = Process(self, place)
        self._processes.append(process)
        return process

    def at(
        self,
        when: float,
        work: Callable[[], None],
        *,
        process: Process | None = None,
        timer: asyncio.TimerHandle | None = None,
    ) -> None:
        """Plan work; as part of a process it shares that process's fate."""
        heapq.heappush(self._queue, (max(when, self.now), next(self._order), process, work, timer))

    def run(self, until: float, stop: Callable[[], bool] = lambda: False) -> bool:
        """Let things happen until `stop` says so (True) or `until` has come (False)."""
        queue = self._queue
        while queue:
            if queue[0][0] > until:
                break
            when, order, process, work, timer = heapq.heappop(queue)
            self.now = when
            if process is not None:
                if not process.is_alive:
                    continue
                if process.still_until > when:
                    heapq.heappush(queue, (process.still_until, order, process, work, timer))
                    continue
            work()
            if stop():
                return True
        else:
            self.now = max(self.now, until)
        return False

    def jump(self, process: Process, by_s: float) -> None:
        """Set a process's clock forward: its timers come so much earlier."""
        process.clock_offset += by_s
        self._queue[:] = [
            (max(self.now, when - by_s), order, owner, work, timer)
            if owner is process and timer is not None
            else (when, order, owner, work, timer)
            for when, order, owner, work, timer in self._queue
        ]
        heapq.heapify(self._queue)

    def close(self) -> None:
        """Take all processes down in good order, the dead ones too, so that nothing is left pending."""
        self.is_over = True
        for process in self._processes:
            process.is_alive, process.still_until = True, 0.0
            process.end_threads()
        for _ in range(8):
            tasks = [task for process in self._processes for task in process.loop.tasks if not task.done()]
            if not tasks:
                break
            for task in tasks:
                task.cancel()
            self.run(self.now + 5.0)
        self._queue.clear()


class Process:
    """One life of a program at a place; `loop` is its event loop."""

    def __init__(self, time: VirtualTime, place: str) -> None:
        self.time = time
        self.place = place
        self.is_alive = True
        self.still_until = 0.0
        self.clock_offset = 0.0
        self.loop = ProcessLoop(self)
        self.on_death: list[Callable[[bool], None]] = []
        """Told how it died: whether its host's kernel could still say goodbye to its peers."""
        self.threads: list[Any] = []

    def clock(self) -> float:
        return self.time.now + self.clock_offset

    def start(self, work: Callable[[], Any]) -> None:
        """Run a function on the event loop."""
        self.loop.call_soon(work)

    def plan(self, delay_s: float, work: Callable[[], None]) -> None:
        """Something that happens to the process from outside, such as an arriving message."""
        self.time.at(self.time.now + delay_s, work, process=self)

    def die(self, *, says_goodbye: bool) -> None:
        if self.is_alive:
            self.is_alive = False
            for tell in self.on_death:
                tell(says_goodbye)

    def stand_still(self, for_s: float) -> None:
        self.still_until = max(self.still_until, self.time.now + for_s)

    def end_threads(self) -> None:
        for thread in self.threads:
            thread.kill()


class ProcessLoop(asyncio.AbstractEventLoop):
    """What asyncio's tasks, futures and timers need of a loop, over virtual time."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._time = process.time
        self.tasks: list[asyncio.Task[Any]] = []

    def time(self) -> float:
        return self._process.clock()

    def call_soon(self, callback: Callable[..., Any], *args: Any, context: Any = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._time.at(self._time.now, lambda: self._run(handle), process=self._process)
        return handle

    call_soon_threadsafe = call_soon

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any, context: Any = None) -> Any:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(self, when: float, callback: Callable[..., Any], *args: Any, context: Any = None) -> Any:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        due = when - self._process.clock_offset
        self._time.at(due, lambda: self._run(timer), process=self._process, timer=timer)
        return timer

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Coroutine[Any, Any, Any], *, name: Any = None, context: Any = None) -> Any:
        task = asyncio.Task(coro, loop=self, name=name, context=context)
        self.tasks.append(task)  # a task of a dead process must not be collected at some moment of its own
        return task

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        future = self.create_future()
        future.set_result(func(*args))
        return future

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if not self._time.is_over:
            self._time.failures.append(f"{self._process.place}: {context.get('message')}: {context.get('exception')!r}")

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        pass  # it stays in the queue and does nothing when its time comes

    def _run(self, handle: asyncio.Handle) -> None:
        if not handle.cancelled():
            asyncio._set_running_loop(self)
            try:
                handle._run()
            finally:
                asyncio._set_running_loop(None)
