"""Node types of the benchmark; the service finds them by an entry point, as it finds any package's."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from demandport.engine.node import Context, node
from demandport.graph.spec import Port


@node("bench-step", runs="inline")
def step(value: Any = 0) -> Any:
    """One more."""
    return value + 1


@node("bench-sum", runs="inline")
def total(values: Annotated[Any, Port(type="any", multiple=True)]) -> Any:
    """The sum of all edges."""
    return sum(values)


@node("bench-block")
def block(seconds: float) -> str:
    """Holds a thread."""
    time.sleep(seconds)
    return "done"


@node("bench-bytes")
def large(size: int) -> bytes:
    """A value of that size."""
    return bytes(size)


@node("bench-flood")
async def flood(count: int = 1000) -> AsyncIterator[int]:
    """Streams small integers as fast as they are taken."""
    for number in range(count):
        yield number & 127


@node("bench-tick")
async def tick(seconds: float) -> AsyncIterator[int]:
    """Counts, without end."""
    for number in itertools.count():
        yield number
        await asyncio.sleep(seconds)


@node("bench-sleep", runs="inline")
def sleeps(seconds: float) -> float:
    """What no inline node should do."""
    time.sleep(seconds)
    return seconds


@node("bench-spin")
async def spins(seconds: float) -> float:
    """What no async node should do."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    return seconds


@node("bench-hold", runs="cpu", outputs={"text": "string"})
def holds(ctx: Context, seconds: float = 1000.0) -> None:
    """Says that it has begun, and keeps its worker."""
    ctx.emit_from_thread("begun")
    time.sleep(seconds)


@node("bench-echo", runs="cpu")
def echo(value: Any = None) -> Any:
    """The same value, from a worker."""
    return value
