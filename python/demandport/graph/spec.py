"""Port types, ports and node types: what fits what, and how a value is made to fit. Pure data."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from demandport.errors import BadMessage, TypeMismatch

# fmt: off
PORT_TYPES = frozenset((
    "any", "string", "prompt", "number", "integer", "boolean", "json", "image", "audio", "audio_stream", "stream",
    "document", "vector", "tensor", "embedding", "tools", "component", "model_handle", "embedding_handle",
    "database_handle", "vector_db", "kv_cache", "audio_samples",
))
# fmt: on
_TEXT = frozenset({"string", "prompt"})
_SAME = ({"string", "prompt"}, {"audio_stream", "stream"}, {"number", "integer"})
_AS_TEXT = frozenset({"json", "number", "integer", "boolean"})

#: Output port that a node of unknown ports is taken to have where none is named.
_ONLY = "output"

#: The mark of a port that has no default.
REQUIRED: Any = type("Required", (), {"__repr__": lambda self: "REQUIRED"})()


@dataclass(frozen=True, slots=True)
class Port:
    """A named input or output of a node type.

    Attributes:
        type: one of `PORT_TYPES`.
        default: value when nothing gives one; `REQUIRED` for none. Inputs only.
        multiple: takes several edges, whose values arrive as a list in edge order. Inputs only.
    """

    name: str = ""
    type: str = "any"
    default: Any = REQUIRED
    multiple: bool = False
    description: str = ""

    @property
    def required(self) -> bool:
        return self.default is REQUIRED

    def describe(self, *, output: bool = False) -> dict[str, Any]:
        """The port as `node_types` reports it."""
        about = {"name": self.name, "type": self.type, "description": self.description}
        if output:
            return about
        return about | {
            "required": self.required,
            "multiple": self.multiple,
            "default": None if self.required else self.default,
        }


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """A node type: its ports, and the function that runs it.

    Attributes:
        runs: execution class: inline, async, thread, cpu or host.
        call: the author's function; takes the inputs by name.
        style: function, generator, async_function or async_generator.
        stream: the output port that a generator's chunks go to.
        context: name of the parameter that takes the `Context`, if there is one.
        open_inputs: takes input ports of any further name. open_outputs: gives outputs of any further name.
        branches: may leave out output ports; what hangs on those is skipped.
        otherwise: what runs it where whoever runs it first hands it back.
    """

    node_type: str
    call: Callable[..., Any]
    inputs: dict[str, Port]
    outputs: dict[str, Port]
    runs: str
    style: str = "function"
    category: str = "custom"
    description: str = ""
    stream: str = ""
    context: str | None = None
    open_inputs: bool = False
    branches: bool = False
    single: str | None = field(default=None)
    open_outputs: bool = False
    otherwise: NodeSpec | None = None

    def describe(self) -> dict[str, Any]:
        """The descriptor of protocol/SPEC.md, section 8."""
        return {
            "node_type": self.node_type,
            "category": self.category,
            "description": self.description,
            "runs": self.runs,
            "inputs": [port.describe() for port in self.inputs.values()],
            "outputs": [port.describe(output=True) for port in self.outputs.values()],
            "open_inputs": self.open_inputs,
        }


def spec_from(description: Mapping[str, Any]) -> NodeSpec:
    """The ports that a host says one of its node types has, as `NodeSpec.describe` writes them or as names alone.

    Where it names no inputs, or no outputs, any are taken. Nothing runs it yet.

    Raises:
        BadMessage: it is no description; its place is named.
    """
    node_type = description["node_type"]
    ports = {kind: _ports_from(f"{node_type}.{kind}", description.get(kind)) for kind in ("inputs", "outputs")}
    outputs = ports["outputs"]
    return NodeSpec(
        node_type=node_type,
        call=_nobody,
        inputs=ports["inputs"] or {},
        outputs=outputs or {},
        runs="host",
        category=str(description.get("category", "custom")),
        description=str(description.get("description", "")),
        stream=next(iter(outputs), _ONLY) if outputs else _ONLY,
        open_inputs=ports["inputs"] is None or bool(description.get("open_inputs")),
        open_outputs=outputs is None,
        branches=outputs is None or bool(description.get("branches")),
    )


def _nobody() -> None:
    raise AssertionError("who takes it in says what runs it")


def _ports_from(place: str, ports: Any) -> dict[str, Port] | None:
    if ports is None:
        return None
    if type(ports) is not list:
        raise BadMessage(f"{place} must be a list of ports, not {_shown(ports)}")
    return {port.name: port for port in (_port_from(f"{place}[{index}]", port) for index, port in enumerate(ports))}


def _port_from(place: str, port: Any) -> Port:
    about = {"name": port} if type(port) is str else port
    if type(about) is not dict or type(about.get("name")) is not str or not about["name"]:
        raise BadMessage(f"{place} must be a name or a map with a name, not {_shown(port)}")
    kind = about.get("type", "any")
    if kind not in PORT_TYPES:
        raise BadMessage(f"{place}.type must be a port type, not {_shown(kind)}")
    required = about.get("required", "default" not in about)
    default = REQUIRED if required else about.get("default")
    return Port(about["name"], kind, default, bool(about.get("multiple")), str(about.get("description", "")))


def fits(source: str, target: str) -> bool:
    """Whether an edge may join an output of type `source` to an input of type `target`."""
    if source == target or "any" in (source, target):
        return True
    if any(source in pair and target in pair for pair in _SAME):
        return True
    return (target in _TEXT and source in _AS_TEXT) or (source in _TEXT and target == "json")


Convert = Callable[[Any], Any]


def converter(type_name: str) -> Convert | None:
    """How a value is made to fit an input of that type; None when every value fits as it is.

    The function raises `TypeMismatch`, and nothing else, for a value that cannot be made to fit. A None always passes:
    it stands for "no value" in optional ports.
    """
    return _CONVERTERS.get(type_name)


def as_text(value: Any) -> str:
    """Any value as text: strings as they are, the rest as JSON.

    Raises:
        TypeMismatch: it has no text.
    """
    if type(value) is str:
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        pass
    try:
        return str(value)
    except Exception as failed:  # an author's __str__ may raise anything
        name, why = type(value).__name__, type(failed).__name__
        raise TypeMismatch(f"wants text, and a value of type {name} cannot be shown: {why}") from None


def read_json(text: str) -> Any:
    """The value that JSON text stands for.

    Raises:
        ValueError: it is no JSON; NaN and infinities are none either.
    """
    try:
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _to_text(value: Any) -> Any:
    if type(value) is str or value is None:
        return value
    if isinstance(value, bool | int | float | dict | list | tuple):
        return as_text(value)
    raise TypeMismatch(f"wants text, not {type(value).__name__}")


def _to_number(value: Any) -> Any:
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise TypeMismatch(f"wants a number, not {_shown(value)}")


def _to_integer(value: Any) -> Any:
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    raise TypeMismatch(f"wants an integer, not {_shown(value)}")


def _to_boolean(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    raise TypeMismatch(f"wants true or false, not {_shown(value)}")


def _to_json(value: Any) -> Any:
    if type(value) is not str:
        return value
    try:
        return read_json(value)
    except ValueError as failed:
        raise TypeMismatch(f"wants JSON, and the text does not parse: {failed}") from None


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # an author's __repr__ may raise anything
        text = type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."


_CONVERTERS: dict[str, Convert] = {
    "string": _to_text,
    "prompt": _to_text,
    "number": _to_number,
    "integer": _to_integer,
    "boolean": _to_boolean,
    "json": _to_json,
}
