"""Node types for tests that run in worker processes. Worker and service import this module alike."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from demandport import Context, node
from stray import print_in_every_way

_pause = threading.Event()


@node("c-echo", runs="cpu")
def echo(value: Any = None) -> Any:
    return value


@node("c-pid", runs="cpu")
def pid(x: int = 0) -> int:
    return os.getpid()


@node("c-about", runs="cpu", outputs={"node": "string", "remaining": "any", "priority": "integer", "type": "string"})
def about(ctx: Context) -> None:
    ctx.progress(1, 2, "halves")
    ctx.event("own", fact=[1, {"a": None}])
    ctx.log("warning", "a word", fact=3)
    ctx.output("node", ctx.node)
    ctx.output("remaining", ctx.remaining_s)
    ctx.output("priority", ctx.priority)
    ctx.output("type", ctx.node_type)


@node("c-hold", runs="cpu", outputs={"text": "string"})
def hold(ctx: Context, gate: str) -> None:
    """Says that it has begun, and ends when the gate is opened."""
    ctx.emit_from_thread("begun")
    with open(gate) as opened:
        ctx.emit_from_thread(opened.read())


@node("c-polite", runs="cpu", outputs={"text": "string"})
def polite(ctx: Context, gate: str) -> None:
    """Looks whether it is still wanted; at the end opens the gate."""
    ctx.emit_from_thread("begun")
    while not ctx.cancelled:
        _pause.wait(0.005)
    with open(gate, "w"):
        pass


@node("c-deaf", runs="cpu", outputs={"text": "string"})
def deaf(ctx: Context, how: str = "loop") -> None:
    """Never looks whether it is wanted."""
    ctx.emit_from_thread("begun")
    if how == "regex":  # in C, with the lock that Python's threads need
        re.match("(a*)*b", "a" * 60)
    elif how == "sleep":
        signal.pause()
    while True:
        pass


@node("c-stubborn", runs="cpu", outputs={"text": "string"})
def stubborn(ctx: Context, how: str) -> None:
    """Does not take an interrupt."""
    if how == "blocks":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    elif how == "ignores":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctx.emit_from_thread("begun")
    if how == "in_c":
        while True:
            ctypes.PyDLL(None).sleep(1000)  # PyDLL: holds the lock that Python's threads need
    while True:
        try:
            _pause.wait()
        except KeyboardInterrupt:
            continue


@node("c-blocks-and-returns", runs="cpu")
def blocks_and_returns(x: int = 0) -> str:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.kill(os.getpid(), signal.SIGINT)
    return "done"


@node("c-die", runs="cpu", outputs={"text": "string"})
def die(ctx: Context, how: str = "exit") -> None:
    ctx.emit_from_thread("begun")
    if how == "exit":
        os._exit(7)
    signal.raise_signal(getattr(signal, how))


@node("c-raise", runs="cpu")
def fail(what: str = "ValueError") -> str:
    if what == "exit":
        sys.exit(3)
    raise ValueError("\ud800 odd")


@node("c-eat", runs="cpu")
def eat(count: int, gate: str = "") -> int:
    eaten = bytearray(os.urandom(1 << 20) * (count >> 20))
    if gate:
        with open(gate) as opened:
            opened.read()
    return len(eaten)


@node("c-chunks", runs="cpu", outputs={"text": "string"})
def chunks(chunks: list[Any]) -> Iterator[Any]:
    yield from chunks


@node("c-flood", runs="cpu", outputs={"items": "json"})
def flood(count: int, counter: str = "", padding: int = 0) -> Iterator[dict[str, Any]]:
    """Streams maps; writes a byte to the file for each, once it was taken from it."""
    with open(counter or os.devnull, "wb", buffering=0) as file:
        for number in range(count):
            yield {"n": number} | ({"padding": bytes(padding)} if padding else {})
            file.write(b".")


@node("c-returns", runs="cpu", outputs={"items": "json", "sum": "number"}, stream="items")
def returns(count: int) -> Iterator[int]:
    yield from range(count)
    return {"sum": sum(range(count))}


@node("c-value", runs="cpu")
def value(kind: str) -> Any:
    return {"set": {1}, "object": object(), "intkey": {1: 2}, "surrogate": "\ud800", "large": bytes((64 << 20) + 1)}[
        kind
    ]


@node("c-chunk", runs="cpu", outputs={"text": "any"})
def chunk(kind: str) -> Iterator[Any]:
    yield value(kind)


@node("c-reach", runs="cpu", outputs={"text": "any"})
def reach(ctx: Context, what: str) -> None:
    if what == "resources":
        ctx.output("text", ctx.resources["gateway"])
    elif what == "wait_input":
        try:
            ctx.wait_input("what").send(None)  # type: ignore[attr-defined]
        except StopIteration as end:
            ctx.output("text", end.value)
    else:
        ctx.emit_from_thread("x", port="nope")


@node("c-print", runs="cpu")
def prints(x: int = 0) -> str:
    print_in_every_way("a node")
    return "done"


@node("c-fork", runs="cpu", outputs={"text": "string"})
def fork(ctx: Context) -> None:
    """A fork of the worker speaks, and returns as if it were the worker."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
    ctx.emit_from_thread("one")
