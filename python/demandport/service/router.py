"""Where wire and engine meet: each message of the host is handled here, and what comes of it is sent.

The main loop is `Service.work`: messages of the inbox → one handler each, chosen by the message's type. Handlers do not
wait; what takes time runs as a task of the service's task group and sends its reply when it is done.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import anyio
import anyio.abc

from demandport import __version__
from demandport.engine.executor import Executor
from demandport.engine.registry import hash_of
from demandport.errors import Cancelled, DemandportError, Internal
from demandport.graph.loading import load
from demandport.graph.spec import NodeSpec
from demandport.graph.validation import problems_of
from demandport.inference.config import ModelSpec
from demandport.inference.gateway import Gateway
from demandport.pipes import Writer
from demandport.service.demands import MAX_DEMANDS, Demands
from demandport.service.host_calls import HostCalls
from demandport.service.inbox import Inbox
from demandport.service.sessions import MAX_SESSIONS, Sessions
from demandport.wire import messages as m
from demandport.wire.connection import MAX_OPEN_REQUESTS, Connection, Farewell, Refused
from demandport.wire.outbox import Outbox
from demandport.wire.terms import MAX_DEPTH

log = logging.getLogger(__name__)

#: Streams find no room while this much waits to be written.
ROOM_BYTES = 1 << 20
#: Reading pauses while this much waits to be written: the host asks, and does not read the answers.
PAUSE_BYTES = 64 << 20
FEATURES = ["credit", "parts", "coalesce", "events", "ext_69", "host_nodes", "demand_many", "subscribe"]


class Service:
    """One host's service: its connection, its sessions and its demands.

    Args:
        connection, outbox, writer: the way in and the way out.
        end: called with an exit status when the connection is over.
        pause: called with True when reading must pause, with False when it may go on.

    Attributes:
        inbox: what was read and not handled yet.
    """

    def __init__(
        self,
        connection: Connection,
        outbox: Outbox,
        writer: Writer,
        executor: Executor,
        gateway: Gateway,
        specs: Mapping[str, NodeSpec],
        tasks: anyio.abc.TaskGroup,
        limits: Mapping[str, int],
        end: Callable[[int], None],
        pause: Callable[[bool], None],
    ) -> None:
        self._connection, self._outbox, self._writer = connection, outbox, writer
        self._executor, self._gateway, self._specs, self._tasks = executor, gateway, specs, tasks
        self._limits, self._end, self._pause = limits, end, pause
        self._host_calls = HostCalls(self.send)
        self._sessions = Sessions(specs, executor, self._host_calls)
        self._demands = Demands(self, self._sessions, connection.finish, tasks.start_soon)
        self._roomless: deque[Callable[[], object]] = deque()
        self._paused = False
        self.inbox = Inbox(connection)
        self._read, self._kept = self.inbox.read, self.inbox.kept
        self._started = time.monotonic()

    # ------------------------------------------------------------------------------------- the loop

    def ready(self, codec: str) -> None:
        """Send the first frame."""
        info = {
            "protocol": m.PROTOCOL,
            "version": __version__,
            "codec": codec,
            "limits": {
                **self._limits,
                "part_bytes": self._outbox.part_bytes,
                "max_depth": MAX_DEPTH,
                "max_open_requests": MAX_OPEN_REQUESTS,
                "max_running": MAX_DEMANDS,
                "max_queued": MAX_DEMANDS,
                "max_sessions": MAX_SESSIONS,
            },
            "features": FEATURES,
            "node_types_hash": hash_of(dict(self._specs)),
            "os_pid": os.getpid(),
        }
        self.send(["ready", info])

    def work(self) -> None:
        """Handle what was read, in order, and write what comes of it at once; unless the host is far behind with
        reading the answers."""
        self._writer.cork()
        try:
            self._handle(self._read)
        finally:
            self._writer.uncork()
        behind = bool(self._read) or self._unsent() > PAUSE_BYTES
        if behind != self._paused:
            self._paused = behind
            self._pause(behind)
        if self._kept and not behind:
            self.inbox.give_back()
            asyncio.get_running_loop().call_soon(self.work)

    def _handle(self, events: deque[Any]) -> None:
        while events and self._unsent() <= PAUSE_BYTES:
            event = events.popleft()
            kind = type(event)
            if kind is m.Demand:
                self._demands.start(event)
            elif kind is Refused:
                self.send(["error", event.id, event.error.to_wire()])
            elif kind is Farewell:
                if event.id:
                    self.send(["error", event.id, event.error.to_wire()])
                self.send(["goodbye", event.error.to_wire()])
                self._end(event.status)
                return
            else:
                self._request(event)

    def _request(self, message: Any) -> None:
        id = getattr(message, "id", 0)
        try:
            result = _HANDLERS[type(message)](self, message)
        except DemandportError as wrong:
            self._error(id, wrong)
        except Exception as bug:
            log.exception("a bug in the handler of %s", type(message).__name__)
            self._error(id, Internal(f"{type(bug).__name__}: {bug}"))
        else:
            if result is not _LATER:
                self._ok(id, result)

    def _ok(self, id: int, result: Any) -> None:
        self._connection.finish(id)
        try:
            self.send(["ok", id, result])
        except DemandportError as wrong:
            self.send(["error", id, wrong.to_wire()])

    def _error(self, id: int, error: DemandportError) -> None:
        self._connection.finish(id)
        self.send(["error", id, error.to_wire()])

    def _later(self, id: int, work: Callable[[], Awaitable[Any]]) -> Any:
        """Reply to `id` with what `work` returns; the handler is done meanwhile."""

        async def run() -> None:
            try:
                result = await work()
            except DemandportError as wrong:
                self._error(id, wrong)
            except Exception as bug:
                log.exception("a bug behind request %s", id)
                self._error(id, Internal(f"{type(bug).__name__}: {bug}"))
            else:
                self._ok(id, result)

        self._tasks.start_soon(run)
        return _LATER

    # ----------------------------------------------------------------------------------- way out

    def send(self, message: list[Any], lane: int = 0) -> None:
        """Send a message; those of one lane (a demand) keep their order. Raises `TypeMismatch`, `TooLarge`."""
        data = self._outbox.put(message, lane)
        if data is None:
            self._writer.wake()
        else:
            self._writer.write(data)

    def has_room(self) -> bool:
        """Streams may send."""
        return self._writer.pending_bytes < ROOM_BYTES

    def on_room(self, resume: Callable[[], object]) -> None:
        """Call `resume` once there is room."""
        self._roomless.append(resume)

    def refill(self) -> list[bytes]:
        """More frames for the writer; called when it has written everything else."""
        while self._roomless and self.has_room():
            asyncio.get_running_loop().call_soon(self._roomless.popleft())
        if self._paused and self._unsent() < PAUSE_BYTES // 2:
            asyncio.get_running_loop().call_soon(self.work)
        return self._outbox.next_frames()

    def _unsent(self) -> int:
        return self._writer.pending_bytes + self._outbox.waiting_bytes

    # --------------------------------------------------------------------------- demands and sessions

    def _demand_many(self, message: m.DemandMany) -> Any:
        self._demands.start_many(message)
        return _LATER

    def _cancel(self, message: m.Cancel) -> bool:
        return self._demands.cancel(message.demand, Cancelled("the host cancelled the demand"))

    def _credit(self, message: m.Credit) -> Any:
        self._demands.grant(message.demand, message.n)
        return _LATER

    def _open(self, message: m.Open) -> dict[str, Any]:
        session = self._sessions.open(message.session, message.graph, message.options)
        return {"nodes": session.size, "problems": [problem.to_wire() for problem in session.problems]}

    def _close(self, message: m.Close) -> None:
        self._sessions.close(message.session)
        self._demands.session_closed(message.session)

    def _snapshot(self, message: m.Snapshot) -> dict[str, Any]:
        return self._sessions.get(message.session).snapshot()

    def _edit(self, message: m.Edit) -> dict[str, Any]:
        return {"stale": self._sessions.get(message.session).edit(message.operations)}

    def _get_output(self, message: m.GetOutput) -> dict[str, Any]:
        return self._sessions.get(message.session).output(message.node, message.port)

    def _subscribe(self, message: m.Subscribe) -> Any:
        """Replayed events follow the reply, and the new ones follow them."""
        self._ok(message.id, self._sessions.kept_events(message.session))
        self._sessions.subscribe(message.session, self._demands, message.options)
        return _LATER

    def _unsubscribe(self, message: m.Unsubscribe) -> bool:
        self._sessions.get(message.session)
        return self._sessions.unsubscribe(message.session)

    def _answer(self, message: m.Answer) -> Any:
        self._host_calls.answer(message.call, message.status, message.value)
        return _LATER

    def _answer_stream(self, message: m.AnswerStream) -> Any:
        self._host_calls.stream(message.call, message.chunk, message.port)
        return _LATER

    def _validate(self, message: m.Validate) -> dict[str, Any]:
        try:
            problems = [problem.to_wire() for problem in problems_of(load(message.graph), self._sessions.core)]
        except DemandportError as unreadable:
            problems = [{"code": unreadable.code, "message": unreadable.message, "node": unreadable.node}]
        return {"valid": not problems, "problems": problems}

    def _node_types(self, message: m.NodeTypes) -> list[dict[str, Any]]:
        wanted = message.filter
        category = wanted.get("category") if isinstance(wanted, dict) else None
        return [
            spec.describe()
            for name, spec in self._specs.items()
            if (not isinstance(wanted, str) or name == wanted) and (category is None or spec.category == category)
        ]

    # ------------------------------------------------------------------------- models and the rest

    def _hello(self, message: m.Hello) -> dict[str, Any]:
        if message.options.part_bytes is not None:
            self._outbox.part_bytes = message.options.part_bytes
        if message.options.max_frame_bytes is not None:
            self._outbox.max_bytes = message.options.max_frame_bytes
            self._outbox.part_bytes = min(self._outbox.part_bytes, message.options.max_frame_bytes - 64)
        return {"protocol": m.PROTOCOL, "features": FEATURES}

    def _models(self, message: m.Models) -> Any:
        return self._gateway.models()

    def _load_model(self, message: m.LoadModel) -> Any:
        spec = message.spec
        wanted = ModelSpec(
            spec.model,
            context_length=spec.context_length,
            gpu_layers=spec.gpu_layers,
            threads=spec.threads,
            replicas=spec.replicas,
            balance=spec.balance,
        )
        return self._later(message.id, lambda: self._gateway.load_model(wanted, spec.purpose))

    def _unload_model(self, message: m.UnloadModel) -> Any:
        options = message.options
        model = {"id": options.id} if options.model is None else options.model
        return self._later(message.id, lambda: self._gateway.unload_model(model, options.when_busy))

    def _health(self, message: m.Health) -> dict[str, Any]:
        import psutil

        return {
            "status": "draining" if self._demands.draining else "ok",
            "uptime_ms": int((time.monotonic() - self._started) * 1000),
            "os_pid": os.getpid(),
            "version": __version__,
            "python": sys.version.partition(" ")[0],
            "sessions": self._sessions.slots.report(),
            "demands": {**self._demands.slots.report(), **self._sessions.load()},
            "host_calls": self._host_calls.slots.report(),
            "nodes_running": self._executor.running,
            "pools": {"threads": self._executor.threads.health(), "cpu": self._executor.cpu.health()},
            "workers": self._gateway.models(),
            "memory_bytes": psutil.Process().memory_info().rss,
            "unsent_bytes": self._unsent(),
        }

    def _ping(self, message: m.Ping) -> Any:
        return "pong" if self.inbox.claim(message) else _LATER

    def _drain(self, message: m.Drain) -> Any:
        self._demands.drain()
        return self._later(message.id, lambda: self._drained(message.timeout_ms))

    async def _drained(self, timeout_ms: int) -> dict[str, int]:
        """Reply once no large message waits, too: a host that is told so may close the connection."""
        counts = await self._demands.drained(timeout_ms)
        while self._outbox.waiting_bytes:
            room = anyio.Event()
            self.on_room(room.set)
            await room.wait()
        return counts


_LATER = object()
_HANDLERS: dict[type[Any], Callable[[Service, Any], Any]] = {
    m.Hello: Service._hello,
    m.Open: Service._open,
    m.Close: Service._close,
    m.Snapshot: Service._snapshot,
    m.Edit: Service._edit,
    m.GetOutput: Service._get_output,
    m.DemandMany: Service._demand_many,
    m.Subscribe: Service._subscribe,
    m.Unsubscribe: Service._unsubscribe,
    m.Answer: Service._answer,
    m.AnswerStream: Service._answer_stream,
    m.Cancel: Service._cancel,
    m.Credit: Service._credit,
    m.Validate: Service._validate,
    m.NodeTypes: Service._node_types,
    m.Models: Service._models,
    m.LoadModel: Service._load_model,
    m.UnloadModel: Service._unload_model,
    m.Health: Service._health,
    m.Ping: Service._ping,
    m.Drain: Service._drain,
}
