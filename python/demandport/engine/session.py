"""A session: one open graph, its cached results, and the demands on it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

from demandport.engine.cell import DONE, RUNNING, SKIPPED, Cell, CellStore
from demandport.engine.demand import Awaited, Demand, Sink
from demandport.engine.events import EventLog
from demandport.engine.executor import Executor
from demandport.engine.timeline import (
    Timeline,
    admit,
    enter,
    everyone,
    expired,
    leave,
    next_deadline,
    next_to_start,
)
from demandport.errors import Cancelled, DeadlineExceeded, DemandportError, UnknownNode, UnknownPort
from demandport.graph.edits import apply
from demandport.graph.loading import load
from demandport.graph.model import Node
from demandport.graph.spec import NodeSpec
from demandport.graph.validation import Problem, require_runnable, target_port

#: Demands within a node's own graph: the node itself says how many there are at once.
_UNLIMITED = 1 << 30


class Session:
    """One open graph. Its methods take effect in the order they are called; none of them blocks.

    Args:
        data: the graph as JSON data.
        specs: node types that can be run.
        max_running: demands that run at a time; 1 makes the session a strict queue.
        max_queued: demands that may wait for a place.
        resources: what its nodes may use, where that is not what those of all sessions may.

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
        resources: Mapping[str, Any] | None = None,
    ) -> None:
        self._graph = load(data)
        self._specs = specs
        self._executor = executor
        self._store = CellStore(specs, resources)
        self._timeline = Timeline(max_running, max_queued)
        #: Fires at the earliest deadline, or before.
        self._timer: asyncio.TimerHandle | None = None
        self._starting = False
        self.problems: list[Problem] = require_runnable(self._graph, specs)

    @classmethod
    def within(cls, cell: Cell, executor: Executor, data: dict[str, Any]) -> Session:
        """A graph that a node evaluates, with the node types and resources of the session that the node is in.

        Raises:
            DemandportError: the graph breaks a rule.
        """
        owner = cell.owner
        return cls(data, owner.specs, executor, max_running=_UNLIMITED, resources=owner.resources)

    def input_port(self, node_id: str, name: str = "") -> str:
        """The name of that input port of a node, or of its first.

        Raises:
            UnknownNode, UnknownPort: there is none.
        """
        spec = self._specs[self._node(node_id).node_type]
        port = target_port(spec, name)
        if port is None:
            there = ", ".join(spec.inputs) or "none"
            raise UnknownPort(f"{node_id!r} has no input port {name!r}; its input ports: {there}", node=node_id)
        return port.name

    @property
    def ends(self) -> list[str]:
        """The ids of the nodes that no other reads."""
        return [node_id for node_id in self._graph.nodes if not self._graph.outgoing.get(node_id)]

    @property
    def size(self) -> int:
        """Number of nodes."""
        return len(self._graph.nodes)

    @property
    def load(self) -> tuple[int, int]:
        """Demands running, demands queued."""
        return len(self._timeline.running), self._timeline.waiting

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
        label: Any = None,
    ) -> Demand:
        """Evaluate a node of the graph as it stands now. The demand may have ended when this returns.

        Args:
            on_end: called once, after the terminal went to `sink`.
            priority: of the demands that wait for a place, those of the highest priority start first; nodes hand it on
                to the models they wait for.
            label: what the session's events call it.

        Raises:
            UnknownNode: the graph has no such node.
            QueueFull: as many demands wait as may.
        """
        return self._demand(self.at(node_id), sink, on_end, deadline_ms, priority, events, label)

    def known(self, node_id: str) -> Cell | None:
        """The node's cell where a demand on it would start now and end at once, from the cache: then none is needed.

        None, too, where events are kept, which tell of it.
        """
        cell = self._store.cells.get(node_id)
        timeline = self._timeline
        if (
            cell is None
            or cell.state < DONE
            or self._store.log is not None
            or len(timeline.running) >= timeline.max_running
        ):
            return None
        return cell

    def at(self, node_id: str) -> Cell:
        """A node as the graph stands now, to be evaluated later by `outcome`.

        Raises:
            UnknownNode: the graph has no such node.
        """
        self._node(node_id)
        return self._store.cell(self._graph, node_id)

    async def outcome(
        self,
        cell: Cell,
        *,
        priority: int = 0,
        deadline_ms: int | None = None,
        on_event: Callable[[dict[str, Any]], None] | None = None,
        label: Any = None,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Evaluate what `at` gave, in the session's order, and return the outputs and the demand's `meta`.

        What streams is not heard. Cancelled, it cancels the demand.

        Raises:
            DemandportError: what the demand ended with.
        """
        sink = Awaited(on_event)
        demand = self._demand(cell, sink, _nothing, deadline_ms, priority, on_event is not None, label)
        try:
            return await sink.outcome
        finally:
            if not demand.ended:
                self.cancel(demand)

    def _demand(
        self,
        cell: Cell,
        sink: Sink,
        on_end: Callable[[Demand], None],
        deadline_ms: int | None,
        priority: int,
        events: bool,
        label: Any,
    ) -> Demand:
        now = admit(self._timeline)
        started = time.monotonic()
        log = self._store.log
        deadline = None if deadline_ms is None else started + deadline_ms / 1000
        demand = Demand(cell, sink, on_end, started, deadline, events, priority, self._ended, label)
        if log is not None:
            log.add("demand_started", cell.node_id, {"demand": label})
        enter(self._timeline, demand, now)
        if not now:
            demand.running_from = None
        if deadline is not None:
            self._arm()
        if now:
            self._executor.start(demand)
        return demand

    def cancel(self, demand: Demand, error: DemandportError | None = None) -> None:
        """End a demand with `cancelled`, or with `error`."""
        self._executor.stop(demand, error or Cancelled("the demand was cancelled", node=demand.cell.node_id))

    def close(self) -> None:
        """Cancel every demand."""
        for demand in everyone(self._timeline):
            self.cancel(demand, Cancelled("the session was closed", node=demand.cell.node_id))
        if self._timer is not None:
            self._timer.cancel()

    def _tick(self) -> None:
        """What the time brings: the earliest deadlines."""
        self._timer = None
        now = time.monotonic()
        for demand in expired(self._timeline, now):
            limit_ms = round((demand.deadline - demand.started) * 1000)
            late = f"the demand was not done within its {limit_ms} ms"
            self.cancel(demand, DeadlineExceeded(late, node=demand.cell.node_id))
        self._arm()

    def _arm(self) -> None:
        when = next_deadline(self._timeline)
        if when is not None and (self._timer is None or when < self._timer.when()):
            if self._timer is not None:
                self._timer.cancel()
            self._timer = asyncio.get_running_loop().call_at(when, self._tick)

    def _ended(self, demand: Demand) -> None:
        """The one way out of the timeline, however it ended. One that ends as it starts comes back here, and does not
        nest."""
        leave(self._timeline, demand)
        if self._store.log is not None:
            self._log_end(self._store.log, demand)
        if self._starting:
            return
        self._starting = True
        try:
            while (following := next_to_start(self._timeline)) is not None:
                following.running_from = time.monotonic()
                self._executor.start(following)
        finally:
            self._starting = False

    # -------------------------------------------------------------------------------------------- events

    def keep_events(self, count: int) -> EventLog:
        """From now on keep the last `count` events of this session; returns them, also if they are kept already."""
        if self._store.log is None:
            self._store.log = EventLog(count)
        return self._store.log

    def _log_end(self, log: EventLog, demand: Demand) -> None:
        took = {"demand": demand.label, "duration_us": int((time.monotonic() - demand.started) * 1e6)}
        if demand.failure is None:
            log.add("demand_completed", demand.cell.node_id, took)
        else:
            log.add("demand_failed", demand.cell.node_id, {**took, "error": demand.failure.to_wire()})

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
        if self._store.log is not None:
            self._store.log.add("edited", None, {"stale": stale})
        self._store.take_answers(graph, [(o["node"], o["port"]) for o in operations if o["op"] in given])
        return stale

    def output(self, node_id: str, port: str) -> dict[str, Any]:
        """The cached value of an output port, as ``{status, value}``; runs nothing.

        Raises:
            UnknownNode, UnknownPort: there is none of that name.
        """
        self.check_output(node_id, port)
        cell = self._store.cells.get(node_id)
        if cell is None or cell.state < DONE:
            return {"status": "absent", "value": None}
        if cell.state == SKIPPED or port not in cell.outputs:
            return {"status": "skipped", "value": None}
        return {"status": "fresh", "value": cell.outputs[port]}

    def check_output(self, node_id: str, port: str) -> None:
        """Raises `UnknownNode` or `UnknownPort` unless the node has that output."""
        spec = self._specs[self._node(node_id).node_type]
        if port not in spec.outputs and not spec.open_outputs:
            there = ", ".join(spec.outputs)
            raise UnknownPort(f"{node_id!r} has no output port {port!r}; it has {there}", node=node_id)

    def _node(self, node_id: str) -> Node:
        node = self._graph.nodes.get(node_id)
        if node is None:
            raise UnknownNode(f"the graph has no node {node_id!r}", node=node_id)
        return node

    def snapshot(self) -> dict[str, Any]:
        """Graph, inputs, and the state of every node."""
        states = {node_id: self._state_of(node_id) for node_id in self._graph.nodes}
        return {"graph": self._graph.to_json(), "inputs": self._graph.inputs, "states": states}

    def _state_of(self, node_id: str) -> str:
        cell = self._store.cells.get(node_id)
        state = cell.state if cell else None
        return {DONE: "fresh", SKIPPED: "skipped", RUNNING: "running"}.get(state, "stale")  # type: ignore[arg-type]


def _nothing(_: Demand) -> None:
    pass
