"""Evaluates cells: what a demand needs, each once, in parallel where it can be, with no recursion.

A cell that is wanted waits for the cells it reads, is run when the last of them is there, and tells its dependents.
Inline nodes run at once, one after the other; all others run as tasks of one task group, those that block or compute
in a thread or a worker process. A cell that nobody wants any more is let go, and so is what only it wanted.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import anyio
import anyio.abc

from demandport.engine.cell import DONE, IDLE, RUNNING, SKIPPED, WAITING, Cell, Link
from demandport.engine.cpu import CpuNodes
from demandport.engine.demand import Demand
from demandport.engine.node import Context
from demandport.engine.run import Run, normalised
from demandport.engine.threads import Threads
from demandport.errors import DemandportError, TypeMismatch, from_exception

#: Inline nodes run in one turn of the loop before it may look at its pipes again.
SLICE = 2000


class Executor:
    """Runs the cells of all sessions.

    Args:
        tasks: task group that owns every running node.
        resources: what nodes may use, by name (``ctx.resources``).
        cpu: runs ``cpu`` nodes; default: a worker process per core, started when they are needed.
    """

    def __init__(
        self, tasks: anyio.abc.TaskGroup, resources: Mapping[str, Any], *, cpu: CpuNodes | None = None
    ) -> None:
        self._tasks = tasks
        self._ready: deque[Cell] = deque()
        self._draining = False
        self._starting: Demand | None = None
        self.resources = resources
        self.threads = Threads()
        self.cpu = cpu or CpuNodes()
        self.running = 0

    # ------------------------------------------------------------------------------------------ demands

    def start(self, demand: Demand) -> None:
        """Evaluate what the demand needs. It may have ended when this returns."""
        cell = demand.cell
        if cell.state >= DONE:
            demand.cached = 1
            demand.event("cache_hit", cell.node_id)
            if cell.owner.log is not None:
                cell.owner.log.add("cache_hit", cell.node_id, {"demand": demand.label})
            demand.complete(cell)
            return
        if demand.events:
            demand.event("demand_started", cell.node_id)
            self._listen(demand, cell)
        cell.dependents[demand] = None
        if cell.state == IDLE:
            self._starting = demand
            self._activate([cell], demand)
            self._drain()
            self._starting = None
        if not demand.ended and not demand.events:
            self._listen(demand, cell)

    def stop(self, demand: Demand, error: DemandportError) -> None:
        """End a demand early, and let go of what only it wanted."""
        cell = demand.cell
        demand.fail(error)
        if demand in cell.dependents:
            self._leave([(cell, demand)])

    def _listen(self, demand: Demand, wanted: Cell) -> None:
        """Have the demand hear every cell it needs for `wanted`; what has been streamed already comes at once.

        What a gated cell reads beyond its first links is needed once it is opened.
        """
        seen = {wanted}
        stack = [wanted]
        while stack:
            cell = stack.pop()
            if demand not in cell.listeners and (
                demand.events or cell.spec.runs != "inline" or cell.spec.context is not None
            ):
                cell.listen(demand)
                demand.listening.append(cell)
                if cell.run is not None:
                    for port, text in cell.run.catch_up():
                        demand.sink.chunk(cell.node_id, port, text)
            for link in _first_links(cell) if cell.gated and not cell.opened else cell.links:
                source = link.source
                if source.state < DONE and source not in seen:
                    seen.add(source)
                    stack.append(source)

    async def close(self) -> None:
        """End the worker processes, once nothing runs any more."""
        await self.cpu.close()

    # ------------------------------------------------------------------------------- waiting and readiness

    def _activate(self, stack: list[Cell], demand: Demand) -> None:
        """Have idle cells, and the cells that they read, evaluated; they count for `demand`."""
        ran, cached = 0, set()
        for cell in stack:
            cell.state = WAITING
        while stack:
            cell = stack.pop()
            ran += 1
            if cell.gated:
                cell.counts_for = demand
            cell.opened = not cell.gated
            missing = 0
            for link in _first_links(cell) if cell.gated else cell.links:
                source = link.source
                state = source.state
                if state >= DONE:
                    cached.add(source)
                    continue
                if cell not in source.dependents:
                    source.dependents[cell] = None
                    missing += 1
                if state == IDLE:
                    source.state = WAITING
                    stack.append(source)
            cell.missing = missing
            if not missing:
                self._ready.append(cell)
        demand.ran += ran
        demand.cached += len(cached)

    def _open(self, cell: Cell) -> bool:
        """The second step of a gated cell: it will not be skipped, so ask for its other links. True if it must wait."""
        cell.opened = True
        needed, idle = [], []
        for link in cell.links:
            source = link.source
            if source.state < DONE and cell not in source.dependents:
                source.dependents[cell] = None
                cell.missing += 1
                needed.append(source)
                if source.state == IDLE:
                    source.state = WAITING
                    idle.append(source)
        for source in idle:
            self._activate([source], cell.counts_for)
        for demand in _demands_on(cell) if _may_stream(needed) else list(cell.listeners):
            self._listen(demand, cell)
        return cell.missing > 0

    def _drain(self) -> None:
        """Run what is ready; after a slice, let the loop look at its pipes and go on."""
        if self._draining:
            return
        self._draining = True
        try:
            ready, budget = self._ready, SLICE
            while ready and budget:
                cell = ready.popleft()
                if cell.state == WAITING and not cell.missing:
                    budget -= 1
                    self._run(cell)
        finally:
            self._draining = False
        if self._ready:
            asyncio.get_running_loop().call_soon(self._drain)

    def _run(self, cell: Cell) -> None:
        if cell.broken is not None:
            self._failed(cell, cell.broken)
            return
        if cell.gated and (_is_skipped(cell) or (not cell.opened and self._open(cell))):
            if _is_skipped(cell):
                self._finished(cell, {}, SKIPPED)
            return
        try:
            inputs = _gather(cell)
        except _Skipped:
            self._finished(cell, {}, SKIPPED)
            return
        except DemandportError as wrong:
            self._failed(cell, wrong.at(cell.node_id))
            return
        if cell.spec.runs == "inline":
            self._run_inline(cell, inputs)
        else:
            self._spawn(cell, inputs)

    def _run_inline(self, cell: Cell, inputs: dict[str, Any]) -> None:
        spec = cell.spec
        if cell.listeners or cell.owner.log is not None:
            self._tell(cell, "task_started")
        try:
            if spec.context is not None:
                run = Run(self, cell, self._starting)
                inputs[spec.context] = context = Context(cell.node_id, spec, run)
                outputs = normalised(spec, spec.call(**inputs), context.extra)
            elif spec.single is not None:
                outputs = {spec.single: spec.call(**inputs)}
            else:
                outputs = normalised(spec, spec.call(**inputs), None)
        except BaseException as raised:  # also SystemExit: a node must not end the service
            self._failed(cell, from_exception(raised, node=cell.node_id))
            return
        self._finished(cell, outputs, DONE)

    def _spawn(self, cell: Cell, inputs: dict[str, Any]) -> None:
        run = Run(self, cell)
        cell.run = run
        cell.state = RUNNING
        self.running += 1
        self._tell(cell, "task_started")
        self._tasks.start_soon(run.execute, inputs, name=f"node {cell.node_id}")

    # ----------------------------------------------------------------------------------------- outcomes

    def run_ended(self, run: Run, outputs: dict[str, Any] | None, error: DemandportError | None) -> None:
        """A spawned run is over. One that was let go has no cell any more, and its outcome is dropped."""
        self.running -= 1
        cell = run.cell
        if cell.run is not run:
            return
        cell.run = None
        if error is not None:
            self._failed(cell, error)
        else:
            assert outputs is not None
            usage = outputs.get("usage")
            for demand in cell.listeners if usage else ():
                demand.usage = {**(demand.usage or {}), cell.node_id: usage}
            self._finished(cell, outputs, DONE)
        self._drain()

    def _finished(self, cell: Cell, outputs: dict[str, Any], state: int) -> None:
        cell.outputs = outputs
        cell.state = state
        cell.counts_for = None
        if cell.listeners or cell.owner.log is not None:
            self._tell(cell, "task_completed", {"skipped": True} if state == SKIPPED else None)
        dependents, cell.dependents = cell.dependents, {}
        ready = self._ready
        for dependent in dependents:
            if type(dependent) is Cell:
                dependent.missing -= 1
                if not dependent.missing:
                    ready.append(dependent)
            else:
                dependent.complete(cell)

    def _failed(self, cell: Cell, error: DemandportError) -> None:
        """Every demand that needs the cell fails. Nothing of a failure is kept: the next demand tries again."""
        self._tell(cell, "task_failed", {"error": error.to_wire()})
        leaving: list[tuple[Cell, Any]] = []
        demands: list[Demand] = []
        failed = [cell]
        while failed:
            current = failed.pop()
            current.state = IDLE
            current.counts_for = None
            dependents, current.dependents = current.dependents, {}
            for dependent in dependents:
                if type(dependent) is Cell:
                    if dependent.state == WAITING:
                        dependent.state = IDLE  # at once, so that it is reached only once
                        failed.append(dependent)
                        leaving.extend((link.source, dependent) for link in dependent.links)
                else:
                    demands.append(dependent)
        self._leave(leaving)
        for demand in demands:  # last, since the end of one may start another that wants the same cells
            demand.fail(error)

    def _leave(self, leaving: list[tuple[Cell, Any]]) -> None:
        """Dependents leave cells; a cell that nobody wants any more leaves the cells it reads."""
        while leaving:
            cell, dependent = leaving.pop()
            if cell.dependents.pop(dependent, leaving) is leaving or cell.dependents or cell.state >= DONE:
                continue
            if cell.state == WAITING:
                leaving.extend((link.source, cell) for link in cell.links)
            elif cell.run is not None:
                run, cell.run = cell.run, None
                run.cancel()
            cell.state = IDLE
            cell.counts_for = None

    def _tell(self, cell: Cell, event: str, fields: dict[str, Any] | None = None) -> None:
        log = cell.owner.log
        if log is not None:
            log.add(event, cell.node_id, fields)
        for demand in list(cell.listeners):
            demand.event(event, cell.node_id, fields)


# ------------------------------------------------------------------------------------------------ inputs, outputs


class _Skipped(Exception):
    """An input hangs on a branch that was not taken."""


def _first_links(cell: Cell) -> Iterable[Link]:
    """The links that decide whether a gated cell runs at all: those whose value may turn out to be left out."""
    return [link for link in cell.links if link.source.gated or link.source.spec.branches]


def _may_stream(cells: list[Cell]) -> bool:
    """Whether a demand could hear anything of `cells` and of what they read."""
    stack, seen = list(cells), set(cells)
    while stack:
        cell = stack.pop()
        if cell.spec.runs != "inline" or cell.spec.context is not None:
            return True
        for link in cell.links:
            if link.source.state < DONE and link.source not in seen:
                seen.add(link.source)
                stack.append(link.source)
    return False


def _demands_on(cell: Cell) -> list[Demand]:
    """The demands that want `cell`, directly or for what reads it."""
    found: dict[Demand, None] = {}
    seen: set[Cell] = set()
    stack = [cell]
    while stack:
        for dependent in stack.pop().dependents:
            if type(dependent) is not Cell:
                found[dependent] = None
            elif dependent not in seen:
                seen.add(dependent)
                stack.append(dependent)
    return list(found)


def _is_skipped(cell: Cell) -> bool:
    """A single port has no value since its branch was not taken, or a multiple port has no edge left."""
    left: dict[str, bool] = {}
    for link in cell.links:
        source = link.source
        if source.state < DONE:
            left[link.port] = True
            continue
        present = source.state == DONE and link.source_port in source.outputs
        if not present and not link.multiple:
            return True
        left[link.port] = left.get(link.port, False) or present
    return not all(left.values())


def _gather(cell: Cell) -> dict[str, Any]:
    inputs = dict(cell.constants)
    for port, source, name, convert, multiple in cell.links:
        try:
            value = source.outputs[name]
        except KeyError:
            if multiple:
                continue
            raise _Skipped from None
        if convert is not None:
            value = _converted(value, convert, cell, port, f"{source.node_id}.{name}")
        if multiple:
            inputs.setdefault(port, []).append(value)
        else:
            inputs[port] = value
    return inputs


def _converted(value: Any, convert: Callable[[Any], Any], cell: Cell, port: str, source: str) -> Any:
    try:
        return convert(value)
    except TypeMismatch as mismatch:
        ends = f"{cell.node_id}.{port} {mismatch.message} (from {source})"
        raise TypeMismatch(ends, node=cell.node_id) from None
