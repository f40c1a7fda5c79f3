"""Run a graph with no host: one demand, streamed to the terminal."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import TYPE_CHECKING, Any, ClassVar

import anyio

from demandport.engine.executor import Executor
from demandport.engine.registry import load_specs, runnable
from demandport.engine.session import Session
from demandport.errors import DemandportError
from demandport.graph.spec import as_text
from demandport.inference.config import Config
from demandport.inference.gateway import Gateway
from demandport.nodes import BUILT_IN
from demandport.nodes.http import HttpConfig
from demandport.nodes.process import ProcessConfig, Processes

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

#: (node, port, value) to set before the demand.
Inputs = list[tuple[str, str, Any]]


def run(
    graph: Any,
    node: str,
    inputs: Inputs,
    *,
    models: Config,
    process: ProcessConfig,
    http: HttpConfig,
    events: bool = False,
    files: str | None = None,
) -> int:
    """Evaluate `node`; what streams goes to stdout as it comes, then the outputs that did not stream.

    Args:
        inputs: (node, port, value) to set first.
        models: which models there are. process, http: what nodes may start, and whom they may ask.
        events: show events on stderr.

    Returns:
        exit status: 0, or 1 when the demand failed (the error is on stderr).
    """
    lent = {"files_root": files, "process": Processes(process), "http": http}
    return anyio.run(_run, graph, node, inputs, models, lent, events)


async def _run(graph: Any, node: str, inputs: Inputs, models: Config, lent: dict[str, Any], events: bool) -> int:
    gateway = Gateway(models)
    terminal = _Terminal(events)
    status = 1
    try:
        async with anyio.create_task_group() as tasks:
            resources = {"gateway": gateway, "library": gateway.library, **lent}
            executor = Executor(tasks, resources)
            try:
                status = await _demand(graph, executor, node, inputs, terminal)
            finally:
                await executor.close()
    finally:
        terminal.bars.stop()
        await gateway.close()
    return status


async def _demand(graph: Any, executor: Executor, node: str, inputs: Inputs, terminal: _Terminal) -> int:
    try:
        session = Session(graph, runnable(load_specs(BUILT_IN)), executor)
        session.edit([{"op": "set_input", "node": n, "port": port, "value": value} for n, port, value in inputs])
        session.demand(node, terminal, lambda _: None, events=True)
    except DemandportError as refused:
        terminal.error(refused, {})
    return await terminal.status


class _Terminal:
    """Prints one demand (`demandport.engine.demand.Sink`); events as lines on stderr where they are wanted, else the
    progress among them as bars."""

    def __init__(self, events: bool) -> None:
        self.status: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.bars = _Bars()
        self._events = events
        self._streamed: list[str] = []

    def chunk(self, node: str, port: str, value: Any) -> None:
        self.bars.stop()
        text = as_text(value)
        self._streamed.append(text)
        print(text, end="", flush=True)

    def full(self) -> bool:
        return False

    async def room(self) -> None:
        return

    def event(self, event: dict[str, Any]) -> None:
        if self._events:
            print(json.dumps(event, ensure_ascii=False, default=str), file=sys.stderr, flush=True)
        elif event["event"] == "task_progress" and event["total"]:
            self.bars.show(event)

    def complete(self, outputs: dict[str, Any], meta: dict[str, Any]) -> None:
        self.bars.stop()
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
        self.bars.stop()
        place = f" (node {error.node})" if error.node else ""
        print(f"{error.code}{place}: {error.message}", file=sys.stderr)
        self.status.set_result(1)


class _Bars:
    """Bars of what is loaded or read, on stderr, gone when text begins; nothing where stderr is no terminal."""

    _WORDS: ClassVar = {"load_bytes": "loading", "prompt_tokens": "reading"}

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._tasks: dict[tuple[str, str], TaskID] = {}

    def show(self, event: dict[str, Any]) -> None:
        """Take in a `task_progress` event."""
        if self._progress is None:
            from rich.console import Console
            from rich.progress import Progress

            console = Console(stderr=True)
            self._progress = Progress(console=console, transient=True, disable=not console.is_terminal)
            self._progress.start()
        node, unit = event["node"], event["unit"]
        if (node, unit) not in self._tasks:
            said = f"{node}: {self._WORDS.get(unit, unit)}"
            self._tasks[node, unit] = self._progress.add_task(said, total=event["total"])
        self._progress.update(self._tasks[node, unit], completed=event["done"])

    def stop(self) -> None:
        """Take the bars away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            self._tasks.clear()
