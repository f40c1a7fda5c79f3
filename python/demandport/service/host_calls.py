"""Nodes that the host runs: `node_execute` out, `answer` and `answer_stream` in."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import anyio

from demandport.engine.node import Context
from demandport.engine.slots import Slots
from demandport.errors import (
    BY_CODE,
    BadMessage,
    Cancelled,
    DemandportError,
    HostUnavailable,
    NodeFailed,
    QueueFull,
    from_wire,
)
from demandport.graph.spec import NodeSpec, spec_from
from demandport.ids import CallId, PortName, SessionId

#: Calls that wait for the host, over all sessions.
MAX_CALLS = 50_000
#: Chunks that a host may be ahead of a consumer that takes none.
MAX_CHUNKS_AHEAD = 1024
#: What the parameter of a host node that takes the `Context` is called: no input port can have this name.
_CONTEXT = "\0context"

#: The node type that runs tools by name.
TOOLS = "tool-executor"

Claims = list[Any] | Literal["all"]
Inputs = dict[str, Any]


class _Call:
    """One node that the host runs now."""

    def __init__(self, context: Context, streams: bool) -> None:
        self.context, self.streams = context, streams
        #: Chunks that came and did not go on yet; text goes on at once while there are none.
        self.chunks: deque[tuple[Any, str | None]] = deque()
        self.outcome: dict[str, Any] | DemandportError | None = None
        #: The host ended it, not we.
        self.answered = False
        self.news = asyncio.Event()
        self._passing = anyio.CancelScope()

    def end(self, outcome: dict[str, Any] | DemandportError) -> None:
        """What the host answered; the first counts. An error does not wait for chunks that nobody takes."""
        if self.outcome is None:
            self.outcome = outcome
            self.news.set()
            if isinstance(outcome, DemandportError):
                self._passing.cancel()

    async def result(self) -> dict[str, Any]:
        """Pass chunks on, in order, until the host has answered."""
        with self._passing:
            while self.outcome is None or self.chunks:
                while self.chunks:
                    await self.context.emit(*self.chunks[0])
                    self.chunks.popleft()
                if self.outcome is None:
                    self.news.clear()
                    await self.news.wait()
        if isinstance(self.outcome, DemandportError):
            raise self.outcome
        assert self.outcome is not None
        return self.outcome


class HostCalls:
    """All calls that the host has not answered yet.

    Args:
        send: sends a message to the host.
    """

    def __init__(self, send: Callable[[list[Any]], None]) -> None:
        self._send = send
        self._open: dict[CallId, _Call] = {}
        self._last = CallId(0)
        self.slots = Slots("calls of the host", MAX_CALLS)

    async def call(
        self,
        session: SessionId,
        context: Context,
        node_type: str,
        inputs: Inputs,
        timeout_ms: int,
        streams: bool = True,
    ) -> dict[str, Any]:
        """Have the host run a node; chunks that it streams go to `context`, if it `streams`. Returns outputs by port.

        Cancelled, or past its time, the host is sent `node_cancel`.

        Raises:
            HostUnavailable: the host has not answered within `timeout_ms`.
            QueueFull: too many calls are open.
            DemandportError: what the host answered.
        """
        self.slots.take()
        call, id = _Call(context, streams), CallId(self._last + 1)
        remaining = context.remaining_s
        options = {
            "timeout_ms": timeout_ms,
            "deadline_ms": None if remaining is None else int(remaining * 1000),
            "priority": context.priority,
        }
        try:
            self._send(["node_execute", id, session, context.node, node_type, inputs, options])
            self._last = id
            self._open[id] = call
            async with asyncio.timeout(timeout_ms / 1000):
                return await call.result()
        except TimeoutError:
            raise HostUnavailable(f"the host has not answered within {timeout_ms} ms") from None
        finally:
            self.slots.release()
            if self._open.pop(id, None) is not None and not call.answered:
                self._send(["node_cancel", id])

    def answer(self, id: CallId, status: str, value: Any) -> None:
        """The host ended a call. One that is over already is let pass: both may have ended it at once.

        Raises:
            BadMessage: there was no such call.
        """
        call = self._find(id)
        if call is None:
            return
        call.answered = True
        if status == "error":
            call.end(_error(value))
        elif type(value) is dict:
            call.end(value)
        else:
            call.end(NodeFailed(f"the host must answer a map of outputs by port, not {type(value).__name__}"))

    def stream(self, id: CallId, chunk: Any, port: PortName | None) -> None:
        """The host streams. Raises as `answer`."""
        call = self._find(id)
        if call is None or call.outcome is not None or not call.streams:
            return
        try:
            if type(chunk) is str and not call.chunks:
                call.context.write(chunk, port)
                return
        except DemandportError as wrong:
            call.end(wrong)
            return
        if len(call.chunks) >= MAX_CHUNKS_AHEAD:
            call.end(QueueFull(f"the host is {MAX_CHUNKS_AHEAD} chunks ahead of who consumes them"))
            return
        call.chunks.append((chunk, port))
        call.news.set()

    def _find(self, id: CallId) -> _Call | None:
        if id > self._last:
            raise BadMessage(f"there has been no call {id}")
        return self._open.get(id)


@dataclass(frozen=True)
class Host:
    """The host as one session sees it: the node types that it claimed, and the way to call it."""

    calls: HostCalls
    session: SessionId
    timeout_ms: int

    async def call(self, context: Context, node_type: str, inputs: Inputs) -> dict[str, Any]:
        """As `HostCalls.call`."""
        return await self.calls.call(self.session, context, node_type, inputs, self.timeout_ms)

    async def call_tool(self, context: Context, tool: str, arguments: Any) -> Any:
        """Have the host run a tool for a node; what it streams is dropped. Returns its result.

        Raises:
            HostUnavailable, QueueFull, DemandportError: as `HostCalls.call`.
        """
        inputs = {"tool": tool, "arguments": arguments}
        outputs = await self.calls.call(self.session, context, TOOLS, inputs, self.timeout_ms, streams=False)
        return outputs.get("result")


class SessionSpecs(Mapping[str, NodeSpec]):
    """The node types of one session: what the host claimed, first or where the core has none, and the core's.

    Args:
        first: types that the host runs; it may hand one back by answering `unknown_node_type`, then the core runs it.
        otherwise: types that the host runs where the core does not.

    Raises:
        BadMessage: a descriptor among them is wrong.
    """

    def __init__(self, core: Mapping[str, NodeSpec], host: Host, first: Claims, otherwise: Claims) -> None:
        self._core, self._host = core, host
        self._first, self._otherwise = _by_type(first), _by_type(otherwise)
        self._made: dict[str, NodeSpec] = {}

    def __getitem__(self, node_type: str) -> NodeSpec:
        made = self._made.get(node_type)
        if made is None:
            made = self._made[node_type] = self._make(node_type)
        return made

    def __iter__(self) -> Iterator[str]:
        claimed = itertools.chain(self._first or (), self._otherwise or ())
        runnable = (name for name, spec in self._core.items() if spec.runs != "host")
        return iter(dict.fromkeys((*runnable, *claimed)))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _make(self, node_type: str) -> NodeSpec:
        core = self._core.get(node_type)
        known = core if core is not None and core.runs != "host" else None
        for claims, fallback in ((self._first, known), (self._otherwise, None)):
            if claims is not None and node_type not in claims:
                continue
            if claims is self._otherwise and known is not None:
                return known
            described = claims.get(node_type) if claims is not None else None
            return _host_spec(self._host, node_type, described or core, fallback)
        if known is None:
            raise KeyError(node_type)
        return known


def _by_type(claims: Claims) -> dict[str, NodeSpec | None] | None:
    """Descriptor, if there is one, by node type; None for all types."""
    if claims == "all":
        return None
    return {
        item["node_type"] if type(item) is dict else item: spec_from(item) if type(item) is dict else None
        for item in claims
    }


def _host_spec(host: Host, node_type: str, like: NodeSpec | None, core: NodeSpec | None) -> NodeSpec:
    """A node type with the ports of `like` (None: any) that the host runs, or `core` if the host hands it back."""

    async def call(**inputs: Any) -> dict[str, Any]:
        context: Context = inputs.pop(_CONTEXT)
        return await host.call(context, node_type, inputs)

    shape = like or NodeSpec(
        node_type, call, {}, {}, "host", stream="output", open_inputs=True, open_outputs=True, branches=True
    )
    return replace(shape, call=call, runs="host", style="async_function", context=_CONTEXT, single=None, otherwise=core)


def _error(given: Any) -> DemandportError:
    """What the host said went wrong: a message, or an error object; a code that is not known is told in the details."""
    if type(given) is not dict or type(given.get("message")) is not str:
        return NodeFailed(given if type(given) is str else f"the host answered the error {given!r:.200}")
    if given.get("code") in BY_CODE and given["code"] != Cancelled.code:  # nobody cancelled the demand
        return from_wire(given)
    details = given.get("details")
    said = details if type(details) is dict else {} if details is None else {"details": details}
    return NodeFailed(given["message"], details={**said, "code": given.get("code")})
