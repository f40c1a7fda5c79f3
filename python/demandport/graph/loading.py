"""Every JSON shape of a graph that hosts use, read into one `Graph`.

Accepted: snake_case and camelCase keys; ``position`` as ``[x, y]`` or ``{x, y}``; bare, or wrapped as
``{version, metadata, graph}``. The node type is ``node_type`` on the node, else ``data.node_type``, else the id's stem
before its last ``-``.
"""

from __future__ import annotations

from typing import Any

from demandport.errors import InvalidGraph
from demandport.graph.model import Edge, Graph, Node

MAX_NODES = 100_000
MAX_EDGES = 1_000_000


def load(data: Any) -> Graph:
    """The graph in `data`.

    Raises:
        InvalidGraph: a part is missing, doubled or of the wrong type; the message names it.
    """
    body = data["graph"] if isinstance(data, dict) and isinstance(data.get("graph"), dict) else data
    if not isinstance(body, dict):
        raise InvalidGraph("a graph is a map with nodes and edges")
    nodes, edges = body.get("nodes"), body.get("edges", [])
    if not isinstance(nodes, list) or not isinstance(edges, list):
        raise InvalidGraph("a graph has a list of nodes and a list of edges")
    check_size(len(nodes), len(edges))
    graph = Graph()
    for index, raw in enumerate(nodes):
        node = read_node(raw, f"nodes[{index}]")
        if node.id in graph.nodes:
            raise InvalidGraph(f"nodes[{index}]: there are two nodes with the id {node.id!r}", node=node.id)
        graph.add_node(node)
    for index, raw in enumerate(edges):
        edge = read_edge(raw, f"edges[{index}]")
        if edge.id in graph.edges:
            raise InvalidGraph(f"edges[{index}]: there are two edges with the id {edge.id!r}")
        graph.add_edge(edge)
    return graph


def check_size(nodes: int, edges: int) -> None:
    """Refuse a graph of more nodes or edges than one may have.

    Raises:
        InvalidGraph: it is larger.
    """
    if nodes > MAX_NODES or edges > MAX_EDGES:
        raise InvalidGraph(f"a graph has at most {MAX_NODES} nodes and {MAX_EDGES} edges")


def read_node(raw: Any, place: str) -> Node:
    """One node; `place` names it in errors."""
    if not isinstance(raw, dict):
        raise InvalidGraph(f"{place} must be a map")
    node_id = _text(raw, place, "id")
    data = raw.get("data")
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise InvalidGraph(f"{place}.data must be a map", node=node_id)
    given = [source.get(key) for source in (raw, data) for key in ("node_type", "nodeType")]
    named = next((name for name in given if name is not None), node_id.rpartition("-")[0] or node_id)
    if not isinstance(named, str) or not named:
        raise InvalidGraph(f"{place}.node_type must be a string", node=node_id)
    return Node(node_id, named, data, _position(raw.get("position"), place))


def read_edge(raw: Any, place: str) -> Edge:
    """One edge; `place` names it in errors. An edge with no id gets one made of its ends."""
    if not isinstance(raw, dict):
        raise InvalidGraph(f"{place} must be a map")
    source, target = _text(raw, place, "source"), _text(raw, place, "target")
    source_handle = _handle(raw, place, "source_handle", "sourceHandle")
    target_handle = _handle(raw, place, "target_handle", "targetHandle")
    made = f"{source}.{source_handle}->{target}.{target_handle}"
    edge_id = raw.get("id") or made
    if not isinstance(edge_id, str):
        raise InvalidGraph(f"{place}.id must be a string")
    return Edge(edge_id, source, source_handle, target, target_handle)


def _text(raw: dict[str, Any], place: str, key: str) -> str:
    value = raw.get(key)
    if not isinstance(value, str) or not value:
        raise InvalidGraph(f"{place}.{key} must be a non-empty string")
    return value


def _handle(raw: dict[str, Any], place: str, *keys: str) -> str:
    value = next((raw[key] for key in keys if raw.get(key) is not None), "")
    if not isinstance(value, str):
        raise InvalidGraph(f"{place}.{keys[0]} must be a string")
    return value


def _position(value: Any, place: str) -> tuple[float, float] | None:
    if value is None:
        return None
    pair = [value.get("x"), value.get("y")] if isinstance(value, dict) else value
    if isinstance(pair, list) and len(pair) == 2 and all(type(item) in (int, float) for item in pair):
        return pair[0], pair[1]
    raise InvalidGraph(f"{place}.position must be [x, y] or {{x, y}}")
