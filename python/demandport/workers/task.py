"""One piece of work of a pool, between the coroutine that waits for it and the worker that does it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from demandport.errors import DemandportError

#: What the worker says on the way is acknowledged at least this often, so that it need not stop.
_TAKEN_AT_LEAST = 8

Take = Callable[[Any], Awaitable[None]]


class Task:
    """A task of a pool. It ends once, with a result or an error; what comes later is dropped.

    Attributes:
        id: its number, never used again by its pool.
        data: the frame that gives it to a worker, until it has been given.
        ended: its outcome is there.
    """

    __slots__ = ("_error", "_inbox", "_result", "_wake", "data", "ended", "id")

    def __init__(self, id: int, data: bytes) -> None:
        self.id, self.data = id, data
        self.ended = False
        self._result: Any = None
        self._error: DemandportError | None = None
        self._inbox: deque[Any] = deque()
        self._wake: asyncio.Future[None] | None = None

    def accept(self, said: Any) -> None:
        """The worker said something on the way. How much may stand here, the worker's window bounds."""
        self._inbox.append(said)
        self._look()

    def finish(self, result: Any) -> None:
        """End with a result."""
        if not self.ended:
            self.ended, self._result = True, result
            self._look()

    def fail(self, error: DemandportError) -> None:
        """End with an error."""
        if not self.ended:
            self.ended, self._error = True, error
            self._look()

    async def follow(self, take: Take, taken: Callable[[int], None]) -> Any:
        """Hand what the worker says to `take`, one after the other, and return the result.

        Args:
            take: may wait; meanwhile the worker stops once its window is full.
            taken: told how many have been taken since it was told last.

        Raises:
            DemandportError: the task's error, after all that was said before it.
        """
        count = 0
        while True:
            while self._inbox:
                await take(self._inbox.popleft())
                count += 1
                if not self._inbox or count == _TAKEN_AT_LEAST:
                    taken(count)
                    count = 0
            if self._error is not None:
                raise self._error
            if self.ended:
                return self._result
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake

    def _look(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)
