"""The watchdog's pieces, without a process: who reads and writes when, who answers which ping, and when to look."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from demandport.pipes import Reader, Writer
from demandport.service import inbox as inbox_module
from demandport.service.inbox import Inbox
from demandport.service.stacks import node_on, stacks
from demandport.service.watchdog import LOOK_S, REPORT_S, SAVED_LOOKS, SOON_S, STEP_S, Watchdog
from demandport.wire.codec import MsgpackCodec
from demandport.wire.connection import Connection, Farewell
from demandport.wire.framing import FrameDecoder, frame
from demandport.wire.messages import Credit, Health, Ping
from demandport.wire.outbox import Outbox

CODEC = MsgpackCodec()


def data(*messages: list[Any]) -> bytes:
    return b"".join(frame(CODEC.encode(message)) for message in messages)


class Loop:
    """An event loop that turns when it is told to."""

    def __init__(self) -> None:
        self.soon: list[tuple[Callable[..., Any], Any]] = []
        self.closed = False
        self.turns_at_once = False

    def call_soon(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.soon.append((function, arguments))
        if self.turns_at_once:
            self.turn()

    call_soon_threadsafe = call_soon

    def turn(self) -> None:
        soon, self.soon = self.soon, []
        for function, arguments in soon:
            function(*arguments)

    def is_closed(self) -> bool:
        return self.closed

    def add_reader(self, *_: Any) -> None: ...
    def remove_reader(self, *_: Any) -> None: ...
    def add_writer(self, *_: Any) -> None: ...
    def remove_writer(self, *_: Any) -> None: ...


class Pipe:
    """A pipe whose ends are closed at the end."""

    def __init__(self) -> None:
        self.r, self.w = os.pipe()

    def fill(self) -> int:
        """Have it take no more; returns how much it holds."""
        os.set_blocking(self.w, False)
        size = 0
        try:
            while True:
                size += os.write(self.w, bytes(1 << 12))
        except BlockingIOError:
            return size

    def close(self) -> None:
        for fd in (self.r, self.w):
            with contextlib.suppress(OSError):
                os.close(fd)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    made.close()


# ------------------------------------------------------------------------------------------------ the pipes


def test_what_another_thread_takes_and_what_the_loop_reads_come_in_order(pipe: Pipe) -> None:
    got: list[bytes] = []
    reader = Reader(Loop(), pipe.r, got.append, lambda: got.append(b"end"), then=lambda: got.append(b"then"))  # type: ignore[arg-type]
    assert reader.take(got.append) is None and not reader.wait(0)
    os.write(pipe.w, b"one")
    assert reader.wait(0) and reader.take(got.append) is True
    os.write(pipe.w, b"two")
    reader._readable()
    os.close(pipe.w)
    assert reader.take(got.append) is False
    reader._readable()
    assert got == [b"one", b"two", b"then", b"end"]


def test_nothing_is_taken_while_the_loop_takes_in(pipe: Pipe) -> None:
    found: list[Any] = []

    def take_in(first: bytes) -> None:
        os.write(pipe.w, b"two")
        other = threading.Thread(target=lambda: found.append(reader.take(found.append)))
        other.start()
        other.join()
        found.append(first)

    reader = Reader(Loop(), pipe.r, take_in, lambda: None)  # type: ignore[arg-type]
    os.write(pipe.w, b"one")
    reader._readable()
    assert found == [None, b"one"]


def test_the_loop_waits_until_another_thread_has_taken_in(pipe: Pipe) -> None:
    order: list[bytes] = []
    at_it, go_on = threading.Event(), threading.Event()
    reader = Reader(Loop(), pipe.r, order.append, lambda: None)  # type: ignore[arg-type]

    def take_in(first: bytes) -> None:
        os.write(pipe.w, b"two")
        at_it.set()
        go_on.wait()
        order.append(first)

    os.write(pipe.w, b"one")
    other = threading.Thread(target=reader.take, args=(take_in,))
    other.start()
    at_it.wait()
    loop = threading.Thread(target=reader._readable)
    loop.start()
    go_on.set()
    other.join()
    loop.join()
    assert order == [b"one", b"two"]


def test_what_is_half_written_is_finished_first(pipe: Pipe) -> None:
    held = pipe.fill()
    loop = Loop()
    writer = Writer(loop, pipe.w, lambda: None, refill=lambda: pytest.fail("that is the loop's"))  # type: ignore[arg-type]
    writer.cork()
    writer.write(b"a" * 100_000)
    writer.write(b"b" * 10)
    assert not writer.push(b"c" * 10) and not writer.wait(0)
    os.set_blocking(pipe.r, False)
    found = b""
    while True:
        done = writer.push()
        found += os.read(pipe.r, 1 << 17)
        if done:
            break
    with contextlib.suppress(BlockingIOError):
        found += os.read(pipe.r, 1 << 17)
    assert found[held:] == b"a" * 100_000 + b"b" * 10 + b"c" * 10
    writer.take_over()
    assert writer.pending_bytes == 0


def test_what_another_thread_could_not_write_the_loop_writes(pipe: Pipe) -> None:
    held, loop = pipe.fill(), Loop()
    writer = Writer(loop, pipe.w, lambda: None)  # type: ignore[arg-type]
    assert not writer.push(b"late")
    assert len(os.read(pipe.r, 1 << 17)) == held
    writer.take_over()
    assert writer.pending_bytes == 4
    loop.turn()
    assert os.read(pipe.r, 10) == b"late" and writer.pending_bytes == 0


def test_a_broken_pipe_is_left_to_the_loop(pipe: Pipe) -> None:
    broken: list[bool] = []
    writer = Writer(Loop(), pipe.w, lambda: broken.append(True))  # type: ignore[arg-type]
    os.close(pipe.r)
    with pytest.raises(OSError):
        writer.push(b"a")
    assert not broken
    writer.close()
    with pytest.raises(OSError):
        writer.push(b"a")


# ------------------------------------------------------------------------------------------------ the inbox


def inbox() -> Inbox:
    return Inbox(Connection(CODEC, 1 << 20))


def test_each_ping_is_answered_by_one_of_the_two() -> None:
    box = inbox()
    box.take(data(["ping", 1], ["health", 2], ["ping", 3], ["ping", 4]))
    first = box.read.popleft()
    assert box.claim(first)  # by the loop, which has it in hand
    assert box.standing_pings() == [3, 4] and box.standing_pings() == []
    assert box.keep(data(["ping", 3])) == [3], "its id is free again"
    box.take(data(["ping", 3]))
    box.give_back()
    assert [type(event) for event in box.read] == [Health, Ping, Ping, Ping]
    assert [box.claim(event) for event in box.read if type(event) is Ping] == [False, False, True]


def test_what_is_kept_comes_back_in_order_and_before_what_is_newer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "TURN_MESSAGES", 3)
    box = inbox()
    box.take(data(["health", 1]))
    for id in (2, 3, 4):
        assert box.keep(data(["health", id], ["ping", 9])) == [9]
    box.take(data(["health", 5], ["ping", 6]))
    assert box.standing_pings() == [6]
    seen = []
    while box.read:
        seen.append(box.read.popleft().id)
        box.give_back()
        assert len(box.read) <= 4
    assert seen == [1, 2, 3, 4, 5, 6] and not box.kept


def test_it_is_full_by_what_is_complete_and_no_ping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "KEPT_BYTES", 1000)
    box = inbox()
    for _ in range(100):
        box.keep(data(*(["ping", id] for id in range(1, 11))))
    large = data(["validate", 1, {"": bytes(2000)}])
    box.keep(large[:-1])
    assert not box.full
    box.keep(large[-1:])
    assert box.full
    box.give_back()
    assert not box.full
    box.keep(data(*[["credit", 1, 1]] * 200))
    assert box.full and type(box.kept[0][0][0]) is Credit


def test_a_farewell_is_kept_for_the_loop() -> None:
    box = inbox()
    assert box.keep(data(["ping", 1]) + b"\xff" * 4 + data(["ping", 2])) == [1]
    assert box.keep(data(["ping", 3])) == []
    box.give_back()
    assert [type(event) for event in box.read] == [Farewell]


# ------------------------------------------------------------------------------------------------ the stacks


def test_stacks_name_every_thread_and_keep_the_innermost_calls() -> None:
    asleep, wake = threading.Event(), threading.Event()

    def innermost() -> None:
        asleep.set()
        wake.wait()

    def deep(n: int) -> None:
        if n:
            deep(n - 1)
        else:
            innermost()

    thread = threading.Thread(target=deep, args=(200,), name="sleeper")
    thread.start()
    asleep.wait()
    try:
        assert thread.ident
        text = stacks(thread.ident, 1 << 20)
        assert text.startswith("thread sleeper:\n") and text.index("in deep") < text.index("in innermost")
        short = stacks(thread.ident, 1000)
        assert 500 < len(short) <= 1000 and "in innermost" in short
        assert node_on(thread.ident) is None
    finally:
        wake.set()
        thread.join()


# ---------------------------------------------------------------------------------------------- the watchdog


class Manual:
    """Time that passes only in `sleep`; what is planned happens in it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.sleeps: list[float] = []
        self.plan: list[tuple[float, Callable[[], Any]]] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.sleeps.append(seconds)
        while self.plan and self.plan[0][0] <= self.now:
            self.plan.pop(0)[1]()

    def at(self, seconds: float, action: Callable[[], Any]) -> None:
        self.plan = sorted([*self.plan, (1000.0 + seconds, action)], key=lambda planned: planned[0])


class House:
    """A service as the watchdog sees it, between two pipes, with a loop and a clock that are told."""

    def __init__(self) -> None:
        self.clock, self.loop, self.inbox = Manual(), Loop(), inbox()
        self.host, self.answers = Pipe(), Pipe()
        self.room, self.worked = True, 0
        clock = self.clock

        class ClockedReader(Reader):
            def wait(self, timeout_s: float) -> bool:
                ready = super().wait(0)
                if not ready:
                    clock.sleep(timeout_s)
                return ready

        class ClockedWriter(Writer):
            def wait(self, timeout_s: float) -> bool:
                ready = super().wait(0)
                if not ready:
                    clock.sleep(timeout_s)
                return ready

        self.reader = ClockedReader(self.loop, self.host.r, self.inbox.take, lambda: None)  # type: ignore[arg-type]
        self.writer = ClockedWriter(self.loop, self.answers.w, lambda: None)  # type: ignore[arg-type]
        self.watchdog = Watchdog(
            self.loop,  # type: ignore[arg-type]
            self.reader,
            self.writer,
            self,
            Outbox(CODEC),
            CODEC,
            clock,
        )

    def work(self) -> None:
        self.worked += 1

    def has_room(self) -> bool:
        return self.room

    def send(self, *messages: list[Any]) -> None:
        os.write(self.host.w, data(*messages))

    def sent(self) -> list[Any]:
        os.set_blocking(self.answers.r, False)
        try:
            return [CODEC.decode(payload) for payload in FrameDecoder().feed(os.read(self.answers.r, 1 << 16))]
        except BlockingIOError:
            return []

    def watch(self, seconds: float) -> None:
        """As the thread does, for so long by its clock."""
        self.clock.at(seconds, self.watchdog.stop)
        self.watchdog._watch()


@pytest.fixture
def house() -> Iterator[House]:
    made, interval = House(), sys.getswitchinterval()
    yield made
    assert sys.getswitchinterval() == interval
    made.host.close()
    made.answers.close()


def test_a_loop_that_turns_is_left_alone_and_seldom_looked_at(house: House) -> None:
    house.loop.turns_at_once = True
    house.send(["ping", 1], ["health", 2])
    house.watch(10)
    assert len(house.clock.sleeps) <= 2 * (10 / LOOK_S + SAVED_LOOKS + 1)
    assert not house.inbox.kept and not house.worked and house.sent() == []


def test_a_stall_is_noticed_soon_after_quiet(house: House) -> None:
    house.send(["ping", 1])
    house.watch(3 * SOON_S)
    assert house.sent() == [["ok", 1, "pong"]]


def test_a_loop_that_handles_one_message_after_the_other_does_not_stand(house: House) -> None:
    house.inbox.take(data(*[["ping", id] for id in range(1, 200)]))
    sleep = house.clock.sleep

    def handles_meanwhile(seconds: float) -> None:
        sleep(seconds)
        house.inbox.read.popleft()

    house.clock.sleep = handles_meanwhile  # type: ignore[method-assign]
    house.watch(2)
    assert house.sent() == []


def test_pings_are_answered_until_the_loop_turns_and_the_stall_is_told_once(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    house.inbox.take(data(["health", 1], ["ping", 2]))
    house.clock.at(1, lambda: house.send(["ping", 3], ["health", 4], ["ping", 5]))
    house.clock.at(5, house.loop.turn)
    house.clock.at(5, lambda: setattr(house.loop, "turns_at_once", True))
    with caplog.at_level(logging.WARNING):
        house.watch(6)
    first, report, *rest = house.sent()
    assert first == ["ok", 2, "pong"] and rest == [["ok", 3, "pong"], ["ok", 5, "pong"]]
    assert report[:3] == ["log", "warning", "demandport.service.watchdog"]
    assert report[3].startswith("the event loop stands: ")
    assert [record.getMessage() for record in caplog.records] == ["the event loop turns again, after 5.00 s"]
    assert house.worked and [events[0].id for events, _ in house.inbox.kept] == [4]


def test_a_short_stall_is_not_told(house: House, caplog: pytest.LogCaptureFixture) -> None:
    house.clock.at(REPORT_S - 2 * STEP_S, house.loop.turn)
    house.clock.at(REPORT_S - 2 * STEP_S, lambda: setattr(house.loop, "turns_at_once", True))
    house.watch(3)
    assert house.sent() == [] and not caplog.records


def test_it_reads_nothing_while_the_host_takes_no_answers(house: House) -> None:
    house.room = False
    house.answers.fill()
    house.inbox.take(data(["ping", 1]))
    house.send(["health", 2])
    house.watch(2)
    assert house.reader.wait(0) and not house.inbox.kept
    os.read(house.answers.r, 1 << 17)
    assert house.sent() == []
    house.writer.take_over()
    house.loop.turn()
    assert house.sent() == [["ok", 1, "pong"]]


@pytest.mark.parametrize("end", ["input", "output", "loop"])
def test_it_does_not_spin_when_an_end_is_gone(house: House, end: str) -> None:
    if end == "input":
        os.close(house.host.w)
    elif end == "output":
        os.close(house.answers.r)
        house.inbox.take(data(["ping", 1]))
        house.send(["ping", 2])
    else:
        house.loop.closed = True
        house.send(["ping", 2])
    house.watch(2)
    assert len(house.clock.sleeps) <= 2 / STEP_S + 10
    assert end != "loop" or house.sent() == []
