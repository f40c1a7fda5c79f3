"""Run a graph with no host: one demand, streamed to the terminal."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import anyio

from demandport.engine.executor import Executor
from demandport.engine.registry import load_specs
from demandport.engine.session import Session
from demandport.errors import DemandportError
from demandport.graph.spec import as_text
from demandport.inference.config import Config
from demandport.inference.gateway import Gateway
from demandport.nodes import BUILT_IN

#: (node, port, value) to set before the demand.
Inputs = list[tuple[str, str, Any]]


def run(
    graph: Any, node: str, inputs: Inputs, *, models: Config, events: bool = False, files: str | None = None
) -> int:
    """Evaluate `node`; what streams goes to stdout as it comes, then the outputs that did not stream.

    Args:
        inputs: (node, port, value) to set first.
        models: which models there are.
        events: show events on stderr.

    Returns:
        exit status: 0, or 1 when the demand failed (the error is on stderr).
    """
    return anyio.run(_run, graph, node, inputs, models, events, files)


async def _run(graph: Any, node: str, inputs: Inputs, models: Config, events: bool, files: str | None) -> int:
    gateway = Gateway(models)
    terminal = _Terminal()
    status = 1
    try:
        async with anyio.create_task_group() as tasks:
            resources = {"gateway": gateway, "library": gateway.library, "files_root": files}
            status = await _demand(graph, Executor(tasks, resources), node, inputs, terminal, events)
    finally:
        await gateway.close()
    return status


async def _demand(graph: Any, executor: Executor, node: str, inputs: Inputs, terminal: _Terminal, events: bool) -> int:
    try:
        session = Session(graph, load_specs(BUILT_IN), executor)
        session.edit([{"op": "set_input", "node": n, "port": port, "value": value} for n, port, value in inputs])
        session.demand(node, terminal, lambda _: None, events=events)
    except DemandportError as refused:
        terminal.error(refused, {})
    return await terminal.status


class _Terminal:
    """Prints one demand (`demandport.engine.demand.Sink`)."""

    def __init__(self) -> None:
        self.status: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._streamed: list[str] = []

    def chunk(self, node: str, port: str, value: Any) -> None:
        text = as_text(value)
        self._streamed.append(text)
        print(text, end="", flush=True)

    def full(self) -> bool:
        return False

    async def room(self) -> None:
        return

    def event(self, event: dict[str, Any]) -> None:
        print(json.dumps(event, ensure_ascii=False, default=str), file=sys.stderr, flush=True)

    def complete(self, outputs: dict[str, Any], meta: dict[str, Any]) -> None:
        streamed = "".join(self._streamed)
        if streamed:
            print()
        for port, value in outputs.items():
            if value != streamed:
                print(f"{port}: {as_text(value)}")
        if meta.get("skipped"):
            print("skipped: it hangs on a branch that was not taken", file=sys.stderr)
        self.status.set_result(0)

    def error(self, error: DemandportError, meta: dict[str, Any]) -> None:
        place = f" (node {error.node})" if error.node else ""
        print(f"{error.code}{place}: {error.message}", file=sys.stderr)
        self.status.set_result(1)
