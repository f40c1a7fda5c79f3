"""A demand: one request to evaluate a node, from start to its one outcome."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Protocol

from demandport.engine.cell import SKIPPED, Cell
from demandport.errors import DemandportError


class Sink(Protocol):
    """Where a demand's news go. The service writes them to the wire, the command line to the terminal."""

    def chunk(self, node: str, port: str, value: Any) -> None:
        """A node streamed something. Never blocks."""

    def full(self) -> bool:
        """Producers should wait: of anything but text always, of text where they can."""

    async def room(self) -> None:
        """Return once `full` may have become false."""

    def event(self, event: dict[str, Any]) -> None:
        """Something happened; only for demands that asked for events."""

    def complete(self, outputs: dict[str, Any], meta: dict[str, Any]) -> None:
        """The one terminal: it went well."""

    def error(self, error: DemandportError, meta: dict[str, Any]) -> None:
        """The one terminal: it did not."""


def cached_meta(cell: Cell) -> dict[str, Any]:
    """The `meta` of a demand that is answered from the cache at once."""
    meta: dict[str, Any] = {"duration_us": 0, "ran": 0, "cached": 1}
    if cell.state == SKIPPED:
        meta["skipped"] = True
    return meta


class Awaited:
    """A sink that keeps the outcome for who awaits it, and lets what streams pass.

    Args:
        on_event: gets the demand's events.
    """

    def __init__(self, on_event: Callable[[dict[str, Any]], None] | None = None) -> None:
        self.outcome: asyncio.Future[tuple[dict[str, Any], dict[str, Any]]]
        self.outcome = asyncio.get_running_loop().create_future()
        self._on_event = on_event

    def chunk(self, node: str, port: str, value: Any) -> None:
        """Let it pass."""

    def full(self) -> bool:
        return False

    async def room(self) -> None:
        return

    def event(self, event: dict[str, Any]) -> None:
        if self._on_event is not None:
            self._on_event(event)

    def complete(self, outputs: dict[str, Any], meta: dict[str, Any]) -> None:
        if not self.outcome.done():
            self.outcome.set_result((outputs, meta))

    def error(self, error: DemandportError, meta: dict[str, Any]) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(error)


class Demand:
    """What the engine knows of one demand.

    Attributes:
        cell: the demanded node as it stood when the demand was made.
        deadline: on the clock of `time.monotonic`, or None. priority: -100 to 100; higher comes first.
        running_from: when it got its place: at `started`, or later where it waited; None while it waits.
        label: what the session's events call it. failure: what it ended with, if that was an error.
        ran, cached: nodes evaluated for it, and results taken from the cache.
    """

    __slots__ = (
        "_leave",
        "_on_end",
        "_seq",
        "cached",
        "cell",
        "deadline",
        "ended",
        "events",
        "failure",
        "label",
        "listening",
        "priority",
        "ran",
        "running_from",
        "sink",
        "started",
        "usage",
    )

    def __init__(
        self,
        cell: Cell,
        sink: Sink,
        on_end: Callable[[Demand], None],
        started: float,
        deadline: float | None = None,
        events: bool = False,
        priority: int = 0,
        leave: Callable[[Demand], None] | None = None,
        label: Any = None,
    ) -> None:
        self.cell = cell
        self.sink = sink
        self.deadline = deadline
        self.events = events
        self.priority = priority
        self.label = label
        self.failure: DemandportError | None = None
        self.started = started
        self.running_from: float | None = started
        self.ended = False
        self.listening: list[Cell] = []
        self.ran = 0
        self.cached = 0
        self.usage: dict[str, Any] | None = None
        self._on_end, self._leave = on_end, leave
        self._seq = 0

    def complete(self, cell: Cell) -> None:
        """End with the outcome of `cell`."""
        if self._end():
            self.sink.complete(dict(cell.outputs), self._meta(skipped=cell.state == SKIPPED))
            self._after_end()

    def fail(self, error: DemandportError) -> None:
        """End with an error."""
        if self._end():
            self.failure = error
            self.sink.error(error, self._meta())
            self._after_end()

    def event(self, event: str, node: str, fields: dict[str, Any] | None = None) -> None:
        """Report an event, if the demand asked for them."""
        if self.events and not self.ended:
            at = {"event": event, "node": node, "seq": self._seq, "time_us": time.time_ns() // 1000}
            self._seq += 1
            self.sink.event({**(fields or {}), **at})

    def _end(self) -> bool:
        if self.ended:
            return False
        self.ended = True
        for cell in self.listening:
            cell.listeners.pop(self, None)
        self.listening.clear()
        return True

    def _after_end(self) -> None:
        """The outcome is delivered; now its place is given free, where it had one."""
        self._on_end(self)
        if self._leave is not None:
            self._leave(self)

    def _meta(self, skipped: bool = False) -> dict[str, Any]:
        now = time.monotonic()
        meta: dict[str, Any] = {
            "duration_us": int((now - self.started) * 1e6),
            "ran": self.ran,
            "cached": self.cached,
        }
        if self.running_from != self.started:
            until = now if self.running_from is None else self.running_from
            meta["queued_us"] = int((until - self.started) * 1e6)
        if skipped:
            meta["skipped"] = True
        if self.usage:
            meta["usage"] = self.usage
        return meta
