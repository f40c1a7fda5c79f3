"""For people who write nodes: run a node or a graph in a test, with no BEAM, no service and, if wanted, no model.

    from demandport.testing import run_node

    def test_shout():
        assert run_node("shout", {"text": "hi", "times": 2}).outputs == {"output": "HIHI"}

What runs is the real engine with the real rules: inputs are converted, defaults filled in, and a demand that fails
raises the error that a host would be told. Node types are the built-in ones, those of installed packages, and those
that the test's own process has declared by then.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, fields
from typing import Any

import anyio

from demandport.engine.demand import Demand
from demandport.engine.executor import Executor
from demandport.engine.registry import load_specs, runnable
from demandport.engine.session import Session
from demandport.errors import DemandportError
from demandport.inference.backend import (
    Backend,
    BackendHealth,
    Capabilities,
    Embeddings,
    Event,
    Finished,
    FinishReason,
    TextChunk,
    ToolCall,
    Usage,
)
from demandport.inference.config import ModelSpec
from demandport.inference.gateway import Gateway, _Entry
from demandport.inference.requests import EmbedRequest, GenerateRequest, RerankRequest
from demandport.nodes import BUILT_IN

__all__ = ["Bench", "Heard", "Result", "ScriptedBackend", "run_graph", "run_node"]

#: A node type's name, or the function that `@node` stands before.
NodeType = str | Callable[..., Any]
#: Values of a graph's input ports, by node and port.
Inputs = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a demand that went well.

    Attributes:
        outputs: by port. chunks: what streamed, as (node, port, value), in order.
        events: maps with ``event`` and ``node``, as hosts get them. skipped: the node hangs on a branch not taken.
    """

    outputs: dict[str, Any]
    chunks: list[tuple[str, str, Any]]
    events: list[dict[str, Any]]
    skipped: bool = False

    @property
    def text(self) -> str:
        """The chunks of text, joined."""
        return "".join(value for _, _, value in self.chunks if isinstance(value, str))


def run_node(
    node: NodeType,
    inputs: Mapping[str, Any] | None = None,
    *,
    data: Mapping[str, Any] | None = None,
    backend: Backend | None = None,
    resources: Mapping[str, Any] | None = None,
    deadline_ms: int | None = None,
    timeout_s: float = 60.0,
) -> Result:
    """Run one node and wait for it.

    Args:
        node: its type, by name or by its function.
        inputs: values of its input ports. data: the node's data in the graph, where ports find values too.
        backend: answers in place of every model; None: the real ones.
        resources: what ``ctx.resources`` has besides the models.
        deadline_ms: of the demand.
        timeout_s: how long the test may take at all.

    Raises:
        DemandportError: what the demand ended with; its ``node`` is ``"node"``.
        TimeoutError: it took longer than `timeout_s`.
    """
    given = {"node": inputs} if inputs else {}
    graph = {"nodes": [{"id": "node", "node_type": _name_of(node), "data": dict(data or {})}], "edges": []}
    return run_graph(
        graph, "node", given, backend=backend, resources=resources, deadline_ms=deadline_ms, timeout_s=timeout_s
    )


def run_graph(
    graph: Mapping[str, Any],
    node: str,
    inputs: Inputs | None = None,
    *,
    backend: Backend | None = None,
    resources: Mapping[str, Any] | None = None,
    deadline_ms: int | None = None,
    timeout_s: float = 60.0,
) -> Result:
    """Open a graph, demand one of its nodes and wait; arguments and errors as those of `run_node`.

    Args:
        graph: as JSON data. node: id of the node that is demanded.
        inputs: values to set first: node id → port → value.
    """

    async def run() -> Result:
        async with Bench(backend=backend, resources=resources) as bench:
            session = bench.open(graph, inputs)
            with anyio.fail_after(timeout_s):
                return await bench.demand(session, node, deadline_ms=deadline_ms).result()

    return anyio.run(run)


class Heard:
    """One demand, and what was heard of it so far: ``chunks`` and ``events`` as in `Result`."""

    def __init__(self, hold: bool = False) -> None:
        self.chunks: list[tuple[str, str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self._news = asyncio.Event()
        self._outcome: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._room = asyncio.Event()
        self._stop: Callable[[], None] = lambda: None
        if not hold:
            self._room.set()

    async def result(self) -> Result:
        """Wait for the end.

        Raises:
            DemandportError: the demand ended with it.
        """
        return await asyncio.shield(self._outcome)

    async def until(self, condition: Callable[[Heard], Any]) -> None:
        """Wait until the condition holds; it is looked at after each chunk and event, and at the end.

        Raises:
            AssertionError: the demand has ended, and it does not.
        """
        while not condition(self):
            assert not self._outcome.done(), f"the demand has ended: {self._outcome!r}"
            self._news.clear()
            await self._news.wait()

    def cancel(self) -> None:
        """Cancel the demand, as a host does: `result` then raises `Cancelled`."""
        self._stop()

    def release(self) -> None:
        """The consumer takes chunks again, where it was made to ``hold``."""
        self._room.set()

    # What the engine calls (`demandport.engine.demand.Sink`).

    def chunk(self, node: str, port: str, value: Any) -> None:
        self.chunks.append((node, port, value))
        self._news.set()

    def full(self) -> bool:
        return not self._room.is_set()

    async def room(self) -> None:
        await self._room.wait()

    def event(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        self._news.set()

    def complete(self, outputs: dict[str, Any], meta: dict[str, Any]) -> None:
        self._outcome.set_result(Result(outputs, self.chunks, self.events, bool(meta.get("skipped"))))
        self._news.set()

    def error(self, error: DemandportError, meta: dict[str, Any]) -> None:
        self._outcome.set_exception(error)
        self._outcome.exception()  # a test need not ask for it
        self._news.set()


class Bench:
    """An engine of its own, for tests that act while a demand runs: an async context manager.

        async with Bench() as bench:
            session = bench.open(graph)
            heard = bench.demand(session, "node")
            await heard.until(lambda heard: heard.chunks)
            heard.cancel()

    At the end what still runs is cancelled, and its worker processes are ended. Arguments as those of `run_node`.
    """

    def __init__(self, *, backend: Backend | None = None, resources: Mapping[str, Any] | None = None) -> None:
        self._gateway = Gateway() if backend is None else _OneBackend(backend)
        self._resources = {"gateway": self._gateway, "library": self._gateway.library, **(resources or {})}
        self._specs = runnable(load_specs(BUILT_IN))
        self._sessions: list[Session] = []
        self._stack = AsyncExitStack()
        self._executor: Executor

    async def __aenter__(self) -> Bench:
        self._stack.push_async_callback(self._gateway.close)
        tasks = await self._stack.enter_async_context(anyio.create_task_group())
        self._executor = Executor(tasks, self._resources)
        self._stack.push_async_callback(self._executor.close)
        return self

    async def __aexit__(self, *_: object) -> None:
        for session in self._sessions:
            session.close()
        await self._stack.aclose()

    def open(self, graph: Mapping[str, Any], inputs: Inputs | None = None) -> Session:
        """Open a graph and set inputs of it; ``edit`` and ``output`` of what is returned do what they do for a host.

        Raises:
            DemandportError: the graph breaks a rule, or an input names nothing.
        """
        session = Session(dict(graph), self._specs, self._executor)
        self._sessions.append(session)
        operations = [
            {"op": "set_input", "node": node, "port": port, "value": value}
            for node, ports in (inputs or {}).items()
            for port, value in ports.items()
        ]
        session.edit(operations)
        return session

    def demand(
        self, session: Session, node: str, *, deadline_ms: int | None = None, priority: int = 0, hold: bool = False
    ) -> Heard:
        """Demand a node; returns at once.

        Args:
            hold: the consumer has no credit until ``release``: producers that can wait do.

        Raises:
            DemandportError: the demand is refused.
        """
        heard = Heard(hold)
        demand: Demand = session.demand(
            node, heard, lambda _: None, deadline_ms=deadline_ms, priority=priority, events=True
        )
        heard._stop = lambda: None if demand.ended else session.cancel(demand)
        return heard


def _name_of(node: NodeType) -> str:
    if isinstance(node, str):
        return node
    spec = getattr(node, "node_spec", None)
    if spec is None:
        raise TypeError(f"{node!r:.60} is no node type: put @node before it")
    return str(spec.node_type)


# ------------------------------------------------------------------------------------------------------------ models

Answer = str | ToolCall | tuple[ToolCall, ...]


class ScriptedBackend:
    """A model that answers what a test has written down: a text, or calls of tools.

    Each generation gets the next answer, the last one again and again. An answer may be a function from the request to
    the answer; it may raise. A text comes in two chunks. A vector of `embed` is the text's length and 1; a score of
    `rerank` is how often the document has the query.

    Args:
        answers: texts, a `ToolCall` or a tuple of them, or functions.
        vision: it takes images. reason: why a text has ended.
        honours: the parameters that it honours, any other is refused; None: all.

    Attributes:
        asked: the requests so far, for the test to look at.
    """

    kind = "scripted"

    def __init__(
        self,
        *answers: Answer | Callable[[GenerateRequest], Answer],
        vision: bool = False,
        reason: FinishReason = "stop",
        honours: set[str] | None = None,
    ) -> None:
        self.answers, self.vision, self.reason = list(answers), vision, reason
        self.honours = {field.name for field in fields(GenerateRequest)} if honours is None else honours
        self.asked: list[GenerateRequest] = []
        self.info: dict[str, Any] = {}
        self.closed = False

    async def generate(
        self, request: GenerateRequest, on_text: Callable[[str], None] | None = None
    ) -> AsyncGenerator[Event, None]:
        self.capabilities().check(request, "the scripted backend")
        self.asked.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if callable(answer):
            answer = answer(request)
        if isinstance(answer, ToolCall | tuple):
            calls = answer if isinstance(answer, tuple) else (answer,)
            yield Finished("tool_calls", Usage(3, 2), tool_calls=calls, model="scripted-1")
            return
        for piece in (answer[:2], answer[2:]):
            if on_text is not None:
                on_text(piece)
            else:
                yield TextChunk(piece)
        yield Finished(self.reason, Usage(3, 2), model="scripted-1")

    async def embed(self, request: EmbedRequest) -> Embeddings:
        vectors = [struct.pack("<2f", len(text), 1.0) for text in request.texts]
        return Embeddings(vectors, 2, Usage(len(vectors), 0), "scripted-1")

    async def rerank(self, request: RerankRequest) -> list[float]:
        return [float(document.count(request.query)) for document in request.documents]

    async def load(self) -> dict[str, Any]:
        return self.info

    def capabilities(self) -> Capabilities:
        return Capabilities(frozenset({"generate", "embed", "rerank"}), frozenset(self.honours), self.vision)

    def health(self) -> BackendHealth:
        return BackendHealth("closed" if self.closed else "ready", 0)

    async def close(self) -> None:
        self.closed = True


class _OneBackend(Gateway):
    """A gateway whose every model is run by one backend, whatever the name."""

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self._backend = backend

    def _spec(self, model: ModelSpec | str | None) -> ModelSpec:
        name = model.model if isinstance(model, ModelSpec) else model
        return ModelSpec(name or self.config.default_model, backend="openai", url="http://localhost")

    def _new_entry(self, key: Any, spec: ModelSpec, found: Any, purpose: Any) -> _Entry:
        return _Entry(spec.model, spec, None, None, 0, self._backend)
