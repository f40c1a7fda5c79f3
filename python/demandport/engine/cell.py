"""Cells: one version of one node each, with links to the cells it reads and, once it ran, its outputs.

A cell never changes what it reads. An edit takes the cells of the changed node and of everything downstream out of
the store; the next demand builds new ones. So the cells a demand holds are its snapshot of the graph, the cached result
of a node is the outcome in its cell, and single flight is that there is one cell for all who want it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from demandport.errors import DemandportError, MissingInput, TypeMismatch, UnknownNodeType
from demandport.graph.model import Edge, Graph
from demandport.graph.spec import Convert, NodeSpec, converter
from demandport.graph.validation import source_port, target_port

IDLE, WAITING, RUNNING, DONE, SKIPPED = range(5)


class Link(NamedTuple):
    """Where one input port of a cell gets its value from."""

    port: str
    source: Cell
    source_port: str
    convert: Convert | None
    multiple: bool


class Cell:
    """One version of one node.

    Attributes:
        constants: input ports that no link gives.
        outputs: value by output port once the state is DONE.
        missing: cells that this one still waits for.
        dependents: who is told the outcome: cells and demands, in the order they came.
        listeners: demands that hear what it streams and reports.
        run: what runs it now, owned by the executor.
        broken: why it cannot run at all.
        gated: a node before it may leave outputs out, so its links are asked for in two steps.
        owner: the store it belongs to.
    """

    __slots__ = (
        "broken",
        "constants",
        "dependents",
        "gated",
        "links",
        "listeners",
        "missing",
        "node_id",
        "opened",
        "outputs",
        "owner",
        "run",
        "spec",
        "state",
    )

    def __init__(self, node_id: str, spec: NodeSpec, owner: CellStore) -> None:
        self.node_id = node_id
        self.spec = spec
        self.owner = owner
        self.constants: dict[str, Any] = {}
        self.links: list[Link] = []
        self.outputs: dict[str, Any] = {}
        self.state = IDLE
        self.missing = 0
        self.dependents: dict[Any, None] = {}
        self.listeners: dict[Any, None] = {}
        self.run: Any = None
        self.broken: DemandportError | None = None
        self.gated = False
        self.opened = False


class CellStore:
    """The current cells of one session's graph. A cell is there only when all cells that it reads are."""

    def __init__(self, specs: Mapping[str, NodeSpec]) -> None:
        self._specs = specs
        self.cells: dict[str, Cell] = {}
        #: Runs that wait for a `set_input`, by (node, port).
        self.waiting_inputs: dict[tuple[str, str], list[Any]] = {}

    def drop(self, graph: Graph, changed: set[str]) -> list[str]:
        """Forget the cells of `changed` and of all that depends on them; returns the ids that were forgotten."""
        dropped = []
        stack = list(changed)
        while stack:
            node_id = stack.pop()
            # No cell here means none downstream either: they would have been built on it.
            if self.cells.pop(node_id, None) is not None:
                dropped.append(node_id)
                stack.extend(edge.target for edge in graph.outgoing.get(node_id, ()))
        return dropped

    def cell(self, graph: Graph, node_id: str) -> Cell:
        """The cell of a node as the graph stands, built with all it depends on where needed."""
        found = self.cells.get(node_id)
        if found is not None:
            return found
        cells, incoming, stack = self.cells, graph.incoming, [node_id]
        while stack:
            top = stack[-1]
            if top not in cells:
                depth = len(stack)
                stack.extend(edge.source for edge in incoming.get(top, ()) if edge.source not in cells)
                if len(stack) > depth:
                    continue
                cells[top] = self._build(graph, top)
            stack.pop()
        return cells[node_id]

    def _build(self, graph: Graph, node_id: str) -> Cell:
        node = graph.nodes[node_id]
        spec = self._specs.get(node.node_type)
        if spec is None:
            cell = Cell(node_id, _NOBODY, self)
            cell.broken = UnknownNodeType(f"nobody runs nodes of the type {node.node_type!r}", node=node_id)
            return cell
        cell = Cell(node_id, spec, self)
        given = graph.inputs.get(node_id)
        linked: set[str] = set()
        for edge in graph.incoming.get(node_id, ()):
            self._link(cell, edge, given, linked)
        try:
            _fill_constants(cell, node.data, given, linked)
        except DemandportError as broken:
            cell.broken = broken.at(node_id)
        return cell

    def _link(self, cell: Cell, edge: Edge, given: Mapping[str, Any] | None, linked: set[str]) -> None:
        source = self.cells[edge.source]
        out, port = source_port(source.spec, edge.source_handle), target_port(cell.spec, edge.target_handle)
        if out is None or port is None or (given and port.name in given):
            return
        linked.add(port.name)
        cell.links.append(Link(port.name, source, out.name, converter(port.type), port.multiple))
        if source.gated or source.spec.branches:
            cell.gated = True


def _fill_constants(cell: Cell, data: Mapping[str, Any], given: Mapping[str, Any] | None, linked: set[str]) -> None:
    constants = cell.constants
    for name, port in cell.spec.inputs.items():
        if given and name in given:
            constants[name] = _fitted(name, port.type, given[name], port.multiple)
        elif name in linked:
            continue
        elif name in data:
            constants[name] = _fitted(name, port.type, data[name], port.multiple)
        elif port.required:
            hint = f"connect it, set it by set_input, or give data.{name}"
            raise MissingInput(f"the port {name!r} has no value; {hint}")
        else:
            constants[name] = port.default
    if cell.spec.open_inputs:
        for source in (data, given or {}):
            for name, value in source.items():
                if name not in cell.spec.inputs and name not in linked:
                    constants[name] = value


def _fitted(name: str, type_name: str, value: Any, multiple: bool) -> Any:
    convert = converter(type_name)
    if convert is None or multiple:
        return value
    try:
        return convert(value)
    except TypeMismatch as mismatch:
        raise TypeMismatch(f"the port {name!r} {mismatch.message}") from None


def _never() -> None:
    raise AssertionError("a broken cell is not run")


_NOBODY = NodeSpec("", _never, {}, {}, runs="inline")
