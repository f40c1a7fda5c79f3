"""The bounded pool of threads for nodes that block. A place in it is charged until the function really returns."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any

from demandport.errors import QueueFull

MAX_QUEUED = 1000


class Threads:
    """Cores x 4 threads, at most 64, and `MAX_QUEUED` functions that wait for one."""

    def __init__(self, size: int | None = None, max_queued: int = MAX_QUEUED) -> None:
        self.size = size or min(64, 4 * (os.cpu_count() or 1))
        self.max_queued = max_queued
        self.in_flight = 0
        self._pool: ThreadPoolExecutor | None = None
        self._lock = Lock()

    def submit(self, function: Callable[[], Any]) -> Future[Any]:
        """Run `function` in a thread.

        Raises:
            QueueFull: as many wait already as may.
        """
        with self._lock:
            if self.in_flight >= self.size + self.max_queued:
                raise QueueFull(f"the pool 'threads' has {self.size} running and {self.max_queued} waiting; try later")
            self.in_flight += 1
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self.size, thread_name_prefix="node")
        future = self._pool.submit(function)
        future.add_done_callback(self._release)
        return future

    def health(self) -> dict[str, Any]:
        """Size and load, as `health` reports it."""
        return {"size": self.size, "in_flight": self.in_flight, "max_queued": self.max_queued}

    def _release(self, _: Future[Any]) -> None:
        with self._lock:
            self.in_flight -= 1
