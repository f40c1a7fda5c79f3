"""Messages that are wrong in every place, and frames that are bent: what a host should not send and may."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

from demandport.wire.terms import ErlangTerm

GRAPH = {
    "nodes": [
        {"id": "a", "node_type": "text-input", "data": {"text": "x"}, "position": {"x": 1.5, "y": -2}},
        {"id": "b", "node_type": "template", "data": {"template": "<{{x}}>"}},
    ],
    "edges": [{"id": "e", "source": "a", "source_handle": "text", "target": "b", "target_handle": "x"}],
}
OPERATIONS = [
    {"op": "add_node", "node": {"id": "c", "node_type": "text-output", "data": {"text": "y"}, "position": [1, 2]}},
    {"op": "add_edge", "edge": {"id": "f", "source": "b", "target": "c", "target_handle": "text"}},
    {"op": "set_input", "node": "b", "port": "x", "value": ErlangTerm(b"\x83h\2a\1a\2")},
    {"op": "clear_input", "node": "b", "port": "x"},
    {"op": "update_node_data", "node": "c", "data": {"text": None}},
    {"op": "invalidate", "node": "b"},
    {"op": "remove_edge", "edge": "f"},
    {"op": "remove_node", "node": "c"},
]
#: Every type of message but `drain`, after which nothing would be taken; they leave the session as it is.
MESSAGES: list[list[Any]] = [
    [
        "hello",
        1,
        {"protocol": [1, 1], "client": "c", "max_frame_bytes": 1 << 20, "part_bytes": 1 << 16, "features": []},
    ],
    ["open", 1, "named", GRAPH, {"max_running": 5, "max_queued": 5}],
    ["open", 1, "named", {"version": 1, "metadata": {}, "graph": GRAPH}, {}],
    [
        "open",
        1,
        "named",
        GRAPH,
        {"host_types": ["t", {"node_type": "u"}], "host_else": ["v"], "event_history": 9, "edits": OPERATIONS},
    ],
    ["close", 1, "other"],
    ["snapshot", 1, "named"],
    ["edit", 1, "named", OPERATIONS],
    ["get_output", 1, "named", "b", "text"],
    ["demand", 1, "named", "b", {"deadline_ms": 60_000, "credit": 9, "priority": 1, "events": True, "coalesce_ms": 1}],
    ["demand_many", 1, "named", ["a", "b"], {"mode": "race", "limit": 2, "deadline_ms": 60_000, "events": True}],
    ["subscribe", 1, "named", {"since": 0, "kinds": ["task_started"]}],
    ["unsubscribe", 1, "named"],
    ["answer", 1, "ok", {"text": "x"}],
    ["answer", 1, "error", {"code": "node_failed", "message": "m", "retryable": True}],
    ["answer_stream", 1, "chunk", "text"],
    ["cancel", 1, 2],
    ["credit", 1, 1],
    ["validate", 1, GRAPH],
    ["node_types", 1, {"category": "text"}],
    ["models", 1],
    ["load_model", 1, {"model": "/nowhere", "context_length": 64, "gpu_layers": 0, "threads": 1}],
    ["unload_model", 1, "/nowhere"],
    ["health", 1],
    ["ping", 1],
]
ODD: list[Any] = [
    None, True, 0, -1, 2, 1 << 63, 1 << 64, -(1 << 63) - 1, 1 << 5000, 1.5, float("nan"), float("-inf"), "", "a", "b",
    "s", "\0", "{{", "ä" * 5000, b"", b"\xff", [], [[]], {}, {"": None}, ErlangTerm(b"\x83h\0"),
    ["a"] * 2000, [{"id": "a"}] * 3, {"nodes": 1},
]  # fmt: skip
GONE = object()


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values inside a value."""
    items = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def put(value: Any, path: tuple[Any, ...], odd: Any) -> Any:
    """A copy with something else in one place, or with nothing there."""
    key, *rest = path
    copy = value.copy()
    if rest:
        copy[key] = put(value[key], tuple(rest), odd)
    elif odd is GONE:
        del copy[key]
    else:
        copy[key] = odd
    return copy


def bend(rng: random.Random, payload: bytes, other: bytes) -> bytes:
    """A copy with bytes changed, lost, repeated, or taken from another payload."""
    data = bytearray(payload)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at, size = rng.randrange(len(data) + 1), rng.randrange(1, 9)
        start = rng.randrange(len(other))
        patch = rng.choice(
            (rng.randbytes(size), other[start : start + 5 * size], b"", b"\xff" * 4, b"\x7f\xff\xff\xff", bytes(4))
        )
        data[at : at + rng.choice((0, len(patch), size))] = patch
    return bytes(data)


def all_wrong(message: list[Any], new_id: Callable[[], int]) -> Iterator[list[Any]]:
    """The message with each of the odd values, or with nothing, in every place but its type; each with an id of its
    own."""
    for path in places(message):
        if path != (0,):
            for odd in [*ODD, GONE]:
                yield put([message[0], new_id(), *message[2:]], path, odd)
