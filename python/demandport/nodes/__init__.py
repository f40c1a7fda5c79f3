"""The built-in node types, one module per family."""

_FAMILIES = ("inputs", "logic", "fanout", "files", "process", "http", "generation", "models", "library", "host")
#: Modules whose import declares the built-in node types.
BUILT_IN = tuple(f"demandport.nodes.{name}" for name in _FAMILIES)
