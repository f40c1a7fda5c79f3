"""What node authors use: the `@node` decorator and the `Context`.

    @node("shout", runs="inline")
    def shout(text: str, times: int = 1) -> str:
        "Upper-cases a text."
        return text.upper() * times

Input ports, their types and defaults come from the signature, the output port from the return hint. A generator streams
what it yields; text chunks joined are the value of its output.
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, Protocol, TypeVar, get_args, get_origin, get_type_hints

from demandport.errors import NodeFailed
from demandport.graph.spec import PORT_TYPES, REQUIRED, NodeSpec, Port

_RUNS = ("inline", "async", "thread", "cpu", "host")
F = TypeVar("F", bound=Callable[..., Any])
_STREAMS = (Generator, AsyncGenerator, Iterator, AsyncIterator)
_TYPES: dict[Any, str] = {str: "string", bool: "boolean", int: "integer", float: "number", dict: "json", list: "json"}

#: Node types declared so far in this process, in order; `registry` takes them from here.
DECLARED: dict[str, NodeSpec] = {}


class Runtime(Protocol):
    """What the executor lends a running node, through its `Context`."""

    resources: Mapping[str, Any]

    async def emit(self, port: str, chunk: Any) -> None: ...
    async def room(self) -> None: ...
    def write(self, port: str, text: str) -> None: ...
    def emit_from_thread(self, port: str, chunk: Any) -> None: ...
    def event(self, event: str, fields: dict[str, Any]) -> None: ...
    async def wait_input(self, port: str) -> Any: ...
    def open_graph(self, data: dict[str, Any]) -> Any: ...
    @property
    def deadline(self) -> float | None: ...
    @property
    def priority(self) -> int: ...
    @property
    def cancelled(self) -> bool: ...


class Context:
    """A running node's way to its demand. A parameter with this type hint receives it.

    Attributes:
        node: id of the node. node_type: its type. resources: what the service lends to nodes, by name.
    """

    __slots__ = ("_runtime", "_spec", "extra", "node", "node_type", "resources")

    def __init__(self, node: str, spec: NodeSpec, runtime: Runtime) -> None:
        self.node = node
        self.node_type = spec.node_type
        self.resources = runtime.resources
        self.extra: dict[str, Any] = {}
        self._spec = spec
        self._runtime = runtime

    async def emit(self, chunk: Any, port: str | None = None) -> None:
        """Stream `chunk` on an output port (default: the first). Text joined is the port's value, unless returned.

        Waits while consumers of values other than text have no credit left.
        """
        await self._runtime.emit(port or self._spec.stream, chunk)

    def write(self, text: str, port: str | None = None) -> None:
        """`emit` for text, on the event loop: text need not wait, since what a consumer does not take is merged."""
        self._runtime.write(port or self._spec.stream, text)

    async def room(self) -> None:
        """Wait while a consumer has not taken what was streamed: for producers of text that can be held up at their
        source. `emit` does so for other values by itself."""
        await self._runtime.room()

    def emit_from_thread(self, chunk: Any, port: str | None = None) -> None:
        """`emit` for functions that run in a thread or a worker; blocks instead of waiting. Raises `Cancelled`."""
        self._runtime.emit_from_thread(port or self._spec.stream, chunk)

    def output(self, port: str, value: Any) -> None:
        """Give an output port its value, where the return value cannot say it (generators)."""
        self.extra[port] = value

    def progress(self, done: float, total: float | None = None, unit: str = "") -> None:
        """Report progress to demands that asked for events. Does not wait for them."""
        self._runtime.event("task_progress", {"done": done, "total": total, "unit": unit})

    def event(self, event: str, **fields: Any) -> None:
        """Send an event of the node's own to demands that asked for events. Does not wait for them."""
        self._runtime.event(event, fields)

    def log(self, level: str, message: str, **metadata: Any) -> None:
        """Log through the service: level debug, info, warning or error."""
        import logging

        number = logging.getLevelNamesMapping().get(level.upper(), logging.INFO)
        logging.getLogger(f"node.{self.node_type}").log(
            number, message, extra={"metadata": {"node": self.node, **metadata}}
        )

    async def wait_input(self, port: str) -> Any:
        """Wait until the host sets this node's input `port` by `set_input`; returns the value."""
        return await self._runtime.wait_input(port)

    def open_graph(self, data: dict[str, Any]) -> Any:
        """A `Session` of a graph that this node evaluates itself, with the node types and resources of its own session.

        Close it when the node is done.

        Raises:
            DemandportError: the graph breaks a rule.
        """
        return self._runtime.open_graph(data)

    @property
    def deadline(self) -> float | None:
        """When the last demand that wants this node gives up, on the clock of `time.monotonic`; None for never. In a
        worker this, and the priority, is what it was when the node was given to the pool."""
        return self._runtime.deadline

    @property
    def remaining_s(self) -> float | None:
        """Seconds until the deadline, at least 0; None without one."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    @property
    def priority(self) -> int:
        """The highest priority of the demands that want this node, -100 to 100; 0 unless they say another."""
        return self._runtime.priority

    @property
    def cancelled(self) -> bool:
        """No demand wants this node any more. Functions in threads and workers should look now and then, and return."""
        return self._runtime.cancelled


def node(
    node_type: str,
    *,
    runs: str | None = None,
    category: str = "custom",
    description: str | None = None,
    outputs: Mapping[str, str | Port] | None = None,
    stream: str | None = None,
    branches: bool = False,
) -> Callable[[F], F]:
    """Declare a function, generator, async function or async generator as a node type.

    Args:
        node_type: the name that graphs use.
        runs: ``inline`` (pure and fast; in the event loop itself), ``async``, ``thread`` (may block), or ``cpu``
            (computes; in a worker process that imports the module of the function, and may crash or be killed there).
            Default: ``async`` for async functions, else ``thread``. With ``host`` the function, an async one, says the
            ports alone: the host runs the node.
        category: for palettes. description: default is the first line of the docstring.
        outputs: port name → port type or `Port`. Default: one port ``output`` typed by the return hint. With one port,
            the function returns its value; with several, a dict by port.
        stream: output port that yielded chunks go to; default the first.
        branches: some output ports may be left out; what hangs on them is then skipped.

    Returns:
        the function itself, with its `NodeSpec` as ``node_spec``.

    Raises:
        TypeError: the declaration contradicts itself, or another function has the name.
    """

    if not isinstance(node_type, str) or not node_type:
        raise TypeError(f'@node takes the name of the node type first, as in @node("shout"), not {node_type!r:.60}')

    def declare(function: F) -> F:
        if not callable(function):
            raise TypeError(f"{node_type}: @node stands before a function, not before {function!r:.60}")
        spec = _spec_of(function, node_type, runs, category, description, outputs, stream, branches)
        other = DECLARED.get(node_type)
        if other is not None and _place(other.call) != _place(function):
            raise TypeError(f"{node_type}: {_place(other.call)} is a node type of that name already")
        DECLARED[node_type] = spec
        function.node_spec = spec  # type: ignore[attr-defined]
        return function

    return declare


def no_output(spec: NodeSpec, port: str) -> NodeFailed:
    """What a node is told that writes to an output port which it does not have."""
    return NodeFailed(f"{spec.node_type} has no output port {port!r}; its outputs: {', '.join(spec.outputs)}")


def _spec_of(
    function: Callable[..., Any],
    node_type: str,
    runs: str | None,
    category: str,
    description: str | None,
    outputs: Mapping[str, str | Port] | None,
    stream: str | None,
    branches: bool,
) -> NodeSpec:
    style = _style_of(function)
    runs = runs or ("async" if style.startswith("async") else "thread")
    if runs not in _RUNS:
        raise TypeError(f"{node_type}: runs is one of {', '.join(_RUNS)}, not {runs!r}")
    if (runs in ("async", "host")) != style.startswith("async") or (runs == "inline" and style != "function"):
        raise TypeError(f"{node_type}: a {style} cannot run {runs}")
    try:
        hints = get_type_hints(function, include_extras=True)
    except Exception as failed:
        raise TypeError(f"{node_type}: a type hint of {function.__name__} cannot be read: {failed}") from None
    inputs, context, open_inputs = _inputs_of(function, hints)
    ports = _outputs_of(hints.get("return", Any), outputs)
    if stream is not None and stream not in ports:
        raise TypeError(f"{node_type}: stream names the output port {stream!r}; there are {', '.join(ports)}")
    return NodeSpec(
        node_type=node_type,
        call=function,
        inputs=inputs,
        outputs=ports,
        runs=runs,
        style=style,
        category=category,
        description=description or (inspect.getdoc(function) or "").partition("\n")[0],
        stream=stream or next(iter(ports)),
        context=context,
        open_inputs=open_inputs,
        branches=branches,
        single=next(iter(ports)) if len(ports) == 1 else None,
    )


def _place(function: Callable[..., Any]) -> str:
    """Where a function is defined: a module that is loaded again declares its node types again."""
    return f"{function.__module__}.{function.__qualname__}"


def _style_of(function: Callable[..., Any]) -> str:
    if inspect.isasyncgenfunction(function):
        return "async_generator"
    if inspect.iscoroutinefunction(function):
        return "async_function"
    return "generator" if inspect.isgeneratorfunction(function) else "function"


def _inputs_of(function: Callable[..., Any], hints: dict[str, Any]) -> tuple[dict[str, Port], str | None, bool]:
    inputs: dict[str, Port] = {}
    context, open_inputs = None, False
    for name, parameter in inspect.signature(function).parameters.items():
        if _is_context(hints.get(name)):
            if context is not None:
                raise TypeError(f"{function.__name__}: {context} and {name} are both the Context")
            context = name
        elif parameter.kind is parameter.VAR_KEYWORD:
            open_inputs = True
        elif parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            default = REQUIRED if parameter.default is parameter.empty else parameter.default
            inputs[name] = _checked(replace(_port_of(hints.get(name, Any)), name=name, default=default))
        else:
            raise TypeError(f"{function.__name__}: the parameter {name} cannot be a port")
    return inputs, context, open_inputs


def _is_context(hint: Any) -> bool:
    return hint is Context or [item for item in get_args(hint) if item is not type(None)] == [Context]


def _outputs_of(hint: Any, outputs: Mapping[str, str | Port] | None) -> dict[str, Port]:
    if outputs is not None and not isinstance(outputs, Mapping):
        raise TypeError(f"outputs is a map from port name to port type, not {outputs!r:.60}")
    if outputs:
        return {
            name: _checked(replace(port, name=name) if isinstance(port, Port) else Port(name, port))
            for name, port in outputs.items()
        }
    if get_origin(hint) in _STREAMS:
        hint = get_args(hint)[0]
    return {"output": _checked(replace(_port_of(hint), name="output"))}


def _checked(port: Port) -> Port:
    if port.type not in PORT_TYPES:
        raise TypeError(
            f"port {port.name}: there is no port type {port.type!r}; there are {', '.join(sorted(PORT_TYPES))}"
        )
    if not port.required:
        try:
            json.dumps(port.default)
        except (TypeError, ValueError) as failed:
            raise TypeError(f"port {port.name}: its default cannot be told to hosts: {failed}") from None
    return port


def _port_of(hint: Any) -> Port:
    if get_origin(hint) is Annotated:
        described = next((item for item in hint.__metadata__ if isinstance(item, Port)), None)
        return described or _port_of(hint.__origin__)
    plain = [item for item in get_args(hint) if item is not type(None)]
    if get_origin(hint) not in (dict, list) and len(plain) == 1 and type(None) in get_args(hint):
        return _port_of(plain[0])  # Optional[T]
    if plain in ([int, float], [float, int]):
        return Port(type="number")
    kind = get_origin(hint) or hint
    return Port(type=_TYPES.get(kind, "any") if isinstance(kind, type) else "any")
