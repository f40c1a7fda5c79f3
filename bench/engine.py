"""Cost per inline node, in process: the engine against a bare loop over the same functions. Prints JSON."""

from __future__ import annotations

import asyncio
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import anyio
import bench_nodes

from demandport.engine.demand import Demand
from demandport.engine.executor import Executor
from demandport.engine.registry import load_specs
from demandport.engine.session import Session
from demandport.nodes import BUILT_IN
from demandport.service import main as service

NODES = 10_000


def chain() -> dict[str, Any]:
    nodes = [{"id": f"n{i}", "node_type": "bench-step", "data": {}} for i in range(NODES)]
    edges = [
        {"id": f"e{i}", "source": f"n{i}", "source_handle": "output", "target": f"n{i + 1}", "target_handle": "value"}
        for i in range(NODES - 1)
    ]
    return {"nodes": nodes, "edges": edges}


def fan_in() -> dict[str, Any]:
    nodes = [{"id": f"n{i}", "node_type": "bench-step", "data": {"value": i}} for i in range(NODES)]
    edges = [
        {"id": f"e{i}", "source": f"n{i}", "source_handle": "output", "target": "sum", "target_handle": "values"}
        for i in range(NODES)
    ]
    return {"nodes": [*nodes, {"id": "sum", "node_type": "bench-sum", "data": {}}], "edges": edges}


def bare_chain() -> float:
    start, value, step = time.perf_counter(), 0, bench_nodes.step
    for _ in range(NODES):
        value = step(value=value)
    assert value == NODES
    return time.perf_counter() - start


def bare_fan_in() -> float:
    start, step = time.perf_counter(), bench_nodes.step
    assert bench_nodes.total(values=[step(value=i) for i in range(NODES)]) == NODES * (NODES + 1) // 2
    return time.perf_counter() - start


class Sink:
    """Takes the outcome of one demand."""

    def __init__(self) -> None:
        self.done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def chunk(self, node: str, port: str, value: Any) -> None: ...
    def full(self) -> bool:
        return False

    async def room(self) -> None: ...
    def event(self, event: dict[str, Any]) -> None: ...
    def complete(self, outputs: dict[str, Any], meta: dict[str, Any]) -> None:
        self.done.set_result(outputs)

    def error(self, error: Exception, meta: dict[str, Any]) -> None:
        self.done.set_exception(error)


async def demanded(session: Session, node: str) -> Any:
    sink = Sink()
    session.demand(node, sink, _ended)
    return (await sink.done)["output"]


def _ended(demand: Demand) -> None: ...


async def measure(rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        times.setdefault(name, []).append(seconds / NODES * 1e6)

    specs = load_specs(BUILT_IN)
    # As the service runs: it sets the garbage collector once everything is imported, if it does.
    getattr(service, "tune_gc", lambda: None)()
    shapes: list[tuple[str, dict[str, Any], str, Callable[[], float]]] = [
        ("chain", chain(), f"n{NODES - 1}", bare_chain),
        ("fan_in", fan_in(), "sum", bare_fan_in),
    ]
    async with anyio.create_task_group() as tasks:
        executor = Executor(tasks, {})
        for turn in range(rounds + 1):
            for name, graph, last, bare in shapes:
                gc.collect()
                seconds = bare()
                start = time.perf_counter()
                session = Session(graph, specs, executor)
                opened = time.perf_counter()
                first = await demanded(session, last)
                demanded_at = time.perf_counter()
                session.edit([{"op": "set_input", "node": "n0", "port": "value", "value": 1}])
                again = await demanded(session, last)
                end = time.perf_counter()
                assert again == first + 1
                if turn:  # the first turn is warm-up
                    note(f"{name}_bare", seconds)
                    note(f"{name}_open", opened - start)
                    note(f"{name}_first", demanded_at - opened)
                    note(f"{name}_again", end - demanded_at)
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    print(json.dumps(anyio.run(measure, int(sys.argv[1]))))
