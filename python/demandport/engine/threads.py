"""The bounded pool of threads for nodes that block. A place in it is charged until the function really returns."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any

from demandport.errors import QueueFull

MAX_QUEUED = 1000
Function = Callable[[], Any]


class Threads:
    """Cores x 4 threads, at most 64, and `MAX_QUEUED` functions that wait for one.

    What waits stands here and not in the executor, so that one that is cancelled leaves nothing behind.

    Attributes:
        in_flight: functions that wait or run, those included that nobody waits for any more.
    """

    def __init__(self, size: int | None = None, max_queued: int = MAX_QUEUED) -> None:
        self.size = size or min(64, 4 * (os.cpu_count() or 1))
        self.max_queued = max_queued
        self.in_flight = 0
        self._waiting: OrderedDict[Future[Any], Function] = OrderedDict()
        self._working = 0
        self._pool: ThreadPoolExecutor | None = None
        self._lock = Lock()

    def submit(self, function: Function) -> Future[Any]:
        """Run `function` in a thread. Cancelling the future takes it out of the queue, if it still waits.

        Raises:
            QueueFull: as many wait already as may.
        """
        future: Future[Any] = Future()
        with self._lock:
            if self.in_flight >= self.size + self.max_queued:
                raise QueueFull(f"the pool 'threads' has {self.size} running and {self.max_queued} waiting; try later")
            self.in_flight += 1
            self._waiting[future] = function
            if self._working < self.size:
                self._working += 1
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(self.size, thread_name_prefix="node")
                self._pool.submit(self._work)
        future.add_done_callback(self._forget)
        return future

    def health(self) -> dict[str, Any]:
        """Size and load, as `health` reports it."""
        in_flight = self.in_flight
        return {
            "size": self.size,
            "in_flight": min(in_flight, self.size),
            "queued": max(0, in_flight - self.size),
            "max_queued": self.max_queued,
        }

    def _work(self) -> None:
        """On a thread: run what waits."""
        while (job := self._next()) is not None:
            future, function = job
            wanted = future.set_running_or_notify_cancel()
            result, raised = _outcome(function) if wanted else (None, None)
            with self._lock:
                self.in_flight -= 1  # before anybody hears that it has ended
            if raised is not None:
                future.set_exception(raised)
            elif wanted:
                future.set_result(result)
            # A traceback holds this frame, and this frame must not hold what holds the traceback.
            del job, future, function, result, raised

    def _next(self) -> tuple[Future[Any], Function] | None:
        with self._lock:
            if self._waiting:
                return self._waiting.popitem(last=False)
            self._working -= 1
            return None

    def _forget(self, future: Future[Any]) -> None:
        """It is done; perhaps it was cancelled while it waited."""
        with self._lock:
            if self._waiting.pop(future, None) is not None:
                self.in_flight -= 1


def _outcome(function: Function) -> tuple[Any, BaseException | None]:
    try:
        return function(), None
    except BaseException as raised:  # the waiter's business, whatever it is
        return None, raised
