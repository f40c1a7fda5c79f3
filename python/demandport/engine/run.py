"""One execution of one async, thread or cpu node: its task, what it streams, and how it is cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from demandport.engine.cell import Cell
from demandport.engine.demand import Demand
from demandport.engine.node import Context, no_output
from demandport.errors import Cancelled, DemandportError, NodeFailed, UnknownNodeType, from_exception
from demandport.graph.spec import NodeSpec

if TYPE_CHECKING:
    from demandport.engine.executor import Executor

log = logging.getLogger(__name__)
#: A producer that never waits for anything lets the loop turn after this many chunks.
CHUNKS_PER_TURN = 64


class Run:
    """Lends a `Context` what it needs, and keeps what was streamed until the node is done."""

    def __init__(self, executor: Executor, cell: Cell, starting: Demand | None = None) -> None:
        self.cell = cell
        self.resources: Mapping[str, Any] = cell.owner.resources or executor.resources
        self.cancelled = False
        self._executor = executor
        #: Wants the cell, and does not listen yet.
        self._starting = starting
        self._task: asyncio.Task[Any] | None = None
        self._streamed: dict[str, list[Any]] = {}
        #: When the last answer was given that the node has had, by port.
        self._answered: dict[str, int] = {}
        self._since_turn = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    # ------------------------------------------------------------------------------ for the executor

    async def execute(self, inputs: dict[str, Any]) -> None:
        """Run the node and report its outcome to the executor."""
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        outputs: dict[str, Any] | None = None
        error: DemandportError = Cancelled("the node was cancelled", node=self.cell.node_id)
        try:
            if not self.cancelled:
                outputs = await self._outputs(inputs)
        except BaseException as raised:  # also SystemExit: a node must not end the service
            if self._ends_with_the_service(raised):
                raise
            if self.cancelled and not isinstance(raised, asyncio.CancelledError):
                log.warning("the node %r raised after it was cancelled", self.cell.node_id, exc_info=raised)
            error = from_exception(raised, node=self.cell.node_id)
        if self.cancelled:
            # A cancel that came too late to be delivered must not be taken for one of the task group.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0)
        self._task = None
        self._executor.run_ended(self, outputs, None if outputs is not None else error)

    def _ends_with_the_service(self, raised: BaseException) -> bool:
        assert self._task is not None
        return isinstance(raised, asyncio.CancelledError) and not self.cancelled and self._task.cancelling() > 0

    def cancel(self) -> None:
        """Nobody wants the outcome any more. Async nodes are cancelled, once, so that they may wait while they clean
        up; threads end when they look, workers when they look or are made to."""
        self.cancelled = True
        if self._task is not None:
            self._task.cancel()

    def catch_up(self) -> Iterator[tuple[str, Any]]:
        """What was streamed so far, for a demand that joins: text of a port as one chunk."""
        for port, chunks in self._streamed.items():
            if all(type(chunk) is str for chunk in chunks):
                yield port, "".join(chunks)
            else:
                yield from ((port, chunk) for chunk in chunks)

    async def _outputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        spec = self.cell.spec
        if spec.otherwise is None:
            return await self._call(spec, inputs)
        try:
            return await self._call(spec, dict(inputs))
        except UnknownNodeType:  # handed back
            return await self._call(spec.otherwise, inputs)

    async def _call(self, spec: NodeSpec, inputs: dict[str, Any]) -> dict[str, Any]:
        context = Context(self.cell.node_id, spec, self)
        returned: Any = None
        if spec.runs == "cpu":
            returned, context.extra = await self._executor.cpu.call(self.cell.node_id, spec, inputs, self)
            return self._normalised(spec, returned, context)
        if spec.context is not None:
            inputs[spec.context] = context
        if spec.style == "async_function":
            returned = await spec.call(**inputs)
        elif spec.style == "async_generator":
            async for chunk in spec.call(**inputs):
                await self.emit(spec.stream, chunk)
        elif spec.style == "generator":
            returned = await self._in_thread(lambda: self._iterate(spec.call(**inputs), spec.stream))
        elif spec.runs == "inline":
            returned = spec.call(**inputs)
        else:
            returned = await self._in_thread(lambda: spec.call(**inputs))
        return self._normalised(spec, returned, context)

    def _normalised(self, spec: NodeSpec, returned: Any, context: Context) -> dict[str, Any]:
        streamed = {
            port: "".join(chunks) if all(type(chunk) is str for chunk in chunks) else chunks
            for port, chunks in self._streamed.items()
        }
        if spec.style.endswith("generator"):
            streamed.setdefault(spec.stream, "" if spec.outputs[spec.stream].type == "string" else [])
            if not isinstance(returned, dict):
                returned = None
            return normalised(spec, None, streamed | (returned or {}) | context.extra)
        if streamed and (returned is None or (isinstance(returned, dict) and spec.single is None)):
            return normalised(spec, None, streamed | (returned or {}) | context.extra)
        return normalised(spec, returned, context.extra)

    async def _in_thread(self, function: Any) -> Any:
        def call() -> Any:
            try:
                return function()
            except (StopIteration, GeneratorExit) as raised:  # no future, and no coroutine, can carry them
                raise RuntimeError(f"the node raised {type(raised).__name__}") from raised

        return await asyncio.wrap_future(self._executor.threads.submit(call))

    def _iterate(self, generator: Any, port: str) -> Any:
        while True:
            try:
                chunk = next(generator)
            except StopIteration as end:
                return end.value
            self.emit_from_thread(port, chunk)

    # -------------------------------------------------------------------------------- for the context

    async def emit(self, port: str, chunk: Any) -> None:
        self._push(port, chunk)
        if type(chunk) is not str:
            await self.room()
        self._since_turn += 1
        if self._since_turn >= CHUNKS_PER_TURN:
            self._since_turn = 0
            await asyncio.sleep(0)

    async def room(self) -> None:
        for demand in list(self.cell.listeners):
            while demand.sink.full() and not demand.ended:
                await demand.sink.room()

    def write(self, port: str, text: str) -> None:
        if not isinstance(text, str):
            raise TypeError(f"ctx.write takes text, not {type(text).__name__}; await ctx.emit")
        self._push(port, text)

    def emit_from_thread(self, port: str, chunk: Any) -> None:
        if self.cancelled:
            raise Cancelled("nobody wants this node any more")
        if self._loop is None or asyncio._get_running_loop() is self._loop:
            raise RuntimeError("emit_from_thread is for nodes that run in a thread; async ones await ctx.emit")
        asyncio.run_coroutine_threadsafe(self.emit(port, chunk), self._loop).result()

    def event(self, event: str, fields: dict[str, Any]) -> None:
        loop = self._loop
        if loop is None or loop is asyncio._get_running_loop():
            self._tell(event, fields)
        else:
            loop.call_soon_threadsafe(self._tell, event, fields)

    async def wait_input(self, port: str) -> Any:
        if port not in self.cell.spec.inputs:
            raise NodeFailed(f"{self.cell.spec.node_type} has no input port {port!r} to wait for")
        key, store = (self.cell.node_id, port), self.cell.owner
        while True:
            # Also one that came before the node asked, but after the demand: a host may send both at once.
            value, given_at = store.answers.get(key, (None, -1))
            if given_at > self._answered.get(port, self.cell.born):
                self._answered[port] = given_at
                return value
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            waiting = store.waiting.setdefault(key, [])
            waiting.append(future)
            try:
                await future
            finally:
                waiting.remove(future)
                if not waiting and store.waiting.get(key) is waiting:
                    del store.waiting[key]

    def open_graph(self, data: dict[str, Any]) -> Any:
        from demandport.engine.session import Session

        return Session.within(self.cell, self._executor, data)

    @property
    def deadline(self) -> float | None:
        demands = self.cell.listeners or ([self._starting] if self._starting else ())
        deadlines = [demand.deadline for demand in demands if demand.deadline is not None]
        return max(deadlines) if deadlines and len(deadlines) == len(demands) else None

    @property
    def priority(self) -> int:
        demands = self.cell.listeners or ([self._starting] if self._starting else ())
        return max((demand.priority for demand in demands), default=0)

    def _push(self, port: str, chunk: Any) -> None:
        spec = self.cell.spec
        if port not in spec.outputs and not spec.open_outputs:
            raise no_output(spec, port)
        if self.cell.run is not self:
            return  # let go, and perhaps run anew meanwhile
        self._streamed.setdefault(port, []).append(chunk)
        node_id = self.cell.node_id
        for demand in self.cell.listeners:
            demand.sink.chunk(node_id, port, chunk)

    def _tell(self, event: str, fields: dict[str, Any]) -> None:
        if self.cell.run is self or self.cell.run is None:
            if self.cell.owner.log is not None:
                self.cell.owner.log.add(event, self.cell.node_id, fields)
            for demand in list(self.cell.listeners):
                demand.event(event, self.cell.node_id, fields)


def normalised(spec: NodeSpec, returned: Any, extra: dict[str, Any] | None) -> dict[str, Any]:
    """What a node's function returned, as outputs by port."""
    if spec.single is not None and not (extra and spec.single in extra and returned is None):
        outputs = {spec.single: returned}
    elif returned is None:
        outputs = {}
    elif isinstance(returned, dict):
        outputs = dict(returned)
    else:
        raise NodeFailed(f"{spec.node_type} has several outputs and must return a dict, not {type(returned).__name__}")
    if extra:
        outputs.update(extra)
    for name in outputs:
        if name not in spec.outputs and not spec.open_outputs:
            raise NodeFailed(f"{spec.node_type} gave a value for {name!r}; its outputs: {', '.join(spec.outputs)}")
    if len(outputs) < len(spec.outputs) and not spec.branches:
        forgotten = ", ".join(name for name in spec.outputs if name not in outputs)
        raise NodeFailed(f"{spec.node_type} gave no value for {forgotten}; only a node with branches may leave one out")
    return outputs
