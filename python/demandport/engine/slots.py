"""Slots: how many there are of one kind of thing, against a limit."""

from __future__ import annotations

import asyncio

from demandport.errors import QueueFull


class Slots:
    """Counts what is open of one kind (sessions, demands, calls of the host). Belongs to the event loop.

    Args:
        name: what is counted, in the plural, as messages and `report` call it.
        limit: most of them at a time.
    """

    __slots__ = ("_empty", "limit", "most", "name", "open", "taken")

    def __init__(self, name: str, limit: int) -> None:
        self.name, self.limit = name, limit
        self.open = 0
        #: Most that were open at a time, and how many have been in all.
        self.most = self.taken = 0
        self._empty: list[asyncio.Future[None]] = []

    def take(self) -> None:
        """One more is open.

        Raises:
            QueueFull: as many are open as may be.
        """
        if self.open >= self.limit:
            raise self.refusal()
        self.enter()

    def enter(self) -> None:
        """One more is open, be there room or not: what is refused is there until it is told so."""
        self.open += 1
        self.taken += 1
        if self.open > self.most:
            self.most = self.open

    def passed(self) -> None:
        """One came and went at once."""
        self.taken += 1

    def refusal(self) -> QueueFull:
        """What to raise where `open` is over `limit`."""
        return QueueFull(f"{self.limit} {self.name} are open, which is the most there may be; try later")

    def release(self) -> None:
        """One of them is over."""
        self.open -= 1
        if self._empty and not self.open:
            for waiter in self._empty:
                if not waiter.done():
                    waiter.set_result(None)
            self._empty.clear()

    async def empty(self) -> None:
        """Return once none is open."""
        if self.open:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._empty.append(waiter)
            await waiter

    def report(self) -> dict[str, int]:
        """The counts, as `health` reports them."""
        return {"open": self.open, "most": self.most, "ended": self.taken - self.open, "limit": self.limit}
