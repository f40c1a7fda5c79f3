"""The open demands of one host, from their message to their terminal."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import anyio

from demandport.engine.cell import Cell
from demandport.engine.demand import Demand, cached_meta
from demandport.engine.session import Session
from demandport.engine.slots import Slots
from demandport.errors import BadMessage, Cancelled, DeadlineExceeded, DemandportError, Draining, Internal
from demandport.ids import DemandId
from demandport.service.many import ManySink
from demandport.service.sessions import Sessions
from demandport.service.streams import Stream, Way, WireSink
from demandport.wire.messages import Demand as DemandMessage
from demandport.wire.messages import DemandMany

log = logging.getLogger(__name__)

MAX_DEMANDS = 50_000


class Demands:
    """Starts demands, and is how their streams see the way out (`demandport.service.streams.Out`): a value that cannot
    travel ends its demand, and nothing else.

    Args:
        finish: told the id of each demand whose terminal is sent.
        run: starts a coroutine function, with arguments, in the task group that owns it.

    Attributes:
        draining: no more are taken.
    """

    def __init__(self, way: Way, sessions: Sessions, finish: Callable[[int], None], run: Callable[..., Any]) -> None:
        self._way, self._sessions, self._finish, self._run = way, sessions, finish, run
        self.has_room, self.on_room = way.has_room, way.on_room
        self.slots = Slots("demands", MAX_DEMANDS)
        self.draining = False
        #: Those that the engine has not ended. Of all that are here, the stream until its terminal is sent.
        self._running: dict[int, tuple[Session, Demand]] = {}
        self._streams: dict[int, Stream] = {}
        self._last = 0

    # ---------------------------------------------------------------------------------- from the host

    def start(self, message: DemandMessage) -> None:
        """Begin a demand; all that goes wrong is its terminal."""
        id, options = message.id, message.options
        session = self._sessions.find(message.session)
        if session is not None and not options.events and not self.draining:
            cell = session.known(message.node)
            if cell is not None:
                self._answer_from_cache(id, cell)
                return
        sink = WireSink(self, message)
        self._enter(id, sink)
        try:
            session = self._admit(message.session)
            demand = session.demand(
                message.node,
                sink,
                self._ended,
                deadline_ms=options.deadline_ms,
                priority=options.priority,
                events=options.events,
                label=id,
            )
            if not demand.ended:
                self._running[id] = (session, demand)
        except DemandportError as refused:
            sink.error(refused, {})
        except Exception as bug:
            log.exception("a bug behind demand %s", id)
            sink.error(Internal(f"{type(bug).__name__}: {bug}"), {})

    def start_many(self, message: DemandMany) -> None:
        """Begin a demand on several nodes; all that goes wrong is its terminal."""
        sink = ManySink(self, message)
        self._enter(message.id, sink)
        try:
            sink.begin(self._admit(message.session), self._run)
        except DemandportError as refused:
            sink.give_up(refused)

    def cancel(self, id: int, error: DemandportError) -> bool:
        """End a demand with `error`; False when it has ended."""
        running = self._running.get(id)
        if running is not None:
            session, demand = running
            session.cancel(demand, error.at(demand.cell.node_id))
            return True
        stream = self._streams.get(id)
        return stream is not None and stream.give_up(error)

    def grant(self, id: int, n: int) -> None:
        """The host accepts `n` more stream messages; nothing for a demand that has been.

        Raises:
            BadMessage: there has been no such demand.
        """
        stream = self._streams.get(id)
        if stream is not None:
            stream.grant(n)
        elif id > self._last:
            raise BadMessage(f"credit names no demand: {id}")

    def session_closed(self, name: str) -> None:
        """What is left of its demands: terminals that wait for credit, and demands on several nodes."""
        for stream in [one for one in self._streams.values() if one.session == name]:
            stream.give_up(Cancelled("the session was closed"))

    def drain(self) -> None:
        """Take no more."""
        self.draining = True

    async def drained(self, timeout_ms: int) -> dict[str, int]:
        """Return once all have ended; those that have not by then are cancelled."""
        open_at_start = self.slots.open
        with anyio.move_on_after(timeout_ms / 1000):
            await self.slots.empty()
        late = DeadlineExceeded("the service was drained")
        cancelled = sum(self.cancel(id, late) for id in list(self._streams))
        return {"completed": open_at_start - cancelled, "cancelled": cancelled}

    # ---------------------------------------------------------------------------------- to the host

    def send(self, message: list[Any], lane: int = 0) -> None:
        try:
            self._way.send(message, lane)
        except DemandportError as wrong:
            self._send_instead(message, lane, wrong)

    def stream_ended(self, stream: Stream) -> None:
        self._streams.pop(stream.id, None)
        self._finish(stream.id)
        self.slots.release()

    # -------------------------------------------------------------------------------------- inside

    def _answer_from_cache(self, id: DemandId, cell: Cell) -> None:
        """What comes most often, without all that a demand which may take time needs."""
        if id > self._last:
            self._last = id
        self._finish(id)
        self.slots.passed()
        self.send(["demand_complete", cell.node_id, cell.outputs, id, cached_meta(cell)], id)

    def _enter(self, id: int, stream: Stream) -> None:
        """A demand is open, until `stream_ended`."""
        if id > self._last:
            self._last = id
        self._streams[id] = stream
        self.slots.enter()

    def _admit(self, session: str) -> Session:
        """The session of a new demand."""
        if self.draining:
            raise Draining("the service is draining; open another port")
        if self.slots.open > MAX_DEMANDS:
            raise self.slots.refusal()
        return self._sessions.get(session)

    def _ended(self, demand: Demand) -> None:
        sink = demand.sink
        assert isinstance(sink, WireSink)
        self._running.pop(sink.id, None)

    def _send_instead(self, message: list[Any], lane: int, wrong: DemandportError) -> None:
        kind, node = message[0], message[1]
        if kind == "node_event":
            known = {key: message[2].get(key) for key in ("event", "node", "seq", "time_us")}
            self._way.send([kind, node, {**known, "error": wrong.to_wire()}], lane)
        elif kind == "node_stream":
            sink = self._streams[lane]
            assert isinstance(sink, WireSink)
            sink.broken = wrong.at(node)
            asyncio.get_running_loop().call_soon(self.cancel, lane, wrong)
        else:
            meta = message[4] if kind == "demand_complete" else {}
            error = wrong.at(node) if isinstance(node, str) else wrong
            self._way.send(["demand_error", node, error.to_wire(), lane, meta], lane)
