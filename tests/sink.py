"""What hears a demand in tests that run the engine in process."""

from __future__ import annotations

from typing import Any

import anyio

from demandport.engine.demand import Demand
from demandport.errors import DemandportError

TIMEOUT_S = 20


class Sink:
    """Hears one demand.

    Args:
        has_room: until it is set, producers of values are told to wait; None: never.
    """

    demand: Demand

    def __init__(self, has_room: anyio.Event | None = None) -> None:
        self.done = anyio.Event()
        self.outputs: dict[str, Any] = {}
        self.meta: dict[str, Any] = {}
        self.failure: DemandportError | None = None
        self.chunks: list[tuple[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.asked_for_room = anyio.Event()
        self.asked_for_input = anyio.Event()
        self._has_room = has_room

    def chunk(self, node: str, port: str, value: Any) -> None:
        self.chunks.append((port, value))

    def full(self) -> bool:
        return self._has_room is not None and not self._has_room.is_set()

    async def room(self) -> None:
        assert self._has_room
        self.asked_for_room.set()
        await self._has_room.wait()

    def event(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        if event["event"] == "waiting_for_input":
            self.asked_for_input.set()

    def complete(self, outputs: dict[str, Any], meta: dict[str, Any]) -> None:
        self.outputs, self.meta = outputs, meta
        self.done.set()

    def error(self, error: DemandportError, meta: dict[str, Any]) -> None:
        self.failure = error
        self.done.set()

    async def result(self) -> dict[str, Any]:
        with anyio.fail_after(TIMEOUT_S):
            await self.done.wait()
        if self.failure:
            raise self.failure
        return self.outputs
