"""The service's side of a connection as a state table: bytes in, typed messages out. No I/O, no await.

    state      on                                next
    fresh      hello that fits                   open
    fresh      hello that does not fit           closed, with goodbye
    fresh      any other message                 open, and the message is handled
    open       any message                       open
    any        frame length over the limit       closed, with goodbye

What is wrong with one message is a `Refused` for that message alone; only what makes the rest of the stream unreadable,
or the protocol unusable, is a `Farewell`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from demandport.errors import BadFrame, BadMessage, DemandportError, UnsupportedProtocol
from demandport.wire.codec import Codec
from demandport.wire.framing import FrameDecoder
from demandport.wire.messages import PROTOCOL, Hello, parse, readable_id

MAX_OPEN_REQUESTS = 100_000


@dataclass(frozen=True, slots=True)
class Refused:
    """A message that gets an error for its reply. `id` is 0 when none could be read."""

    id: int
    error: DemandportError


@dataclass(frozen=True, slots=True)
class Farewell:
    """The connection is over: say goodbye with `error` and exit with `status`.

    `id` is that of the request that ended it, which gets its error first; 0 when no request did.
    """

    error: DemandportError
    status: int
    id: int = 0


class Connection:
    """One host's connection.

    Args:
        codec: how payloads are written.
        max_frame_bytes: largest frame accepted.
    """

    def __init__(self, codec: Codec, max_frame_bytes: int) -> None:
        self._codec = codec
        self._frames = FrameDecoder(max_frame_bytes)
        self._fresh = True
        self._closed = False
        self.open_ids: set[int] = set()

    def receive(self, data: bytes) -> list[Any]:
        """What `data` completes, in order: typed messages, `Refused`, `Farewell` (then nothing more).

        The ids of the messages are open from here on, until `finish`.
        """
        if self._closed:
            return []
        try:
            payloads = self._frames.feed(data)
        except BadFrame as bad:
            payloads = bad.details.pop("frames") if bad.details else []
            events = self._read_all(payloads)
            self._closed = True
            return [*events, Farewell(bad, 65)]
        return self._read_all(payloads)

    @property
    def buffered_bytes(self) -> int:
        """Bytes of a frame that is not complete yet."""
        return self._frames.buffered_bytes

    def finish(self, id: int) -> None:
        """The request `id` has had its reply; the id may be used again."""
        self.open_ids.discard(id)

    def _read_all(self, payloads: list[bytes]) -> list[Any]:
        events: list[Any] = []
        for payload in payloads:
            event = self._read(payload)
            events.append(event)
            if type(event) is Farewell:
                self._closed = True
                break
        return events

    def _read(self, payload: bytes) -> Any:
        if not payload:
            return Refused(0, BadFrame("a frame of length 0 carries no message"))
        message: list[Any] = []
        try:
            message = self._codec.decode(payload)
            parsed = parse(message)
            if type(parsed) is Hello or self._fresh:
                self._greet(parsed)
            id = getattr(parsed, "id", None)  # credit has none
            if id is not None:
                self._claim(id)
            return parsed
        except UnsupportedProtocol as refused:
            return Farewell(refused, 65, readable_id(message))
        except DemandportError as refused:
            return Refused(readable_id(message), _without_frames(refused))

    def _claim(self, id: int) -> None:
        if id in self.open_ids:
            raise BadMessage(f"id {id} is in use by an open request")
        if len(self.open_ids) >= MAX_OPEN_REQUESTS:
            raise BadMessage(f"more than {MAX_OPEN_REQUESTS} requests are open")
        self.open_ids.add(id)

    def _greet(self, message: Any) -> None:
        was_fresh, self._fresh = self._fresh, False
        if type(message) is not Hello:
            return
        if not was_fresh:
            raise BadMessage("hello must be the first message")
        low, high = message.options.protocol
        if not low <= PROTOCOL <= high:
            raise UnsupportedProtocol(f"this service speaks protocol {PROTOCOL}, the host {low} to {high}")


def _without_frames(error: DemandportError) -> DemandportError:
    """The error without the frames that it came through. They hold the list that it is returned in: a cycle for each
    bad frame, which the collector would find by the ten thousand, and all else would wait for it."""
    error.__context__ = None
    return error.with_traceback(None)
