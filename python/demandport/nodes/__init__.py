"""The built-in node types, one module per family."""

#: Modules whose import declares the built-in node types.
BUILT_IN = ("demandport.nodes.inputs", "demandport.nodes.logic", "demandport.nodes.files", "demandport.nodes.models")
