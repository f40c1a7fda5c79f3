"""Edit operations: all of a list take effect on a graph, or none does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from demandport.errors import BadMessage, InvalidGraph, TypeMismatch, UnknownNode, UnknownPort
from demandport.graph.loading import check_size, read_edge, read_node
from demandport.graph.model import Graph
from demandport.graph.spec import NodeSpec, converter
from demandport.graph.validation import require_runnable

Specs = Mapping[str, NodeSpec]
Operation = dict[str, Any]


def apply(graph: Graph, operations: list[Any], specs: Specs) -> tuple[Graph, set[str]]:
    """The graph with `operations` applied, and the ids of the nodes whose own version they change.

    Raises:
        DemandportError: an operation is malformed or leaves a graph that cannot run; `graph` is as it was.
    """
    for index, operation in enumerate(operations):
        name = operation.get("op") if isinstance(operation, dict) else None
        if not isinstance(name, str) or name not in _OPERATIONS:
            raise BadMessage(f"operations[{index}].op must be one of {', '.join(_OPERATIONS)}")
    structural = any(_OPERATIONS[operation["op"]][1] for operation in operations)
    edited = graph.copy(structure=structural)
    changed: set[str] = set()
    for index, operation in enumerate(operations):
        changed |= _OPERATIONS[operation["op"]][0](edited, operation, f"operations[{index}]", specs)
    if structural:
        check_size(len(edited.nodes), len(edited.edges))
        require_runnable(edited, specs)
    return edited, changed


def _add_node(graph: Graph, operation: Operation, place: str, specs: Specs) -> set[str]:
    node = read_node(operation.get("node"), f"{place}.node")
    if node.id in graph.nodes:
        raise InvalidGraph(f"{place}: there is a node with the id {node.id!r}", node=node.id)
    graph.add_node(node)
    return {node.id}


def _remove_node(graph: Graph, operation: Operation, place: str, specs: Specs) -> set[str]:
    node_id = _node_of(graph, operation, place)
    after = {edge.target for edge in graph.outgoing.get(node_id, ())}
    graph.remove_node(node_id)
    return after | {node_id}


def _add_edge(graph: Graph, operation: Operation, place: str, specs: Specs) -> set[str]:
    edge = read_edge(operation.get("edge"), f"{place}.edge")
    if edge.id in graph.edges:
        raise InvalidGraph(f"{place}: there is an edge with the id {edge.id!r}")
    graph.add_edge(edge)
    return {edge.target}


def _remove_edge(graph: Graph, operation: Operation, place: str, specs: Specs) -> set[str]:
    named = operation.get("edge")
    edge_id = named if isinstance(named, str) else read_edge(named, f"{place}.edge").id
    edge = graph.edges.get(edge_id)
    if edge is None:
        raise InvalidGraph(f"{place}: there is no edge {edge_id!r}")
    graph.remove_edge(edge_id)
    return {edge.target}


def _update_node_data(graph: Graph, operation: Operation, place: str, specs: Specs) -> set[str]:
    node_id = _node_of(graph, operation, place)
    data = operation.get("data")
    if not isinstance(data, dict):
        raise BadMessage(f"{place}.data must be a map")
    graph.update_data(node_id, data)
    return {node_id}


def _set_input(graph: Graph, operation: Operation, place: str, specs: Specs) -> set[str]:
    node_id = _node_of(graph, operation, place)
    port = _port_of(graph, node_id, operation, place, specs)
    if "value" not in operation:
        raise BadMessage(f"{place}.value is missing")
    value = operation["value"]
    spec = specs.get(graph.nodes[node_id].node_type)
    known = spec.inputs.get(port) if spec else None
    convert = converter(known.type) if known and not known.multiple else None
    try:
        graph.inputs.setdefault(node_id, {})[port] = convert(value) if convert else value
    except TypeMismatch as mismatch:
        raise TypeMismatch(f"{place}: the port {port!r} of {node_id!r} {mismatch.message}", node=node_id) from None
    return {node_id}


def _clear_input(graph: Graph, operation: Operation, place: str, specs: Specs) -> set[str]:
    node_id = _node_of(graph, operation, place)
    port, given = _port_of(graph, node_id, operation, place, specs), graph.inputs.get(node_id, {})
    if port not in given:
        return set()
    del given[port]
    return {node_id}


def _invalidate(graph: Graph, operation: Operation, place: str, specs: Specs) -> set[str]:
    return {_node_of(graph, operation, place)}


def _node_of(graph: Graph, operation: Operation, place: str) -> str:
    node_id = operation.get("node")
    if not isinstance(node_id, str) or node_id not in graph.nodes:
        raise UnknownNode(
            f"{place}: the graph has no node {node_id!r}", node=node_id if isinstance(node_id, str) else None
        )
    return node_id


def _port_of(graph: Graph, node_id: str, operation: Operation, place: str, specs: Specs) -> str:
    port = operation.get("port")
    spec = specs.get(graph.nodes[node_id].node_type)
    if isinstance(port, str) and (spec is None or spec.open_inputs or port in spec.inputs):
        return port
    there = ", ".join(spec.inputs) if spec else "unknown"
    raise UnknownPort(f"{place}: {node_id!r} has no input port {port!r}; its input ports: {there}", node=node_id)


#: Operation → what applies it, and whether the graph's rules must be checked anew.
_OPERATIONS: dict[str, tuple[Callable[[Graph, Operation, str, Specs], set[str]], bool]] = {
    "add_node": (_add_node, True),
    "remove_node": (_remove_node, True),
    "add_edge": (_add_edge, True),
    "remove_edge": (_remove_edge, True),
    "update_node_data": (_update_node_data, True),
    "set_input": (_set_input, False),
    "clear_input": (_clear_input, False),
    "invalidate": (_invalidate, False),
}
