"""The program of a worker that runs ``cpu`` nodes: ``python -m demandport.engine.cpu_worker PARENT_PID``.

A task is the payload that `CpuNodes.call` makes. On the way it says ``["chunk", port, value]`` and ``["event", event,
fields]``; its result is ``[returned, outputs]``.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from demandport.engine.node import DECLARED, Context, no_output
from demandport.errors import Cancelled, DemandportError, NodeFailed, from_exception
from demandport.graph.spec import NodeSpec
from demandport.workers.child import Channel
from demandport.workers.task_loop import Interrupted, Job, TaskLoop


def setup(given: dict[str, Any]) -> None:
    """Find modules where the service does, and log what it logs."""
    sys.path[:] = given["path"]
    logging.getLogger().setLevel(given["log_level"])


def perform(job: Job, payload: dict[str, Any]) -> list[Any]:
    """Run a node. What it raises becomes the error that a thread node's would."""
    try:
        with job.shielded():  # a library that was imported by half can often not be imported again
            spec = _declared(payload["module"], payload["node_type"])
        runtime = _Runtime(job, spec, payload)
        context = Context(payload["node"], spec, runtime)
        inputs = payload["inputs"]
        if spec.context is not None:
            inputs[spec.context] = context
        returned = spec.call(**inputs)
        if spec.style == "generator":
            returned = _streamed(returned, spec.stream, runtime)
        return [returned, context.extra]
    except Interrupted:
        raise
    except BaseException as raised:  # also SystemExit
        raise from_exception(raised, node=payload["node"]) from None


def _streamed(generator: Any, port: str, runtime: _Runtime) -> Any:
    while True:
        try:
            chunk = next(generator)
        except StopIteration as end:
            return end.value if isinstance(end.value, dict) else None
        runtime.emit_from_thread(port, chunk)


def _declared(module: str, node_type: str) -> NodeSpec:
    try:
        importlib.import_module(module)
    except BaseException as failed:
        wrong = NodeFailed(f"the module {module} cannot be imported in a worker: {type(failed).__name__}: {failed}")
        wrong.traceback = from_exception(failed, node="").traceback
        raise wrong from None
    spec = DECLARED.get(node_type)
    if spec is None or spec.runs != "cpu":
        raise NodeFailed(
            f"the module {module} does not declare {node_type} to run on the cpu when a worker imports it; declare it "
            "at the top of the module"
        )
    return spec


class _Runtime:
    """What a `Context` can do in a worker (`demandport.engine.node.Runtime`)."""

    def __init__(self, job: Job, spec: NodeSpec, payload: dict[str, Any]) -> None:
        self.resources: Mapping[str, Any] = _NoResources(spec.node_type)
        #: As they stood when the node was given to the pool.
        self.deadline: float | None = payload["deadline"]
        self.priority: int = payload["priority"]
        self._job, self._spec = job, spec

    @property
    def cancelled(self) -> bool:
        return self._job.cancelled

    async def emit(self, port: str, chunk: Any) -> None:
        self.emit_from_thread(port, chunk)

    def write(self, port: str, text: str) -> None:
        if not isinstance(text, str):
            raise TypeError(f"ctx.write takes text, not {type(text).__name__}; use ctx.emit_from_thread")
        self.emit_from_thread(port, text)

    def emit_from_thread(self, port: str, chunk: Any) -> None:
        if port not in self._spec.outputs:
            raise no_output(self._spec, port)
        self._job.say(["chunk", port, chunk])

    def event(self, event: str, fields: dict[str, Any]) -> None:
        with contextlib.suppress(Cancelled):  # who would hear it is gone
            self._job.say(["event", event, fields])

    async def room(self) -> None:
        """What is said waits for room by itself."""

    def open_graph(self, data: dict[str, Any]) -> Any:
        raise _not_here(self._spec.node_type, "ctx.open_graph")

    async def wait_input(self, port: str) -> Any:
        raise _not_here(self._spec.node_type, "ctx.wait_input")


class _NoResources(Mapping[str, Any]):
    """The service's resources are not in this process; says so to who reaches for one."""

    def __init__(self, node_type: str) -> None:
        self._node_type = node_type

    def __getitem__(self, name: str) -> Any:
        raise _not_here(self._node_type, f"ctx.resources[{name!r}]")

    def __iter__(self) -> Iterator[str]:
        raise _not_here(self._node_type, "ctx.resources")

    def __len__(self) -> int:
        raise _not_here(self._node_type, "ctx.resources")


def _not_here(node_type: str, what: str) -> DemandportError:
    return NodeFailed(f'{node_type} runs in a worker process, where there is no {what}; declare it with runs="thread"')


def main() -> NoReturn:
    """Run the worker; never returns."""
    TaskLoop(Channel(int(sys.argv[1])), perform, setup).run()


if __name__ == "__main__":
    main()
