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
from demandport.engine.cell import Cell
from demandport.engine.demand import Demand, cached_meta
from demandport.engine.executor import Executor
from demandport.engine.registry import hash_of, runnable
from demandport.engine.session import Session
from demandport.engine.slots import Slots
from demandport.errors import (
    BadMessage,
    Cancelled,
    DeadlineExceeded,
    DemandportError,
    Draining,
    Internal,
    TypeMismatch,
    UnknownSession,
)
from demandport.graph.loading import load
from demandport.graph.spec import NodeSpec
from demandport.graph.validation import problems_of
from demandport.ids import DemandId, SessionId
from demandport.inference.config import ModelSpec
from demandport.inference.gateway import Gateway
from demandport.pipes import Writer
from demandport.service.host_calls import TOOLS, Host, HostCalls, SessionSpecs
from demandport.service.inbox import Inbox
from demandport.service.many import ManySink
from demandport.service.streams import Stream, WireSink
from demandport.service.subscription import Subscription
from demandport.wire import messages as m
from demandport.wire.connection import MAX_OPEN_REQUESTS, Connection, Farewell, Refused
from demandport.wire.outbox import Outbox
from demandport.wire.terms import MAX_DEPTH

log = logging.getLogger(__name__)

MAX_SESSIONS = 10_000
MAX_DEMANDS = 50_000
#: Streams find no room while this much waits to be written.
ROOM_BYTES = 1 << 20
#: Reading pauses while this much waits to be written: the host asks, and does not read the answers.
PAUSE_BYTES = 64 << 20
FEATURES = ["credit", "parts", "coalesce", "events", "ext_69", "host_nodes", "demand_many", "subscribe"]
#: Events that a session keeps once somebody subscribed to them, unless `open` says another number.
EVENT_HISTORY = 1000


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
        self._core = runnable(specs)
        self._sessions: dict[str, Session] = {}
        self._demands: dict[int, tuple[Session, Demand]] = {}
        self._streams: dict[int, Stream] = {}
        self._subscriptions: dict[str, Subscription] = {}
        self._host_calls = HostCalls(self.send)
        self._session_slots = Slots("sessions", MAX_SESSIONS)
        self._demand_slots = Slots("demands", MAX_DEMANDS)
        self._out = _DemandOut(self)
        self._roomless: deque[asyncio.Future[None]] = deque()
        self._paused = False
        self.inbox = Inbox(connection)
        self._read, self._kept = self.inbox.read, self.inbox.kept
        self._draining = False
        self._last_demand = 0
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
                self._demand(event)
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
        except TypeMismatch as wrong:
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
        """Send a message; those of one lane (a demand) keep their order. Raises `TypeMismatch`."""
        data = self._outbox.put(message, lane)
        if data is None:
            self._writer.wake()
        else:
            self._writer.write(data)

    def has_room(self) -> bool:
        """Streams may send."""
        return self._writer.pending_bytes < ROOM_BYTES

    def on_room(self, waiter: asyncio.Future[None]) -> None:
        """Resolve `waiter` once there is room."""
        self._roomless.append(waiter)

    def refill(self) -> list[bytes]:
        """More frames for the writer; called when it has written everything else."""
        while self._roomless and self.has_room():
            waiter = self._roomless.popleft()
            if not waiter.done():
                waiter.set_result(None)
        if self._paused and self._unsent() < PAUSE_BYTES // 2:
            asyncio.get_running_loop().call_soon(self.work)
        return self._outbox.next_frames()

    def _unsent(self) -> int:
        return self._writer.pending_bytes + self._outbox.waiting_bytes

    # ----------------------------------------------------------------------------------- demands

    def _demand(self, message: m.Demand) -> None:
        id, options = message.id, message.options
        session = self._sessions.get(message.session)
        if session is not None and not options.events and not self._draining:
            cell = session.known(message.node)
            if cell is not None:
                self._answer_from_cache(id, cell)
                return
        sink = WireSink(self._out, message)
        self._enter(id, sink)
        try:
            session = self._admit(message.session)
            demand = session.demand(
                message.node,
                sink,
                self._demand_ended,
                deadline_ms=options.deadline_ms,
                priority=options.priority,
                events=options.events,
                label=id,
            )
            if not demand.ended:
                self._demands[id] = (session, demand)
        except DemandportError as refused:
            sink.error(refused, {})
        except Exception as bug:
            log.exception("a bug behind demand %s", id)
            sink.error(Internal(f"{type(bug).__name__}: {bug}"), {})

    def _answer_from_cache(self, id: DemandId, cell: Cell) -> None:
        """What comes most often, without all that a demand which may take time needs."""
        if id > self._last_demand:
            self._last_demand = id
        self._connection.finish(id)
        self._demand_slots.passed()
        self._out.send(["demand_complete", cell.node_id, cell.outputs, id, cached_meta(cell)], id)

    def _demand_many(self, message: m.DemandMany) -> Any:
        sink = ManySink(self._out, message)
        self._enter(message.id, sink)
        try:
            sink.begin(self._admit(message.session), self._tasks.start_soon)
        except DemandportError as refused:
            sink.give_up(refused)
        return _LATER

    def _enter(self, id: int, stream: Stream) -> None:
        """A demand is open, until `stream_ended`."""
        if id > self._last_demand:
            self._last_demand = id
        self._streams[id] = stream
        self._demand_slots.enter()

    def _admit(self, session: str) -> Session:
        """The session of a new demand."""
        if self._draining:
            raise Draining("the service is draining; open another port")
        if self._demand_slots.open > MAX_DEMANDS:
            raise self._demand_slots.refusal()
        return self._session(session)

    def _demand_ended(self, demand: Demand) -> None:
        sink = demand.sink
        assert isinstance(sink, WireSink)
        self._demands.pop(sink.id, None)

    def stream_ended(self, stream: Stream) -> None:
        """The terminal of a demand is sent."""
        self._streams.pop(stream.id, None)
        self._connection.finish(stream.id)
        self._demand_slots.release()

    def _cancel(self, message: m.Cancel) -> bool:
        return self._cancel_demand(message.demand, Cancelled("the host cancelled the demand"))

    def _cancel_demand(self, id: int, error: DemandportError) -> bool:
        open_demand = self._demands.get(id)
        if open_demand is not None:
            session, demand = open_demand
            session.cancel(demand, error.at(demand.cell.node_id))
            return True
        stream = self._streams.get(id)
        return stream is not None and stream.give_up(error)

    def _credit(self, message: m.Credit) -> Any:
        stream = self._streams.get(message.demand)
        if stream is not None:
            stream.grant(message.n)
        elif message.demand > self._last_demand:
            self.send(["error", 0, BadMessage(f"credit names no demand: {message.demand}").to_wire()])
        return _LATER

    # ---------------------------------------------------------------------------------- sessions

    def _session(self, name: str) -> Session:
        session = self._sessions.get(name)
        if session is None:
            raise UnknownSession(f"there is no session {name!r}; open it first")
        return session

    def _open(self, message: m.Open) -> dict[str, Any]:
        name, options = message.session, message.options
        if name in self._sessions:
            raise BadMessage(f"the session {name!r} is open already; close it first")
        self._session_slots.take()
        try:
            specs, resources = self._as_host_wants(name, options)
            session = Session(
                message.graph,
                specs,
                self._executor,
                max_running=options.max_running,
                max_queued=options.max_queued,
                resources=resources,
            )
            if options.edits:
                session.edit(options.edits)
        except BaseException:
            self._session_slots.release()
            raise
        if options.event_history:
            session.keep_events(options.event_history)
        self._sessions[name] = session
        return {"nodes": session.size, "problems": [problem.to_wire() for problem in session.problems]}

    def _as_host_wants(
        self, session: SessionId, options: m.OpenOptions
    ) -> tuple[Mapping[str, NodeSpec], Mapping[str, Any] | None]:
        """The node types of a session, and what its nodes may use, with what the host runs of them."""
        if not options.host_types and not options.host_else:
            return self._core, None
        host = Host(self._host_calls, session, options.host_timeout_ms)
        specs = SessionSpecs(self._specs, host, options.host_types, options.host_else)
        resources = dict(self._executor.resources)
        if TOOLS in specs:
            resources["call_tool"] = host.call_tool
        return specs, resources

    def _close(self, message: m.Close) -> None:
        session = self._session(message.session)
        session.close()
        for stream in [s for s in self._streams.values() if s.session == message.session]:
            stream.give_up(Cancelled("the session was closed"))
        subscription = self._subscriptions.pop(message.session, None)
        if subscription is not None:
            subscription.close()
        del self._sessions[message.session]
        self._session_slots.release()

    def _snapshot(self, message: m.Snapshot) -> dict[str, Any]:
        return self._session(message.session).snapshot()

    def _edit(self, message: m.Edit) -> dict[str, Any]:
        return {"stale": self._session(message.session).edit(message.operations)}

    def _get_output(self, message: m.GetOutput) -> dict[str, Any]:
        return self._session(message.session).output(message.node, message.port)

    def _subscribe(self, message: m.Subscribe) -> Any:
        """Replayed events follow the reply, and the new ones follow them."""
        name, options = message.session, message.options
        kept = self._session(name).keep_events(EVENT_HISTORY)
        since = kept.next if options.since is None else min(options.since, kept.next)
        self._ok(message.id, {"first": kept.first, "next": kept.next})
        if name in self._subscriptions:
            self._subscriptions[name].close()
        subscription = self._subscriptions[name] = Subscription(self._out, name, kept, since, options.kinds)
        subscription.send()
        return _LATER

    def _unsubscribe(self, message: m.Unsubscribe) -> bool:
        self._session(message.session)
        subscription = self._subscriptions.pop(message.session, None)
        if subscription is not None:
            subscription.close()
        return subscription is not None

    def _answer(self, message: m.Answer) -> Any:
        self._host_calls.answer(message.call, message.status, message.value)
        return _LATER

    def _answer_stream(self, message: m.AnswerStream) -> Any:
        self._host_calls.stream(message.call, message.chunk, message.port)
        return _LATER

    def _validate(self, message: m.Validate) -> dict[str, Any]:
        try:
            problems = [problem.to_wire() for problem in problems_of(load(message.graph), self._core)]
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

        loads = [session.load for session in self._sessions.values()]
        return {
            "status": "draining" if self._draining else "ok",
            "uptime_ms": int((time.monotonic() - self._started) * 1000),
            "os_pid": os.getpid(),
            "version": __version__,
            "python": sys.version.partition(" ")[0],
            "sessions": self._session_slots.report(),
            "demands": {
                **self._demand_slots.report(),
                "running": sum(running for running, _ in loads),
                "queued": sum(queued for _, queued in loads),
            },
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
        self._draining = True
        return self._later(message.id, lambda: self._drained(message.timeout_ms))

    async def _drained(self, timeout_ms: int) -> dict[str, int]:
        open_at_start = self._demand_slots.open
        with anyio.move_on_after(timeout_ms / 1000):
            await self._demand_slots.empty()
        late = DeadlineExceeded("the service was drained")
        cancelled = sum(self._cancel_demand(id, late) for id in list(self._streams))
        await self._all_sent()
        return {"completed": open_at_start - cancelled, "cancelled": cancelled}

    async def _all_sent(self) -> None:
        """Return once no large message waits: a host that is told so may close the connection."""
        while self._outbox.waiting_bytes:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.on_room(waiter)
            await waiter


class _DemandOut:
    """The connection as one demand's stream sees it: a value that cannot travel ends the demand, and nothing else."""

    __slots__ = ("_service", "has_room", "on_room", "stream_ended")

    def __init__(self, service: Service) -> None:
        self._service = service
        self.has_room = service.has_room
        self.on_room = service.on_room
        self.stream_ended = service.stream_ended

    def send(self, message: list[Any], lane: int = 0) -> None:
        try:
            self._service.send(message, lane)
        except TypeMismatch as wrong:
            self._send_instead(message, lane, wrong)

    def _send_instead(self, message: list[Any], lane: int, wrong: TypeMismatch) -> None:
        service, kind, node = self._service, message[0], message[1]
        if kind == "node_event":
            known = {key: message[2].get(key) for key in ("event", "node", "seq", "time_us")}
            service.send([kind, node, {**known, "error": wrong.to_wire()}], lane)
        elif kind == "node_stream":
            sink = service._streams[lane]
            assert isinstance(sink, WireSink)
            sink.broken = wrong.at(node)
            asyncio.get_running_loop().call_soon(service._cancel_demand, lane, wrong)
        else:
            meta = message[4] if kind == "demand_complete" else {}
            error = wrong.at(node) if isinstance(node, str) else wrong
            service.send(["demand_error", node, error.to_wire(), lane, meta], lane)


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
