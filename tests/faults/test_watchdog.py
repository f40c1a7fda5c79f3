"""A loop that stands still answers pings, and loses, doubles and tears nothing of what it does once it turns again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from demandport.wire.codec import MsgpackCodec
from support import (
    TIMEOUT_S,
    ServiceProcess,
    count,
    environment,
    eventually,
    family,
    framed,
    gone,
    is_terminal,
    parent_of_service,
    settle,
)

each_kind = pytest.mark.parametrize("kind", ["t-stall", "t-stall-async"])


class Stall:
    """A FIFO that the nodes `t-stall…` read: they stand, and the loop with them, until `end`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "gate"
        os.mkfifo(self.path)
        self._fd = -1

    def begun(self) -> None:
        """Return once a node stands."""
        assert eventually(self._opened, TIMEOUT_S), "no node came to the gate"

    def end(self) -> None:
        os.write(self._fd, b"open")
        os.close(self._fd)

    def _opened(self) -> bool:
        try:
            self._fd = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody reads it yet
            return False
        return True


@pytest.fixture
def stall(tmp_path: Path) -> Stall:
    return Stall(tmp_path)


@pytest.fixture(params=["msgpack", "etf"])
def either(request: pytest.FixtureRequest, nodes: Path) -> Iterator[ServiceProcess]:
    """A service that speaks either codec."""
    with ServiceProcess("--codec", request.param, nodes=nodes) as service:
        yield service


def stands(service: ServiceProcess, stall: Stall, *behind: list[Any], kind: str = "t-stall", more: bytes = b"") -> None:
    """Have the loop stand in demand 1, with messages read and not handled behind it."""
    service.open("s", ("a", kind, {"gate": str(stall.path)}), ("b", "t-large", {"size": 1 << 20}))
    messages = [["demand", 1, "s", "a"], *behind]
    service.write(b"".join(framed(service.codec.encode(message)) for message in messages) + more)
    stall.begun()


def pong(id: int) -> list[Any]:
    return ["ok", id, "pong"]


@each_kind
def test_pings_are_answered_and_all_else_comes_after_in_order(either: ServiceProcess, stall: Stall, kind: str) -> None:
    service = either
    stands(service, stall, kind=kind)
    for round in range(100, 1100, 100):
        others = [["health", round + 1], ["snapshot", round + 3, "s"], ["close", round + 5, "nowhere"]]
        for number, other in enumerate(others):
            service.send(other, ["ping", round + 2 * number + 2])
    service.write(bytes(4))  # no message at all
    found = [service.receive() for _ in range(30)]
    assert found == [pong(round + n) for round in range(100, 1100, 100) for n in (2, 4, 6)]
    stall.end()
    rest = [service.receive() for _ in range(32)]
    (end,) = (message for message in rest if is_terminal(1)(message))
    assert end[:3] == ["demand_complete", "a", {"output": "open"}]
    rest.remove(end)
    assert [m[1] for m in rest] == [round + n for round in range(100, 1100, 100) for n in (1, 3, 5)] + [0]
    service.says_nothing_more()


def test_pings_that_were_read_before_are_answered_once_though_their_ids_come_again(
    either: ServiceProcess, stall: Stall
) -> None:
    service = either
    stands(service, stall, ["ping", 2], ["health", 3], ["ping", 4])
    assert [service.receive(), service.receive()] == [pong(2), pong(4)]
    service.send(["snapshot", 2, "s"], ["ping", 4], ["ping", 3])
    assert service.receive() == pong(4)
    stall.end()
    rest = [service.receive() for _ in range(4)]
    assert is_terminal(1)(rest[0])
    assert [(m[0], m[1]) for m in rest[1:]] == [("ok", 3), ("ok", 2), ("error", 3)]
    assert "graph" in rest[2][2] and rest[3][2]["code"] == "bad_message"
    service.says_nothing_more()


def test_a_ping_may_come_byte_by_byte_and_have_begun_before(service: ServiceProcess, stall: Stall) -> None:
    torn = framed(service.codec.encode(["ping", 2]))
    stands(service, stall, more=torn[:7])
    service.write(torn[7:])
    assert service.receive() == pong(2)
    for byte in framed(service.codec.encode(["ping", 3])):
        service.write(bytes([byte]))
    assert service.receive() == pong(3)
    service.write(torn[:2])  # the loop goes on with it
    stall.end()
    assert is_terminal(1)(service.receive())
    service.write(torn[2:])
    assert service.receive() == pong(2)


def test_a_burst_of_pings(service: ServiceProcess, stall: Stall) -> None:
    stands(service, stall)
    for first in range(1000, 1000 + count(1000, 100_000), 1000):
        service.send(*(["ping", id] for id in range(first, first + 1000)))
        assert [service.receive() for _ in range(1000)] == [pong(id) for id in range(first, first + 1000)]
    stall.end()
    assert is_terminal(1)(service.receive())
    service.says_nothing_more()


def test_a_large_reply_that_was_half_written_is_not_torn(service: ServiceProcess, stall: Stall) -> None:
    service.open("large", ("a", "t-large", {"size": 5 << 20}))
    service.send(["demand", 7, "large", "a"])
    part = service.codec.decode(service.payload())
    assert part[:3] == ["part", 1, False]
    service.parts[1] = bytearray(part[3])
    settle(psutil.Process(service.pid))  # its output is full
    service.send(["open", 8, "s", {"nodes": [{"id": "a", "node_type": "t-stall", "data": {"gate": str(stall.path)}}]}])
    service.send(["demand", 1, "s", "a"])
    stall.begun()
    service.send(["ping", 9])
    assert service.until(lambda m: m[1] == 9)[-1] == pong(9)
    assert len(service.parts[1]) < 5 << 20
    stall.end()
    found = [service.receive(), service.receive()]
    assert {m[3] for m in found} == {1, 7}
    (large,) = (m[2]["output"] for m in found if m[3] == 7)
    assert large == "x" * (5 << 20)
    service.says_nothing_more()


def test_a_host_that_does_not_read_loses_nothing(service: ServiceProcess, stall: Stall) -> None:
    pings = b"".join(framed(service.codec.encode(["ping", id])) for id in range(1000, 41_000))
    stands(service, stall)
    process = psutil.Process(service.pid)
    before = settle(process)
    rest = service.write_alone(pings)
    assert rest, "it reads on although nobody reads its answers"
    assert settle(process) - before < 10 << 20
    service.write(rest)
    stall.end()
    found = [service.receive() for _ in range(40_001)]
    assert sum(map(is_terminal(1), found)) == 1
    assert sorted(m[1] for m in found if m[0] == "ok") == list(range(1000, 41_000))
    service.says_nothing_more()


def test_what_is_kept_for_the_loop_is_limited(service: ServiceProcess, stall: Stall) -> None:
    stands(service, stall)
    process = psutil.Process(service.pid)
    before = settle(process)
    large = [["validate", id, {"": bytes(100 << 10)}] for id in range(1000, 1100)]
    small = [["credit", 1, 1]] * 500_000
    rest = service.write_alone(b"".join(framed(service.codec.encode(m)) for m in [["ping", 2], *large, *small]))
    assert rest and service.receive() == pong(2)
    assert settle(process) - before < 60 << 20
    stall.end()
    service.write(rest)
    found = [service.receive() for _ in range(101)]
    assert is_terminal(1)(found[0]) and [m[1] for m in found[1:]] == list(range(1000, 1100))
    service.ping()


@each_kind
def test_the_log_says_once_who_held_it_up_and_then_for_how_long(
    either: ServiceProcess, stall: Stall, kind: str
) -> None:
    service = either
    service.request("hello", {"protocol": [1, 1], "part_bytes": 4096})
    stands(service, stall, kind=kind)
    payload = service.payload()
    assert len(payload) <= 4096
    _, level, logger, text, metadata = service.codec.decode(payload)
    assert (level, logger, metadata) == ("warning", "demandport.service.watchdog", {"node": "a"})
    assert "stands in the node 'a'" in text and "in stall\n" in text
    service.ping()
    stall.end()
    found = [service.receive(logs=True), service.receive(logs=True)]
    (again,) = (message[3] for message in found if message[0] == "log")
    assert again.startswith("the event loop turns again, after ")
    id = service.new_id()
    service.send(["ping", id])
    assert service.receive(logs=True) == pong(id)


def test_it_stands_again_and_again(service: ServiceProcess, tmp_path: Path) -> None:
    for number in range(count(5, 200)):
        folder = tmp_path / str(number)
        folder.mkdir()
        stall, session = Stall(folder), f"s{number}"
        service.open(session, ("a", "t-stall", {"gate": str(stall.path)}))
        demand, ping, health = (service.new_id() for _ in range(3))
        service.send(["demand", demand, session, "a"], ["health", health], ["ping", ping])
        stall.begun()
        assert service.receive() == pong(ping)
        stall.end()
        assert is_terminal(demand)(service.receive()) and service.receive()[:2] == ["ok", health]
        service.says_nothing_more()


def test_a_bad_frame_is_the_end_once_the_loop_turns(service: ServiceProcess, stall: Stall) -> None:
    stands(service, stall)
    service.write(framed(service.codec.encode(["ping", 2])) + b"\xff" * 4 + framed(service.codec.encode(["ping", 3])))
    assert service.receive() == pong(2)
    stall.end()
    assert [service.receive()[0], service.receive()[0]] == ["demand_complete", "goodbye"]
    assert service.wait() == 65


def test_a_host_that_is_gone_ends_it(service: ServiceProcess, stall: Stall) -> None:
    stands(service, stall)
    service.send(["ping", 2], ["health", 3])
    assert service.receive() == pong(2)
    left = family(service.pid)
    service.end()
    assert gone(left)


def test_a_host_that_is_killed_ends_it(nodes: Path, stall: Stall) -> None:
    graph = {"nodes": [{"id": "a", "node_type": "t-stall", "data": {"gate": str(stall.path)}}]}
    messages = [["open", 1, "s", graph], ["demand", 2, "s", "a"], ["ping", 3]]
    frames = b"".join(framed(MsgpackCodec().encode(message)) for message in messages)
    with parent_of_service(frames, environment(nodes)) as parent:
        try:
            stall.begun()
            left = family(parent.pid)
        finally:
            parent.kill()
    assert len(left) == 2 and gone(left)
