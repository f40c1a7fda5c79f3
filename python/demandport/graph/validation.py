"""The rules of a runnable graph. Opening, editing, `validate` and the command line all ask here, so they agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from demandport.errors import BY_CODE, CycleFound, DemandportError, InvalidGraph, TypeMismatch
from demandport.graph.model import Edge, Graph, Node, find_cycle
from demandport.graph.spec import NodeSpec, Port, converter, fits

MAX_REPORTED = 100


@dataclass(frozen=True, slots=True)
class Problem:
    """One broken rule: its error code, where it is, and what to change."""

    code: str
    message: str
    hint: str
    node: str | None = None
    port: str | None = None
    edge: str | None = None
    #: Nothing of the graph may run.
    fatal: bool = True

    def to_wire(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("code", "message", "hint", "node", "port", "edge")}


def problems_of(graph: Graph, specs: Mapping[str, NodeSpec]) -> list[Problem]:
    """Every broken rule of the graph, at most `MAX_REPORTED`, in the order of its nodes and edges."""
    found: list[Problem] = []
    for node in graph.nodes.values():
        _check_node(graph, node, specs, found)
    for edge in graph.edges.values():
        _check_edge(graph, edge, specs, found)
    path = find_cycle(graph)
    if path:
        message = f"these nodes form a cycle: {' -> '.join(path)}"
        found.append(Problem("cycle", message, "remove one edge of it", node=path[0]))
    return found[:MAX_REPORTED]


def require_runnable(graph: Graph, specs: Mapping[str, NodeSpec]) -> list[Problem]:
    """Refuse a graph that cannot be opened; returns the problems that only some demands would meet.

    A missing input is such a one: `set_input` may give it later. So is a name in a node's data that is almost a port's.

    Raises:
        DemandportError: of the first problem's code, with all of them in ``details["problems"]``.
    """
    problems = problems_of(graph, specs)
    fatal = [problem for problem in problems if problem.fatal]
    if not fatal:
        return problems
    first = fatal[0]
    cls: type[DemandportError] = CycleFound if first.code == "cycle" else BY_CODE.get(first.code, InvalidGraph)
    details = {"problems": [problem.to_wire() for problem in problems]}
    raise cls(f"{first.message}; {first.hint}", node=first.node, details=details)


def source_port(spec: NodeSpec, handle: str) -> Port | None:
    """The output that an edge's source handle means; an empty one means the first."""
    port = spec.outputs.get(handle) if handle else next(iter(spec.outputs.values()), None)
    if port is None and spec.open_outputs:
        return Port(handle or spec.stream)
    return port


def target_port(spec: NodeSpec, handle: str) -> Port | None:
    """The input that an edge's target handle means; an empty one means the first."""
    port = spec.inputs.get(handle) if handle else next(iter(spec.inputs.values()), None)
    if port is None and handle and spec.open_inputs:
        return Port(handle)
    return port


def has_value(data: Mapping[str, Any], port: Port) -> bool:
    """Whether a node's data gives the port a value. In a port that takes any value, null is one; else it is none."""
    return port.name in data and (data[port.name] is not None or converter(port.type) is None)


def _check_node(graph: Graph, node: Node, specs: Mapping[str, NodeSpec], found: list[Problem]) -> None:
    spec = specs.get(node.node_type)
    if spec is None:
        message = f"nobody runs nodes of the type {node.node_type!r}"
        found.append(Problem("unknown_node_type", message, "see node_types for those there are", node=node.id))
        return
    by_port: dict[str, int] = {}
    for edge in graph.incoming.get(node.id, ()):
        port = target_port(spec, edge.target_handle)
        if port is not None:
            by_port[port.name] = by_port.get(port.name, 0) + 1
    given = graph.inputs.get(node.id, {})
    for port in spec.inputs.values():
        if by_port.get(port.name, 0) > 1 and not port.multiple:
            message = f"{by_port[port.name]} edges end at the port {port.name!r} of {node.id!r}, which takes one"
            found.append(Problem("invalid_graph", message, "keep one of them or merge them", node.id, port.name))
        if port.name in given or port.name in by_port:
            continue
        if has_value(node.data, port):
            _check_value(node, port, found)
        elif port.required:
            message = f"the port {port.name!r} of {node.id!r} has no value"
            hint = f"connect it, set it by set_input, or give data.{port.name}"
            found.append(Problem("missing_input", message, hint, node.id, port.name, fatal=False))
    if not spec.open_inputs and not node.data.keys() <= spec.inputs.keys():
        _check_names(node, spec, found)


def _check_names(node: Node, spec: NodeSpec, found: list[Problem]) -> None:
    """Data may hold anything beside the ports' values, so a name is a problem only where it is another's in disguise:
    ``maxTokens``, ``temprature``."""
    free = {_plain(port): port for port in spec.inputs if port not in node.data}
    for name in node.data:
        near = None if name in spec.inputs else _nearest(_plain(name), free)
        if near is not None:
            message = f"data.{name} of {node.id!r} is no port, and has no effect"
            hint = f"did you mean {near!r}?"
            found.append(Problem("unknown_port", message, hint, node.id, name, fatal=False))


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


def _nearest(name: str, free: Mapping[str, str]) -> str | None:
    if name in free:
        return free[name]
    # Few names begin alike and are as long, and the others need no closer look, which takes long.
    like = [plain for plain in free if plain[:1] == name[:1] and abs(len(plain) - len(name)) <= 2]
    if not like or len(name) < 4:
        return None
    from difflib import get_close_matches

    return next((free[plain] for plain in get_close_matches(name, like, 1, 0.85)), None)


def _check_value(node: Node, port: Port, found: list[Problem]) -> None:
    convert = converter(port.type)
    if convert is None or port.multiple:
        return
    try:
        convert(node.data[port.name])
    except TypeMismatch as mismatch:
        message = f"data.{port.name} of {node.id!r} {mismatch.message}"
        found.append(Problem("type_mismatch", message, f"give a value of type {port.type}", node.id, port.name))


def _check_edge(graph: Graph, edge: Edge, specs: Mapping[str, NodeSpec], found: list[Problem]) -> None:
    for end in (edge.source, edge.target):
        if end not in graph.nodes:
            message = f"the edge {edge.id!r} names the node {end!r}, which is not in the graph"
            found.append(Problem("unknown_node", message, "add the node or remove the edge", end, edge=edge.id))
            return
    source_spec, target_spec = (specs.get(graph.nodes[end].node_type) for end in (edge.source, edge.target))
    if source_spec is None or target_spec is None:
        return
    source, target = source_port(source_spec, edge.source_handle), target_port(target_spec, edge.target_handle)
    if source is None:
        _unknown_port(edge, edge.source, "output", edge.source_handle, source_spec.outputs, found)
    if target is None:
        _unknown_port(edge, edge.target, "input", edge.target_handle, target_spec.inputs, found)
    if source and target and not fits(source.type, target.type):
        ends = f"{edge.source}.{source.name} ({source.type}) and {edge.target}.{target.name} ({target.type})"
        message = f"the edge {edge.id!r} joins ports that do not fit: {ends}"
        found.append(Problem("type_mismatch", message, "connect ports of one type", edge.target, target.name, edge.id))


def _unknown_port(
    edge: Edge, node: str, kind: str, handle: str, ports: Mapping[str, Port], found: list[Problem]
) -> None:
    there = ", ".join(ports) or "none"
    message = f"{node!r} has no {kind} port {handle!r}, which the edge {edge.id!r} names"
    found.append(Problem("unknown_port", message, f"its {kind} ports: {there}", node, handle or None, edge.id))
