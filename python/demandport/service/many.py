"""One demand for many nodes: `demand_many`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from demandport.engine.cell import Cell
from demandport.engine.fanout import FanOut, fan_out
from demandport.engine.session import Session
from demandport.errors import DeadlineExceeded, DemandportError, Internal
from demandport.service.streams import Out
from demandport.wire.messages import DemandMany

log = logging.getLogger(__name__)


class ManySink:
    """Demands on several nodes with one terminal. They stream nothing; each is a demand of the session's timeline.

    Its terminal goes out as it ends, however it does; what still runs is cancelled then.
    """

    def __init__(self, out: Out, message: DemandMany) -> None:
        self.id, self.session = message.id, message.session
        self._out, self._nodes, self._options = out, message.nodes, message.options
        self._started = time.monotonic()
        self._launched: set[int] = set()
        self._events = 0
        self._ended = False
        self._task: asyncio.Task[Any] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, session: Session, run: Callable[..., Any]) -> None:
        """Evaluate the nodes as the graph of `session` stands now.

        Args:
            run: starts a coroutine function, with arguments, in the task group that owns it.

        Raises:
            UnknownNode: the graph lacks one of the nodes.
        """
        cells = [session.at(node) for node in self._nodes]
        limit_ms = self._options.deadline_ms
        if limit_ms is not None:
            late = DeadlineExceeded(f"the demand was not done within its {limit_ms} ms")
            self._timer = asyncio.get_running_loop().call_later(limit_ms / 1000, self.give_up, late)
        run(self._run, session, cells)

    def grant(self, n: int) -> None:
        """It has no stream that would need credit."""

    def give_up(self, error: DemandportError) -> bool:
        """End it with `error` now, and cancel what runs for it. False when it has ended."""
        if self._ended:
            return False
        self._end(["demand_error", self._nodes, error.to_wire(), self.id, self._meta({})])
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
        return True

    async def _run(self, session: Session, cells: list[Cell]) -> None:
        self._task = asyncio.current_task()
        if self._ended:
            return
        options = self._options

        async def evaluate(number: int) -> tuple[dict[str, Any], dict[str, Any]]:
            self._launched.add(number)
            return await session.outcome(
                cells[number],
                priority=options.priority,
                deadline_ms=self._remaining_ms(),
                on_event=self._event if options.events else None,
                label=self.id,
            )

        try:
            came = await fan_out(len(cells), evaluate, mode=options.mode, limit=options.limit)
        except asyncio.CancelledError:
            if not self._ended:  # the service ends
                raise
            return
        except Exception as bug:
            log.exception("a bug behind demand %s", self.id)
            self.give_up(Internal(f"{type(bug).__name__}: {bug}"))
            return
        if came.lost is not None:
            self.give_up(came.lost)
        elif not self._ended:
            outcomes = [self._outcome(came, number) for number in range(came.count)]
            self._end(["demand_complete", self._nodes, outcomes, self.id, self._meta(came.done)])

    def _remaining_ms(self) -> int | None:
        if self._options.deadline_ms is None:
            return None
        passed_ms = int((time.monotonic() - self._started) * 1000)
        return max(0, self._options.deadline_ms - passed_ms)

    def _event(self, event: dict[str, Any]) -> None:
        if not self._ended:
            numbered = {**event, "seq": self._events, "demand_id": self.id}
            self._events += 1
            self._out.send(["node_event", self.session, numbered], self.id)

    def _outcome(self, came: FanOut, number: int) -> dict[str, Any]:
        node = self._nodes[number]
        if number in came.done:
            outputs, meta = came.done[number]
            return {"node": node, "status": "skipped" if meta.get("skipped") else "ok", "outputs": outputs}
        if number in came.failed:
            return {"node": node, "status": "error", "error": came.failed[number].to_wire()}
        return {"node": node, "status": "cancelled" if number in self._launched else "not_started"}

    def _meta(self, done: dict[int, Any]) -> dict[str, Any]:
        metas = [meta for _, meta in done.values()]
        total: dict[str, Any] = {
            "duration_us": int((time.monotonic() - self._started) * 1e6),
            "ran": sum(meta["ran"] for meta in metas),
            "cached": sum(meta["cached"] for meta in metas),
        }
        usage = {node: used for meta in metas for node, used in meta.get("usage", {}).items()}
        return {**total, "usage": usage} if usage else total

    def _end(self, terminal: list[Any]) -> None:
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()
        self._out.send(terminal, self.id)
        self._out.stream_ended(self)
