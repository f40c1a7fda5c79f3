"""The built-in node types, one module per family."""

#: Modules whose import declares the built-in node types.
BUILT_IN = tuple(
    f"demandport.nodes.{name}"
    for name in ("inputs", "logic", "fanout", "files", "generation", "models", "library", "host")
)
