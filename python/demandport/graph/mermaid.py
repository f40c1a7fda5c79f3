"""A graph as a Mermaid flowchart, for people."""

from __future__ import annotations

from demandport.graph.model import Graph


def mermaid(graph: Graph) -> str:
    """The flowchart's text. Nodes are numbered, since ids may hold anything."""
    number = {node_id: f"n{index}" for index, node_id in enumerate(graph.nodes)}
    lines = ["flowchart LR"]
    for node in graph.nodes.values():
        lines.append(f'    {number[node.id]}["{_quoted(node.id)}<br/>{_quoted(node.node_type)}"]')
    for edge in graph.edges.values():
        if edge.source in number and edge.target in number:
            label = _quoted(f"{edge.source_handle} → {edge.target_handle}") if edge.source_handle else ""
            arrow = f'-->|"{label}"|' if label else "-->"
            lines.append(f"    {number[edge.source]} {arrow} {number[edge.target]}")
    return "\n".join(lines)


def _quoted(text: str) -> str:
    return (
        text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;").replace("\n", " ")
    )
