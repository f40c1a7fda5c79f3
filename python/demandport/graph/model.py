"""A workflow graph as plain data, and the edits that make a new one of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Node:
    """One unit of work. `data` holds the values of its ports that no edge gives, and what the host keeps there."""

    id: str
    node_type: str
    data: dict[str, Any] = field(default_factory=dict)
    position: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Edge:
    """A connection from an output port to an input port. An empty handle stands for the first port."""

    id: str
    source: str
    source_handle: str
    target: str
    target_handle: str


@dataclass(slots=True)
class Graph:
    """Nodes and edges, with the values that `set_input` gave. Treated as a value: an edit works on a `copy`."""

    nodes: dict[str, Node] = field(default_factory=dict)
    edges: dict[str, Edge] = field(default_factory=dict)
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    incoming: dict[str, list[Edge]] = field(default_factory=dict)
    outgoing: dict[str, list[Edge]] = field(default_factory=dict)

    def copy(self, *, structure: bool = True) -> Graph:
        """A graph that can be changed apart from this one.

        Args:
            structure: False when only `inputs` will be changed; then everything else is shared, at no cost.
        """
        inputs = {node: dict(values) for node, values in self.inputs.items()}
        if not structure:
            return Graph(self.nodes, self.edges, inputs, self.incoming, self.outgoing)
        return Graph(
            dict(self.nodes),
            dict(self.edges),
            inputs,
            {node: list(edges) for node, edges in self.incoming.items()},
            {node: list(edges) for node, edges in self.outgoing.items()},
        )

    def add_node(self, node: Node) -> None:
        self.nodes[node.id] = node

    def remove_node(self, node_id: str) -> None:
        """Remove a node with its edges and inputs."""
        for edge in [*self.incoming.get(node_id, ()), *self.outgoing.get(node_id, ())]:
            if edge.id in self.edges:
                self.remove_edge(edge.id)
        for table in (self.incoming, self.outgoing, self.inputs):
            table.pop(node_id, None)
        del self.nodes[node_id]

    def add_edge(self, edge: Edge) -> None:
        self.edges[edge.id] = edge
        self.incoming.setdefault(edge.target, []).append(edge)
        self.outgoing.setdefault(edge.source, []).append(edge)

    def remove_edge(self, edge_id: str) -> None:
        edge = self.edges.pop(edge_id)
        self.incoming[edge.target].remove(edge)
        self.outgoing[edge.source].remove(edge)

    def update_data(self, node_id: str, data: dict[str, Any]) -> None:
        """Merge `data` into the node's; a None removes its key."""
        merged = {key: value for key, value in (self.nodes[node_id].data | data).items() if value is not None}
        self.nodes[node_id] = replace(self.nodes[node_id], data=merged)

    def to_json(self) -> dict[str, Any]:
        """The graph as `loading.load` reads it."""
        return {
            "nodes": [
                {
                    "id": node.id,
                    "node_type": node.node_type,
                    "data": node.data,
                    "position": list(node.position) if node.position else None,
                }
                for node in self.nodes.values()
            ],
            "edges": [
                {
                    "id": edge.id,
                    "source": edge.source,
                    "source_handle": edge.source_handle,
                    "target": edge.target,
                    "target_handle": edge.target_handle,
                }
                for edge in self.edges.values()
            ],
        }


def find_cycle(graph: Graph, starts: Iterable[str] | None = None) -> list[str] | None:
    """The ids along one cycle that can be reached from `starts` (every node, if none are given), first id repeated."""
    done: set[str] = set()
    for start in graph.nodes if starts is None else starts:
        found = _cycle_from(graph, start, done)
        if found:
            return found
    return None


def _cycle_from(graph: Graph, start: str, done: set[str]) -> list[str] | None:
    if start in done:
        return None
    path: list[str] = [start]
    on_path = {start}
    stack = [iter(graph.outgoing.get(start, ()))]
    while stack:
        edge = next(stack[-1], None)
        if edge is None:
            stack.pop()
            node = path.pop()
            on_path.discard(node)
            done.add(node)
        elif edge.target in on_path:
            return [*path[path.index(edge.target) :], edge.target]
        elif edge.target not in done:
            path.append(edge.target)
            on_path.add(edge.target)
            stack.append(iter(graph.outgoing.get(edge.target, ())))
    return None
