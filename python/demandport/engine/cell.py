"""Cells: one version of one node each, with links to the cells it reads and, once it ran, its outputs.

A cell never changes what it reads. An edit takes the cells of the changed node and of everything downstream out of
the store; the next demand builds new ones. So the cells a demand holds are its snapshot of the graph, the cached result
of a node is the outcome in its cell, and single flight is that there is one cell for all who want it.
"""

from __future__ import annotations

import functools
from collections.abc import Container, Mapping
from typing import Any, NamedTuple

from demandport.engine.events import EventLog
from demandport.errors import DemandportError, MissingInput, TypeMismatch, UnknownNodeType
from demandport.graph.model import Edge, Graph
from demandport.graph.spec import Convert, NodeSpec, converter
from demandport.graph.validation import has_value, source_port, target_port

#: Shared by all cells that have no outputs yet; never written to.
_NOTHING: dict[str, Any] = {}
#: Shared by all cells that nobody listens to, as most are.
_NOBODY_LISTENS: dict[Any, None] = {}
IDLE, WAITING, RUNNING, DONE, SKIPPED = range(5)


class Link(NamedTuple):
    """Where one input port of a cell gets its value from."""

    port: str
    source: Cell
    source_port: str
    convert: Convert | None
    multiple: bool


#: `Link` from a tuple of its fields; its own constructor takes three times as long.
_link = functools.partial(tuple.__new__, Link)


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
        opened: gated, and its links have all been asked for.
        counts_for: the demand that had it evaluated, while it is gated and not done.
        gated: a node before it may leave outputs out, so its links are asked for in two steps.
        owner: the store it belongs to.
        born: the store's clock when it was made.
    """

    __slots__ = (
        "born",
        "broken",
        "constants",
        "counts_for",
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
        self.born = owner.clock
        self.constants: dict[str, Any] = {}
        self.links: list[Link] = []
        self.outputs: dict[str, Any] = _NOTHING
        self.state = IDLE
        self.missing = 0
        self.dependents: dict[Any, None] = {}
        self.listeners: dict[Any, None] = _NOBODY_LISTENS
        self.run: Any = None
        self.broken: DemandportError | None = None
        self.gated = False
        self.opened = False
        self.counts_for: Any = None

    def listen(self, demand: Any) -> None:
        """Have `demand` hear what this cell streams and reports."""
        if self.listeners is _NOBODY_LISTENS:
            self.listeners = {}
        self.listeners[demand] = None


class _Form:
    """What every cell of one node type starts from, looked up once.

    Attributes:
        defaults: values of the ports that have one. required: names of the ports that have none.
        sources, targets: memo of ports by handle.
    """

    __slots__ = ("defaults", "required", "sources", "spec", "targets")

    def __init__(self, spec: NodeSpec) -> None:
        self.spec = spec
        self.defaults = {name: port.default for name, port in spec.inputs.items() if not port.required}
        self.required = [name for name, port in spec.inputs.items() if port.required]
        self.sources: dict[str, str | None] = {}
        self.targets: dict[str, tuple[str, Convert | None, bool] | None] = {}

    def source(self, handle: str) -> str | None:
        """Name of the output port that an edge's handle means."""
        try:
            return self.sources[handle]
        except KeyError:
            port = source_port(self.spec, handle)
            found = self.sources[handle] = port.name if port else None
            return found

    def target(self, handle: str) -> tuple[str, Convert | None, bool] | None:
        """Name, conversion and multiplicity of the input port that an edge's handle means."""
        try:
            return self.targets[handle]
        except KeyError:
            port = target_port(self.spec, handle)
            found = self.targets[handle] = (port.name, converter(port.type), port.multiple) if port else None
            return found


class CellStore:
    """The current cells of one session's graph. A cell is there only when all cells that it reads are.

    Args:
        resources: what the session's nodes may use; None: what those of all sessions may.
    """

    def __init__(self, specs: Mapping[str, NodeSpec], resources: Mapping[str, Any] | None = None) -> None:
        self.specs = specs
        self.resources = resources
        #: What happens to the cells, where somebody wants to know.
        self.log: EventLog | None = None
        self._forms: dict[str, _Form] = {}
        self.cells: dict[str, Cell] = {}
        #: Number of edits so far.
        self.clock = 0
        #: The value last given by `set_input`, and when, by (node, port).
        self.answers: dict[tuple[str, str], tuple[Any, int]] = {}
        #: Futures of runs that wait for one.
        self.waiting: dict[tuple[str, str], list[Any]] = {}

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

    def take_answers(self, graph: Graph, ports: list[tuple[str, str]]) -> None:
        """Values were given for these ports, for runs that wait for them now or will."""
        self.clock += 1
        for node_id, port in ports:
            given = graph.inputs.get(node_id, {})
            if port in given:
                self.answers[node_id, port] = given[port], self.clock
            else:
                self.answers.pop((node_id, port), None)
            for future in self.waiting.get((node_id, port), ()):
                if not future.done():
                    future.set_result(None)

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
                for edge in incoming.get(top, ()):
                    if edge.source not in cells:
                        stack.append(edge.source)
                if len(stack) > depth:
                    continue
                cells[top] = self._build(graph, top)
            stack.pop()
        return cells[node_id]

    def _build(self, graph: Graph, node_id: str) -> Cell:
        node = graph.nodes[node_id]
        form = self._forms.get(node.node_type) or self._form(node.node_type)
        cell = Cell(node_id, form.spec, self)
        if form.spec is _NOBODY:
            cell.broken = UnknownNodeType(f"nobody runs nodes of the type {node.node_type!r}", node=node_id)
            return cell
        given = graph.inputs.get(node_id)
        edges = graph.incoming.get(node_id)
        linked = self._link(cell, form, edges, given) if edges else {}
        try:
            if node.data or given or cell.spec.open_inputs:
                _fill_constants(cell, node.data, given, linked)
            else:
                _fill_defaults(cell, form, linked)
        except DemandportError as broken:
            cell.broken = broken.at(node_id)
        return cell

    def _form(self, node_type: str) -> _Form:
        form = self._forms[node_type] = _Form(self.specs.get(node_type, _NOBODY))
        return form

    def _link(self, cell: Cell, form: _Form, edges: list[Edge], given: Mapping[str, Any] | None) -> Mapping[str, Any]:
        """Link the cell to those it reads; returns the ports that have a link, as keys."""
        cells, forms, links = self.cells, self._forms, cell.links
        linked: dict[str, None] = {}
        for edge in edges:
            source = cells[edge.source]
            spec = source.spec
            target = form.target(edge.target_handle)
            out = forms[spec.node_type].source(edge.source_handle) if spec is not _NOBODY else None
            if target is None or out is None or (given and target[0] in given):
                continue
            port, convert, multiple = target
            if convert is not None and spec.outputs[out].type == "json" == form.spec.inputs[port].type:
                convert = None  # a text that stands for itself is not read as JSON once more
            links.append(_link((port, source, out, convert, multiple)))
            linked[port] = None
            if source.gated or spec.branches:
                cell.gated = True
        return linked


def _fill_defaults(cell: Cell, form: _Form, linked: Container[str]) -> None:
    """`_fill_constants` for the many nodes that nobody gave a value."""
    for name in form.required:
        if name not in linked:
            raise _missing(name)
    if form.defaults:
        cell.constants = {name: value for name, value in form.defaults.items() if name not in linked}


def _fill_constants(
    cell: Cell, data: Mapping[str, Any], given: Mapping[str, Any] | None, linked: Container[str]
) -> None:
    constants = cell.constants
    for name, port in cell.spec.inputs.items():
        if given and name in given:
            constants[name] = given[name]  # made to fit when it was set
        elif name in linked:
            continue
        elif has_value(data, port):
            constants[name] = _fitted(name, port.type, data[name], port.multiple)
        elif port.required:
            raise _missing(name)
        else:
            constants[name] = port.default
    if cell.spec.open_inputs:
        for source in (data, given or {}):
            for name, value in source.items():
                if name not in cell.spec.inputs and name not in linked:
                    constants[name] = value


def _missing(name: str) -> MissingInput:
    return MissingInput(f"the port {name!r} has no value; connect it, set it by set_input, or give data.{name}")


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
