"""The host's messages as types, and their shapes: one table says every field, its type and its range.

`parse` turns a decoded message into one of these types or raises `BadMessage` naming the field.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from demandport.errors import BadMessage
from demandport.ids import CallId, DemandId, NodeId, PortName, RequestId, SessionId
from demandport.wire.framing import MAX_FRAME_BYTES

PROTOCOL = 1
MAX_ID = (1 << 64) - 1
MAX_NAME_BYTES = 1024


@dataclass(slots=True)
class HelloOptions:
    protocol: list[int]
    client: str = ""
    max_frame_bytes: int | None = None
    part_bytes: int | None = None
    features: list[Any] | None = None


@dataclass(slots=True)
class OpenOptions:
    """What a session is opened with.

    Attributes:
        host_types: node types that the host runs: a list of names and descriptors, or ``all``.
        host_else: those that it runs where the core does not.
        event_history: events that are kept for who subscribes; 0: none until somebody does.
        edits: operations that the graph is changed by before anybody sees it.
    """

    max_running: int = 64
    max_queued: int = 10_000
    host_types: list[Any] | Literal["all"] = field(default_factory=list)
    host_else: list[Any] | Literal["all"] = field(default_factory=list)
    host_timeout_ms: int = 300_000
    event_history: int = 0
    edits: list[Any] = field(default_factory=list)


@dataclass(slots=True)
class DemandOptions:
    deadline_ms: int | None = None
    credit: int | None = None
    priority: int = 0
    events: bool = False
    coalesce_ms: int = 0
    coalesce_bytes: int = 0


@dataclass(slots=True)
class ManyOptions:
    mode: Literal["all", "try", "race"] = "all"
    limit: int | None = None
    deadline_ms: int | None = None
    priority: int = 0
    events: bool = False


@dataclass(slots=True)
class SubscribeOptions:
    """Which events: `since`, the number of the first (None: those yet to come), and of which `kinds` (None: all)."""

    since: int | None = None
    kinds: list[str] | None = None


@dataclass(slots=True)
class LoadOptions:
    model: str
    context_length: int | None = None
    gpu_layers: int = 0
    threads: int | None = None
    replicas: int = 1
    balance: str = "least_loaded"
    purpose: Literal["generate", "embed", "rerank"] = "generate"


@dataclass(slots=True)
class UnloadOptions:
    """Which model: `model` by name, or `id` for the very one that a `model_ref` names."""

    model: str | None = None
    id: str | None = None
    when_busy: Literal["refuse", "wait", "stop"] = "stop"


@dataclass(slots=True)
class Hello:
    id: RequestId
    options: HelloOptions


@dataclass(slots=True)
class Open:
    id: RequestId
    session: SessionId
    graph: dict[str, Any]
    options: OpenOptions


@dataclass(slots=True)
class Close:
    id: RequestId
    session: SessionId


@dataclass(slots=True)
class Snapshot:
    id: RequestId
    session: SessionId


@dataclass(slots=True)
class Edit:
    id: RequestId
    session: SessionId
    operations: list[Any]


@dataclass(slots=True)
class GetOutput:
    id: RequestId
    session: SessionId
    node: NodeId
    port: PortName


@dataclass(slots=True)
class Demand:
    id: DemandId
    session: SessionId
    node: NodeId
    options: DemandOptions


@dataclass(slots=True)
class DemandMany:
    id: DemandId
    session: SessionId
    nodes: list[NodeId]
    options: ManyOptions


@dataclass(slots=True)
class Subscribe:
    id: RequestId
    session: SessionId
    options: SubscribeOptions


@dataclass(slots=True)
class Unsubscribe:
    id: RequestId
    session: SessionId


@dataclass(slots=True)
class Answer:
    """The end of a call to the host: `value` holds outputs by port, or the error."""

    call: CallId
    status: Literal["ok", "error"]
    value: Any


@dataclass(slots=True)
class AnswerStream:
    call: CallId
    chunk: Any
    port: PortName | None


@dataclass(slots=True)
class Cancel:
    id: RequestId
    demand: DemandId


@dataclass(slots=True)
class Credit:
    demand: DemandId
    n: int


@dataclass(slots=True)
class Validate:
    id: RequestId
    graph: dict[str, Any]


@dataclass(slots=True)
class NodeTypes:
    id: RequestId
    filter: str | dict[str, Any] | None


@dataclass(slots=True)
class Models:
    id: RequestId


@dataclass(slots=True)
class LoadModel:
    id: RequestId
    spec: LoadOptions


@dataclass(slots=True)
class UnloadModel:
    id: RequestId
    options: UnloadOptions


@dataclass(slots=True)
class Health:
    id: RequestId


@dataclass(slots=True)
class Ping:
    id: RequestId


@dataclass(slots=True)
class Drain:
    id: RequestId
    timeout_ms: int


Check = Callable[[str, Any], Any]


def _fail(name: str, wanted: str, value: Any) -> BadMessage:
    shown = repr(value)
    return BadMessage(f"{name} must be {wanted}, not {shown if len(shown) <= 60 else shown[:57] + '...'}")


def _integer(low: int, high: int) -> Check:
    def check(name: str, value: Any) -> int:
        if type(value) is int and low <= value <= high:
            return value
        raise _fail(name, f"an integer from {low} to {high}", value)

    return check


def _optional(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


def _one_of(*choices: str) -> Check:
    def check(name: str, value: Any) -> str:
        if type(value) is str and value in choices:
            return value
        raise _fail(name, f"one of {', '.join(choices)}", value)

    return check


def _name(name: str, value: Any) -> str:
    if type(value) is str and 0 < len(value) <= MAX_NAME_BYTES:
        return value
    raise _fail(name, f"a string of 1 to {MAX_NAME_BYTES} characters", value)


def _string(name: str, value: Any) -> str:
    if type(value) is str:
        return value
    raise _fail(name, "a string", value)


def _boolean(name: str, value: Any) -> bool:
    if type(value) is bool:
        return value
    raise _fail(name, "true or false", value)


def _map(name: str, value: Any) -> dict[str, Any]:
    if type(value) is dict:
        return value
    raise _fail(name, "a map", value)


def _list(name: str, value: Any) -> list[Any]:
    if type(value) is list:
        return value
    raise _fail(name, "a list", value)


def _versions(name: str, value: Any) -> list[int]:
    if type(value) is list and len(value) == 2 and all(type(item) is int for item in value) and value[0] <= value[1]:
        return value
    raise _fail(name, "[lowest, highest] protocol version", value)


def _filter(name: str, value: Any) -> str | dict[str, Any] | None:
    if value is None or type(value) is str:
        return value
    if type(value) is dict and set(value) <= {"category"}:
        return value
    raise _fail(name, "nil, a node type or {category}", value)


def _any(name: str, value: Any) -> Any:
    return value


def _names(name: str, value: Any) -> list[Any]:
    return [_name(f"{name}[{index}]", item) for index, item in enumerate(_list(name, value))]


def _some_names(name: str, value: Any) -> list[Any]:
    if not value:
        raise _fail(name, "a list of at least one name", value)
    return _names(name, value)


def _claims(name: str, value: Any) -> Any:
    """Node types that the host runs: names, or descriptors that say their ports."""
    if value == "all":
        return value
    if type(value) is not list:
        raise _fail(name, 'a list of node types or "all"', value)
    for index, item in enumerate(value):
        _name(f"{name}[{index}]", item.get("node_type") if type(item) is dict else item)
    return value


_id = _integer(1, MAX_ID)
_milliseconds = _integer(0, 1 << 40)
_bytes = _integer(0, 1 << 40)


def _options(cls: type[Any], checks: dict[str, Check]) -> Check:
    required = {one.name for one in fields(cls) if one.default is MISSING and one.default_factory is MISSING}

    unset = None if required else cls()  # shared: nobody writes to options

    def check(name: str, value: Any) -> Any:
        if not value and unset is not None and (value is None or type(value) is dict):
            return unset
        values = {key: checks[key](f"{name}.{key}", item) for key, item in _known(name, value, checks)}
        for missing in required - values.keys():
            raise BadMessage(f"{name}.{missing} is missing")
        return cls(**values)

    return check


def _known(name: str, value: Any, checks: dict[str, Check]) -> Any:
    for key in _map(name, value):
        if key not in checks:
            raise BadMessage(f"{name} has no option {key!r}; there are {', '.join(checks)}")
    return value.items()


_unload_options = _options(
    UnloadOptions,
    {"model": _optional(_name), "id": _optional(_name), "when_busy": _one_of("refuse", "wait", "stop")},
)


def _unload(name: str, value: Any) -> UnloadOptions:
    if type(value) is str:
        return UnloadOptions(_name(name, value))
    options: UnloadOptions = _unload_options(name, value)
    if (options.model is None) == (options.id is None):
        raise BadMessage(f"{name} must have model or id, and not both")
    return options


_demand_options = _options(
    DemandOptions,
    {
        "deadline_ms": _optional(_milliseconds),
        "credit": _optional(_integer(0, MAX_ID)),
        "priority": _integer(-100, 100),
        "events": _boolean,
        "coalesce_ms": _integer(0, 60_000),
        "coalesce_bytes": _bytes,
    },
)
_OPTIONAL_AT_END = {"options", "filter", "port"}

#: Messages whose number is that of something else than a request.
_WITHOUT_REPLY = ("credit", "answer", "answer_stream")

#: Message type → its class and, in order, its fields with the check of each.
SHAPES: dict[str, tuple[type[Any], list[tuple[str, Check]]]] = {
    "hello": (
        Hello,
        [
            ("id", _id),
            (
                "options",
                _options(
                    HelloOptions,
                    {
                        "protocol": _versions,
                        "client": _string,
                        "max_frame_bytes": _optional(_integer(4096, 1 << 32)),
                        "part_bytes": _optional(_integer(4096, MAX_FRAME_BYTES)),
                        "features": _optional(_list),
                    },
                ),
            ),
        ],
    ),
    "open": (
        Open,
        [
            ("id", _id),
            ("session", _name),
            ("graph", _map),
            (
                "options",
                _options(
                    OpenOptions,
                    {
                        "max_running": _integer(1, 100_000),
                        "max_queued": _integer(0, 1_000_000),
                        "host_types": _claims,
                        "host_else": _claims,
                        "host_timeout_ms": _integer(1, 1 << 40),
                        "event_history": _integer(0, 100_000),
                        "edits": _list,
                    },
                ),
            ),
        ],
    ),
    "close": (Close, [("id", _id), ("session", _name)]),
    "snapshot": (Snapshot, [("id", _id), ("session", _name)]),
    "edit": (Edit, [("id", _id), ("session", _name), ("operations", _list)]),
    "get_output": (GetOutput, [("id", _id), ("session", _name), ("node", _name), ("port", _name)]),
    "demand": (
        Demand,
        [
            ("id", _id),
            ("session", _name),
            ("node", _name),
            ("options", _demand_options),
        ],
    ),
    "demand_many": (
        DemandMany,
        [
            ("id", _id),
            ("session", _name),
            ("nodes", _some_names),
            (
                "options",
                _options(
                    ManyOptions,
                    {
                        "mode": _one_of("all", "try", "race"),
                        "limit": _optional(_integer(1, 100_000)),
                        "deadline_ms": _optional(_milliseconds),
                        "priority": _integer(-100, 100),
                        "events": _boolean,
                    },
                ),
            ),
        ],
    ),
    "subscribe": (
        Subscribe,
        [
            ("id", _id),
            ("session", _name),
            (
                "options",
                _options(SubscribeOptions, {"since": _optional(_integer(0, MAX_ID)), "kinds": _optional(_names)}),
            ),
        ],
    ),
    "unsubscribe": (Unsubscribe, [("id", _id), ("session", _name)]),
    "answer": (Answer, [("call", _id), ("status", _one_of("ok", "error")), ("value", _any)]),
    "answer_stream": (AnswerStream, [("call", _id), ("chunk", _any), ("port", _optional(_name))]),
    "cancel": (Cancel, [("id", _id), ("demand", _id)]),
    "credit": (Credit, [("demand", _id), ("n", _integer(1, MAX_ID))]),
    "validate": (Validate, [("id", _id), ("graph", _map)]),
    "node_types": (NodeTypes, [("id", _id), ("filter", _filter)]),
    "models": (Models, [("id", _id)]),
    "load_model": (
        LoadModel,
        [
            ("id", _id),
            (
                "spec",
                _options(
                    LoadOptions,
                    {
                        "model": _name,
                        "context_length": _optional(_integer(8, 1 << 22)),
                        "gpu_layers": _integer(-1, 10_000),
                        "threads": _optional(_integer(1, 512)),
                        "replicas": _integer(1, 64),
                        "balance": _one_of("least_loaded", "round_robin"),
                        "purpose": _one_of("generate", "embed", "rerank"),
                    },
                ),
            ),
        ],
    ),
    "unload_model": (UnloadModel, [("id", _id), ("model", _unload)]),
    "health": (Health, [("id", _id)]),
    "ping": (Ping, [("id", _id)]),
    "drain": (Drain, [("id", _id), ("timeout_ms", _milliseconds)]),
}


def parse(message: list[Any]) -> Any:
    """The typed message that a decoded array stands for.

    Raises:
        BadMessage: unknown type, wrong number of fields, or a field of the wrong type or range, which is named.
    """
    kind = message[0]
    if kind == "demand":
        quick = _quick_demand(message)
        if quick is not None:
            return quick
    try:
        cls, shape = SHAPES[kind]
    except (KeyError, TypeError):
        raise BadMessage(f"unknown message type {kind!r:.60}") from None
    given = len(message) - 1
    if given != len(shape):
        if given == len(shape) - 1 and shape[-1][0] in _OPTIONAL_AT_END:
            message = [*message, None]
        else:
            raise BadMessage(f"{kind} has {len(shape)} fields ({', '.join(name for name, _ in shape)}), not {given}")
    return cls(*[check(name, value) for (name, check), value in zip(shape, message[1:], strict=True)])


def _quick_demand(message: list[Any]) -> Demand | None:
    """The message that comes most often, read in one go; None unless all is well: then `parse` says what is not."""
    given = len(message)
    if given not in (4, 5):
        return None
    id, session, node = message[1:4]
    if (
        type(id) is int
        and type(session) is type(node) is str
        and 0 < id <= MAX_ID
        and 0 < len(session) <= MAX_NAME_BYTES
        and 0 < len(node) <= MAX_NAME_BYTES
    ):
        options = _quick_options(message[4] if given == 5 else None)
        return Demand(DemandId(id), SessionId(session), NodeId(node), options)
    return None


def _quick_options(given: Any) -> DemandOptions:
    """Those that come most often, credit alone, without asking the table."""
    if type(given) is dict and len(given) == 1:
        credit = given.get("credit")
        if type(credit) is int and 0 <= credit <= MAX_ID:
            return DemandOptions(None, credit)
    options: DemandOptions = _demand_options("options", given)
    return options


def readable_id(message: list[Any]) -> int:
    """The id of a message that could not be parsed, or 0 when none can be read, or it stands for what is no request."""
    if message and message[0] in _WITHOUT_REPLY:
        return 0
    found = message[1] if len(message) > 1 else 0
    return found if type(found) is int and 0 < found <= MAX_ID else 0
