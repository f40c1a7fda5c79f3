"""A session: one open graph, its cached results, and the demands on it."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from demandport.engine.cell import DONE, RUNNING, SKIPPED, CellStore
from demandport.engine.demand import Demand, Sink
from demandport.engine.executor import Executor
from demandport.errors import Cancelled, DeadlineExceeded, DemandportError, QueueFull, UnknownNode, UnknownPort
from demandport.graph.edits import apply
from demandport.graph.loading import load
from demandport.graph.spec import NodeSpec
from demandport.graph.validation import Problem, require_runnable


class Session:
    """One open graph. Its methods take effect in the order they are called; none of them blocks.

    Args:
        data: the graph as JSON data.
        specs: node types that can be run.
        max_running: demands that run at a time; 1 makes the session a strict queue.
        max_queued: demands that may wait for a place.

    Raises:
        DemandportError: the graph breaks a rule.
    """

    def __init__(
        self,
        data: dict[str, Any],
        specs: Mapping[str, NodeSpec],
        executor: Executor,
        *,
        max_running: int = 64,
        max_queued: int = 10_000,
    ) -> None:
        self._graph = load(data)
        self._specs = specs
        self._executor = executor
        self._store = CellStore(specs)
        self._max_running = max_running
        self._max_queued = max_queued
        self._running: set[Demand] = set()
        #: Demands that wait for a place, by priority; each level in the order of arrival.
        self._queued: dict[int, OrderedDict[Demand, None]] = {}
        self._timers: dict[Demand, asyncio.TimerHandle] = {}
        self._filling = False
        self.problems: list[Problem] = require_runnable(self._graph, specs)

    @property
    def size(self) -> int:
        """Number of nodes."""
        return len(self._graph.nodes)

    @property
    def load(self) -> tuple[int, int]:
        """Demands running, demands queued."""
        return len(self._running), sum(map(len, self._queued.values()))

    # ------------------------------------------------------------------------------------------ demands

    def demand(
        self,
        node_id: str,
        sink: Sink,
        on_end: Callable[[Demand], None],
        *,
        deadline_ms: int | None = None,
        priority: int = 0,
        events: bool = False,
    ) -> Demand:
        """Evaluate a node of the graph as it stands now. The demand may have ended when this returns.

        Args:
            on_end: called once, after the terminal went to `sink`.
            priority: of the demands that wait for a place, those of the highest priority start first; nodes hand it on
                to the models they wait for.

        Raises:
            UnknownNode: the graph has no such node.
            QueueFull: as many demands wait as may.
        """
        if node_id not in self._graph.nodes:
            raise UnknownNode(f"the graph has no node {node_id!r}", node=node_id)
        full = len(self._running) >= self._max_running
        if full and self.load[1] >= self._max_queued:
            raise QueueFull(
                f"the session has {self._max_running} demands running and {self._max_queued} queued; try later"
            )
        started = time.monotonic()
        cell = self._store.cell(self._graph, node_id)
        if cell.state >= DONE and not full:  # answered from the cache: no place, no timer
            demand = Demand(cell, sink, on_end, started, events=events)
            self._executor.start(demand)
            return demand

        def ended(demand: Demand) -> None:
            on_end(demand)
            self._ended(demand)

        deadline = None if deadline_ms is None else started + deadline_ms / 1000
        demand = Demand(cell, sink, ended, started, deadline, events, priority)
        if deadline_ms is not None:
            loop = asyncio.get_running_loop()
            self._timers[demand] = loop.call_later(deadline_ms / 1000, self._expire, demand, deadline_ms)
        if full:
            self._queued.setdefault(priority, OrderedDict())[demand] = None
        else:
            self._start(demand)
        return demand

    def cancel(self, demand: Demand, error: DemandportError | None = None) -> None:
        """End a demand with `cancelled`, or with `error`."""
        if demand not in self._running:
            self._unqueue(demand)
        self._executor.stop(demand, error or Cancelled("the demand was cancelled", node=demand.cell.node_id))

    def close(self) -> None:
        """Cancel every demand."""
        for demand in [*itertools.chain(*self._queued.values()), *self._running]:
            self.cancel(demand, Cancelled("the session was closed", node=demand.cell.node_id))

    def _start(self, demand: Demand) -> None:
        self._running.add(demand)
        self._executor.start(demand)

    def _expire(self, demand: Demand, deadline_ms: int) -> None:
        if not demand.ended:
            message = f"the demand was not done within its {deadline_ms} ms"
            self.cancel(demand, DeadlineExceeded(message, node=demand.cell.node_id))

    def _ended(self, demand: Demand) -> None:
        self._running.discard(demand)
        timer = self._timers.pop(demand, None)
        if timer is not None:
            timer.cancel()
        self._fill()

    def _fill(self) -> None:
        """Start queued demands while there are places. One that ends at once comes back here, and does not nest."""
        if self._filling:
            return
        self._filling = True
        try:
            while self._queued and len(self._running) < self._max_running:
                demand = next(iter(self._queued[max(self._queued)]))
                self._unqueue(demand)
                self._start(demand)
        finally:
            self._filling = False

    def _unqueue(self, demand: Demand) -> None:
        for priority, level in self._queued.items():
            if demand in level:
                del level[demand]
                if not level:
                    del self._queued[priority]
                return

    # -------------------------------------------------------------------------------- edits and outputs

    def edit(self, operations: list[Any]) -> list[str]:
        """Apply all operations or none; returns the ids of the nodes whose cached results are gone.

        Raises:
            DemandportError: an operation cannot be applied.
        """
        before = self._graph
        graph, changed = apply(before, operations, self._specs)
        stale = self._store.drop(before, changed)
        self._graph = graph
        given = ("set_input", "clear_input")
        self._store.take_answers(graph, [(o["node"], o["port"]) for o in operations if o["op"] in given])
        return stale

    def output(self, node_id: str, port: str) -> dict[str, Any]:
        """The cached value of an output port, as ``{status, value}``; runs nothing.

        Raises:
            UnknownNode, UnknownPort: there is none of that name.
        """
        node = self._graph.nodes.get(node_id)
        if node is None:
            raise UnknownNode(f"the graph has no node {node_id!r}", node=node_id)
        spec = self._specs[node.node_type]
        if port not in spec.outputs:
            raise UnknownPort(
                f"{node_id!r} has no output port {port!r}; it has {', '.join(spec.outputs)}", node=node_id
            )
        cell = self._store.cells.get(node_id)
        if cell is None or cell.state < DONE:
            return {"status": "absent", "value": None}
        if cell.state == SKIPPED or port not in cell.outputs:
            return {"status": "skipped", "value": None}
        return {"status": "fresh", "value": cell.outputs[port]}

    def snapshot(self) -> dict[str, Any]:
        """Graph, inputs, and the state of every node."""
        states = {node_id: self._state_of(node_id) for node_id in self._graph.nodes}
        return {"graph": self._graph.to_json(), "inputs": self._graph.inputs, "states": states}

    def _state_of(self, node_id: str) -> str:
        cell = self._store.cells.get(node_id)
        state = cell.state if cell else None
        return {DONE: "fresh", SKIPPED: "skipped", RUNNING: "running"}.get(state, "stale")  # type: ignore[arg-type]
