"""demandport: workflow graphs and local language models behind an Erlang port."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Context", "Port", "__version__", "node"]

if TYPE_CHECKING:
    from demandport.engine.node import Context, node
    from demandport.graph.spec import Port


def __getattr__(name: str) -> Any:
    # Lazy: the service must own its file descriptors before anything else of the package is imported.
    if name in ("Context", "node"):
        from demandport.engine import node as module

        return getattr(module, name)
    if name == "Port":
        from demandport.graph.spec import Port

        return Port
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
