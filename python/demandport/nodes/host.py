"""Node types whose logic is the host's: what it claims at `open` it runs, what it does not nobody runs."""

from __future__ import annotations

from typing import Annotated, Any

from demandport.engine.node import node
from demandport.graph.spec import Port


@node("tool-executor", runs="host", category="host", outputs={"result": "any"})
async def tool_executor(tool: str, arguments: Annotated[Any, Port(type="json", default=None)] = None) -> Any:
    """Runs one of the host's tools, by its name."""


@node("rag-search", runs="host", category="host", outputs={"documents": "json", "context": "string"})
async def rag_search(query: str, limit: int = 5) -> Any:
    """Has the host find documents for a query, and put them together as context for a prompt."""
