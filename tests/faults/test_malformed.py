"""Messages that are wrong in every place, and frames that are no messages: each is answered, and none does harm."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from demandport.errors import DemandportError
from demandport.wire.codec import Codec
from demandport.wire.terms import ErlangTerm
from support import ServiceProcess, count, framed

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
    ["close", 1, "other"],
    ["snapshot", 1, "named"],
    ["edit", 1, "named", OPERATIONS],
    ["get_output", 1, "named", "b", "text"],
    ["demand", 1, "named", "b", {"deadline_ms": 60_000, "credit": 9, "priority": 1, "events": True, "coalesce_ms": 1}],
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
CODECS = ["msgpack", "etf"]


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


@pytest.fixture(scope="module", params=CODECS)
def host(request: pytest.FixtureRequest) -> Iterator[ServiceProcess]:
    """A service with a session that the messages name, and one that they do not."""
    with ServiceProcess("--codec", request.param) as service:
        for session in ("named", "untouched"):
            assert service.request("open", session, GRAPH)[0] == "ok"
        yield service


def answers(host: ServiceProcess, payloads: list[bytes]) -> Counter[str]:
    """Send frames; returns how many were answered by which code. None is a bug of the service's, and a good one after
    them is answered."""
    good = host.new_id()
    host.write(b"".join(map(framed, [*payloads, host.codec.encode(["ping", good])])))
    silent = sum(is_credit(host.codec, payload) for payload in payloads)
    found: Counter[str] = Counter()
    bugs, ponged = [], False
    while not ponged or found.total() < len(payloads) - silent:
        message = host.receive(logs=True)
        if message[:2] == ["ok", good]:
            ponged = True
        elif message[0] in ("ok", "demand_complete"):
            found["ok"] += 1
        elif message[0] in ("error", "demand_error"):
            found[message[2]["code"]] += 1
        elif message[0] == "log" and message[1] not in ("info", "warning"):
            bugs.append(message)
    host.says_nothing_more()
    assert not bugs and not found["internal"] and found.total() <= len(payloads)
    assert host.request("demand", "untouched", "b")[2] == {"text": "<x>"}
    return found


def is_credit(codec: Codec, payload: bytes) -> bool:
    """Whether it need not be answered."""
    try:
        return codec.decode(payload)[0] == "credit"
    except (DemandportError, IndexError):
        return False


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message[0])
def test_a_message_that_is_wrong_in_any_place_is_answered(host: ServiceProcess, message: list[Any]) -> None:
    paths = [path for path in places(message) if path != (0,)]
    wrong = [put([message[0], host.new_id(), *message[2:]], path, odd) for path in paths for odd in [*ODD, GONE]]
    assert answers(host, [host.codec.encode(message) for message in wrong])["bad_message"]


def test_an_operation_that_is_none_is_a_bad_message(host: ServiceProcess) -> None:
    wrong = [["edit", host.new_id(), "named", [{"op": odd, "node": "a"}]] for odd in ODD]
    assert answers(host, [host.codec.encode(message) for message in wrong]) == {"bad_message": len(wrong)}


def test_random_and_bent_frames_are_answered(host: ServiceProcess) -> None:
    rng = random.Random(5)
    good = [host.codec.encode(message) for message in MESSAGES]
    left, found = count(3_000, 5_000_000), Counter()
    while left:
        left -= (number := min(left, 500))
        random_ones = [rng.randbytes(rng.randrange(60)) for _ in range(number // 5)]
        bent = [bend(rng, rng.choice(good), rng.choice(good)) for _ in range(number - len(random_ones))]
        found += answers(host, random_ones + bent)
    assert found["bad_message"] and found["bad_frame"] and found["ok"]
