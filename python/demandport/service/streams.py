"""One demand's way to the wire: its chunks under flow control, its events, its one terminal."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from demandport.errors import DemandportError
from demandport.ids import DemandId, SessionId
from demandport.wire.credit import Sent, StreamWindow
from demandport.wire.messages import Demand as DemandMessage

Terminal = list[Any]


class Stream(Protocol):
    """A demand whose terminal is not sent yet."""

    id: DemandId
    session: SessionId

    def grant(self, n: int) -> None: ...
    def give_up(self, error: DemandportError) -> bool: ...


class Way(Protocol):
    """The way out to the host. `on_room` calls back once there is room again."""

    def send(self, message: list[Any], lane: int = 0) -> None: ...
    def has_room(self) -> bool: ...
    def on_room(self, resume: Callable[[], object]) -> None: ...


class Out(Way, Protocol):
    """What a stream needs: the way out, and somebody to tell when it ended."""

    def stream_ended(self, stream: Stream) -> None: ...


class WireSink:
    """Writes what the engine says of one demand as messages (`demandport.engine.demand.Sink`).

    A terminal follows the last chunk: with text kept for lack of credit it waits, unless the host never gave any.
    """

    def __init__(self, out: Out, message: DemandMessage) -> None:
        self.id = message.id
        self._out = out
        self.session = message.session
        self._node = message.node
        self._options = message.options
        self._opened: StreamWindow | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._terminal: Terminal | None = None
        self._roomless: list[asyncio.Future[None]] = []
        self._awaiting_room = False
        self.ended = False
        #: What it streamed could not travel, so it cannot complete any more.
        self.broken: DemandportError | None = None

    # ------------------------------------------------------------------------------- for the engine

    def chunk(self, node: str, port: str, value: Any) -> None:
        room = self._out.has_room()
        sent = self._window.offer(node, port, value, room)
        if sent is not None:
            self._send(sent)
        elif not room:
            self._await_room()
        elif self._options.coalesce_ms:
            self._hold()

    def full(self) -> bool:
        return (self._opened is not None and self._opened.full) or not self._out.has_room()

    async def room(self) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._roomless.append(waiter)
        if not self._out.has_room():
            self._await_room()
        await waiter

    def event(self, event: dict[str, Any]) -> None:
        self._out.send(["node_event", self.session, {**event, "demand_id": self.id}], self.id)

    def complete(self, outputs: dict[str, Any], meta: dict[str, Any]) -> None:
        if self.broken is not None:
            self.error(self.broken, meta)
            return
        self._terminal = ["demand_complete", self._node, outputs, self.id, meta]
        if self._opened is not None and self._opened.kept:
            self._flush()
        else:
            self._end()

    def error(self, error: DemandportError, meta: dict[str, Any]) -> None:
        self._terminal = ["demand_error", self._node, error.to_wire(), self.id, meta]
        self._end()

    # ------------------------------------------------------------------------------ for the router

    def grant(self, n: int) -> None:
        """The host accepts `n` more stream messages."""
        self._window.grant(n)
        self._flush(held=False)

    def give_up(self, error: DemandportError) -> bool:
        """Replace a terminal that waits for credit by an error. False when none waits."""
        if self._terminal is None or self.ended:
            return False
        self.error(error, self._terminal[4])
        return True

    # ------------------------------------------------------------------------------------- inside

    @property
    def _window(self) -> StreamWindow:
        """Made when it is first needed: what is answered from the cache has no stream."""
        window = self._opened
        if window is None:
            options = self._options
            window = self._opened = StreamWindow(
                options.credit, coalesce_bytes=options.coalesce_bytes, coalescing=options.coalesce_ms > 0
            )
        return window

    def _flush(self, *, held: bool = True) -> None:
        room = self._out.has_room()
        for sent in self._window.release(room, held=held or self._terminal is not None):
            self._send(sent)
        if not self._window.full:
            self._wake()
        if self._window.kept and not room:
            self._await_room()
        if self._terminal is not None and (not self._window.kept or self._window.unwanted):
            self._end()

    def _hold(self) -> None:
        for sent in self._window.release(True, held=False):  # large enough already?
            self._send(sent)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(
                self._options.coalesce_ms / 1000, self._held_long_enough
            )

    def _held_long_enough(self) -> None:
        self._timer = None
        self._flush()

    def _await_room(self) -> None:
        if not self._awaiting_room:
            self._awaiting_room = True
            self._out.on_room(self._has_room)

    def _has_room(self) -> None:
        self._awaiting_room = False
        if not self.ended:
            self._flush(held=False)

    def _send(self, sent: Sent) -> None:
        node, port, seq, chunk = sent
        self._out.send(["node_stream", node, chunk, self.id, seq, port], self.id)

    def _end(self) -> None:
        if self.ended:
            return
        self.ended = True
        if self._timer is not None:
            self._timer.cancel()
        assert self._terminal is not None
        self._out.send(self._terminal, self.id)
        self._wake()
        self._out.stream_ended(self)

    def _wake(self) -> None:
        if not self._roomless:
            return
        waiting, self._roomless = self._roomless, []
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)
