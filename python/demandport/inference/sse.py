"""Bytes of a streamed answer to lines, and lines to server-sent events. No input or output: it is fed.

Source of the format: WHATWG HTML, section 9.2, "Server-sent events" (parsing and interpreting an event stream).
"""

from __future__ import annotations

from dataclasses import dataclass

from demandport.errors import TooLarge

#: Longest line, and most data of one event, that is accepted.
MAX_LINE_BYTES = 8 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Lines:
    """Cuts bytes into lines, however they were split on the way. A line ends at CR LF, LF or CR, and is handed out as
    soon as its end has come. A byte order mark at the very beginning is dropped.

    It serves JSON lines as well: in JSON, neither CR nor LF stands within a string.

    Args:
        max_line_bytes: longest line accepted; nothing beyond is kept in memory.
    """

    def __init__(self, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        self._max = max_line_bytes
        self._parts: list[bytes] = []
        self._size = 0
        self._after_cr = False
        self._at_start = True

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that `data` completes, without their ends; the rest is kept for the next call.

        Raises:
            TooLarge: a line is longer than allowed.
        """
        if not data:
            return []
        if self._after_cr:
            data = data.removeprefix(b"\n")
        self._after_cr = data.endswith(b"\r")
        *lines, rest = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        found = [self._complete(line) for line in lines]
        self._keep(rest)
        return found

    def rest(self) -> bytes:
        """What came after the end of the last line; for formats whose last line may go without one."""
        return self._without_mark(b"".join(self._parts))

    def _complete(self, end: bytes) -> bytes:
        self._keep(end)
        line = self._without_mark(b"".join(self._parts))
        self._parts, self._size, self._at_start = [], 0, False
        return line

    def _keep(self, part: bytes) -> None:
        self._size += len(part)
        if self._size > self._max:
            raise TooLarge(f"a line is over {self._max} bytes", details={"max_line_bytes": self._max})
        if part:
            self._parts.append(part)

    def _without_mark(self, line: bytes) -> bytes:
        return line.removeprefix(_BYTE_ORDER_MARK) if self._at_start else line


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """One event.

    Attributes:
        data: its lines of data, joined by LF. event: its type. last_id: the id that was given last, by it or before.
    """

    data: str
    event: str = "message"
    last_id: str = ""


class EventStream:
    """Reads server-sent events off the bytes of a stream. An event that the end of the stream cuts off is dropped, as
    the specification has it; bytes that are no UTF-8 become U+FFFD.

    Args:
        max_event_bytes: most data of one event, and longest line.
    """

    def __init__(self, max_event_bytes: int = MAX_LINE_BYTES) -> None:
        self._lines = Lines(max_event_bytes)
        self._max = max_event_bytes
        self._data: list[str] = []
        self._size = 0
        self._event = ""
        self._last_id = ""

    def feed(self, data: bytes) -> list[ServerSentEvent]:
        """The events that `data` completes.

        Raises:
            TooLarge: a line or an event is longer than allowed.
        """
        found = (self._read(line) for line in self._lines.feed(data))
        return [event for event in found if event is not None]

    def _read(self, line: bytes) -> ServerSentEvent | None:
        if not line:
            return self._dispatch()
        name, _, value = line.decode("utf-8", "replace").partition(":")
        value = value.removeprefix(" ")
        # A comment has an empty name; `retry` is for clients that connect again, which this one does not.
        if name == "data":
            self._size += len(line)
            if self._size > self._max:
                raise TooLarge(f"an event is over {self._max} bytes", details={"max_event_bytes": self._max})
            self._data.append(value)
        elif name == "event":
            self._event = value
        elif name == "id" and "\0" not in value:
            self._last_id = value
        return None

    def _dispatch(self) -> ServerSentEvent | None:
        data, event = self._data, self._event
        self._data, self._size, self._event = [], 0, ""
        return ServerSentEvent("\n".join(data), event or "message", self._last_id) if data else None
