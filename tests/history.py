"""The history checker: judges what one connection sent and received against the promises of protocol/SPEC.md.

A history is a list of entries in the order in which the client saw them: `Sent`, `Received` and, from outside the
connection, `Fact`. `violations(history)` lists what breaks a promise; a `Judge` does the same entry by entry, and keeps
no more than what is open. It knows messages as plain arrays and shares no code with the service.

A new type of message gets a function in `_SENT` or `_RECEIVED`. What the client asks and who must answer stands in
`Asked`; what the service asks of the client, in `Call`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

Message = list[Any]
Rule = Literal[
    "after_end",  # something of a request, demand or call that is over
    "after_goodbye",  # anything after goodbye or the end of the connection
    "call",  # a call of the service's to the client that is none, or is not let go
    "cancel",  # a cancel that was answered `true`, and its demand did not end with `cancelled`
    "cancelled",  # a demand that nobody cancelled ended with `cancelled`
    "close",  # a session was closed before its demands had ended
    "crash",  # `worker_crash` although no worker was killed
    "credit",  # more stream messages than credit
    "deadline",  # `deadline_exceeded` without a deadline
    "draining",  # `draining` although nobody drained
    "event",  # an event that nobody asked for, or that is out of order
    "form",  # not a message of the protocol
    "node",  # the terminal of another node than the demanded one
    "part",  # parts that make no message, or a message that should have been in parts
    "ready",  # the first message is not `ready`, or another one is
    "seq",  # stream messages that do not count up from 0
    "text",  # streamed text that is not the port's final text
    "unanswered",  # no reply, no terminal, no end of a call
    "unasked",  # an answer to what was never asked
    "wrong_reply",  # a reply to a demand, a terminal for a request
]

CODES = frozenset([
    "bad_frame", "bad_message", "unsupported_protocol", "unknown_session", "unknown_node", "unknown_node_type",
    "unknown_port", "invalid_graph", "cycle", "missing_input", "type_mismatch", "node_failed", "worker_crash",
    "deadline_exceeded", "cancelled", "queue_full", "too_large", "model_not_found", "model_load_failed",
    "out_of_memory", "context_overflow", "backend_unavailable", "host_unavailable", "forbidden", "draining",
    "internal",
])  # fmt: skip
ERROR_KEYS = {"code", "message", "node", "retryable", "details", "traceback"}
MAX_ID = (1 << 64) - 1
PART_BYTES = 64 * 1024
#: Requests that are answered by a terminal instead of a reply.
DEMANDS = frozenset({"demand", "demand_many"})
TERMINALS = frozenset({"demand_complete", "demand_error"})
#: Messages that have no reply when they are well-formed.
_SILENT = frozenset({"credit", "answer", "answer_stream"})


@dataclass(frozen=True, slots=True)
class Sent:
    """The client sent a message; None stands for a frame that holds none."""

    message: Message | None


@dataclass(frozen=True, slots=True)
class Received:
    """The client received a message. One that came in parts is there twice: as its parts, and then whole.

    Attributes:
        size: bytes of its payload; 0 when it is not known.
        number: of the parts that it came in; None when it came whole.
    """

    message: Message
    size: int = 0
    number: int | None = None


@dataclass(frozen=True, slots=True)
class Fact:
    """Something that happened around the connection: `worker_killed`, or `ended`, when it did not last to the end."""

    kind: Literal["worker_killed", "ended"]


Entry = Sent | Received | Fact


@dataclass(frozen=True, slots=True)
class Violation:
    """A promise that was broken: the number of the entry that shows it, which one, and how."""

    index: int
    rule: Rule
    text: str


@dataclass(slots=True)
class Asked:
    """A message of the client that one answer belongs to.

    Attributes:
        index: of its entry. credit: stream messages that may still come; None for any number. whole: it streams all
            chunks; not so if it began without credit, when those that are no text are left out until there is some.
        cancellable, expires: it may end with `cancelled`, with `deadline_exceeded`.
        must_cancel: it may end with nothing else, since a cancel of it was answered with `true`.
        ended: it is answered. cancelled: by `cancelled`.
        closed: number of the entry in which its session was closed although it had not ended. That is right only when
            its end was on the way already, in parts or behind such.
        ends: of a `cancel` or a `close`: the demands that it may end.
        streams: chunks that came, by node and port.
    """

    index: int
    id: int
    kind: Any
    session: Any = None
    node: Any = None
    credit: int | None = None
    whole: bool = True
    events: bool = False
    expires: bool = False
    cancellable: bool = False
    must_cancel: bool = False
    ended: bool = False
    cancelled: bool = False
    closed: int | None = None
    ends: list[Asked] = field(default_factory=list)
    streams: dict[tuple[str, str], list[Any]] = field(default_factory=dict)
    last_event: int = -1

    @property
    def is_demand(self) -> bool:
        return self.kind in DEMANDS

    def __str__(self) -> str:
        return f"{self.kind} {self.id} (entry {self.index})"


@dataclass(slots=True)
class Call:
    """Something that the service asked of the client.

    Attributes:
        answered: number of the entry in which the client answered; None as long as it has not.
    """

    index: int
    answered: int | None = None


def violations(history: Iterable[Entry]) -> list[Violation]:
    """Every broken promise of a whole history, in order."""
    judge = Judge()
    for entry in history:
        judge.note(entry)
    return judge.finish()


class Judge:
    """Judges a history entry by entry.

    Args:
        part_bytes: payloads larger than this must come in parts.

    Attributes:
        found: what was broken so far.
    """

    def __init__(self, part_bytes: int = PART_BYTES) -> None:
        self.found: list[Violation] = []
        self._part_bytes = part_bytes
        self._index = -1
        self._ready = False
        self._over = ""
        #: By id, in the order asked: a second one with an id that is open is refused, and the first goes on.
        self._open: dict[int, list[Asked]] = {}
        self._answered: set[int] = set()
        self._demanded: set[int] = set()
        #: Errors with id 0 that must come (numbers of the entries that ask for them), and that may come.
        self._nameless: list[int] = []
        self._may_be_nameless = 0
        #: Messages without an id of their own whose answer seems to have been an error with id 0.
        self._by_0: set[int] = set()
        self._drained = False
        self._kills = 0
        self._calls: dict[Any, Call] = {}
        #: Codes of the errors that the client itself has answered.
        self._host_codes: set[Any] = set()
        self._ended_calls: set[Any] = set()
        #: Entry of the latest message that the service has certainly read.
        self._read_up_to = -1
        #: The message that is being judged came in parts.
        self._in_parts = False
        self._parts: dict[int, int] = {}
        self._whole: dict[int, int] = {}
        self._done_parts: set[int] = set()
        #: Number of the latest event, by session that is subscribed to.
        self._subscribed: dict[Any, int] = {}

    # ------------------------------------------------------------------------------------- in and out

    def note(self, entry: Entry) -> None:
        """Take the next entry."""
        self._index += 1
        if type(entry) is Sent:
            self._sent(entry.message)
        elif type(entry) is Received:
            self._received(entry)
        elif entry.kind == "ended":
            self._over = "the end of the connection"
        else:
            self._kills += 1

    def finish(self) -> list[Violation]:
        """Every broken promise; what is open now was never answered, unless the connection has ended."""
        if not self._over:
            for asked in self.waiting:
                self._break("unanswered", f"{asked} was never answered", asked.index)
            for index in self._nameless:
                self._break("unanswered", "a message without a readable id got no error with id 0", index)
            for id, call in self._calls.items():
                if call.answered is None:
                    self._break("unanswered", f"the call {id!r} was neither answered nor cancelled", call.index)
            for number in {**self._parts, **self._whole}:
                self._break("part", f"the message in parts {number} never came to its end")
        return sorted(self.found, key=lambda violation: violation.index)

    @property
    def waiting(self) -> list[Asked]:
        """What the client has asked and has no answer to yet."""
        return [asked for queue in self._open.values() for asked in queue]

    @property
    def over(self) -> bool:
        """The connection has ended."""
        return bool(self._over)

    @property
    def settled(self) -> bool:
        """Every answer is there."""
        return not self._open and not self._nameless

    def is_open(self, id: int) -> bool:
        """Whether an answer to `id` is still to come."""
        return id in self._open

    def _break(self, rule: Rule, text: str, index: int | None = None) -> None:
        self.found.append(Violation(self._index if index is None else index, rule, text))

    # --------------------------------------------------------------------------------- what was sent

    def _sent(self, message: Message | None) -> None:
        if not message or type(message) is not list:
            self._nameless.append(self._index)
            return
        kind = message[0]
        handle = _SENT.get(kind) if type(kind) is str else None
        (handle or Judge._sent_request)(self, message)

    def _sent_request(self, message: Message) -> Asked | None:
        """Anything that must be answered: by a reply, or, when it is no request, by an error."""
        id = _readable_id(message)
        if not id:
            self._nameless.append(self._index)
            return None
        asked = Asked(self._index, id, _key(message[0]))
        if self._drained:
            asked.cancellable = asked.expires = True
        self._open.setdefault(id, []).append(asked)
        return asked

    def _sent_demand(self, message: Message) -> None:
        asked = self._sent_request(message)
        if asked is None or len(message) not in (4, 5):
            return
        self._demanded.add(asked.id)
        options = message[4] if len(message) == 5 and type(message[4]) is dict else {}
        asked.session, asked.node = message[2], message[3]
        asked.credit = options.get("credit")
        asked.whole = asked.credit != 0
        asked.events = options.get("events") is True
        asked.expires = asked.expires or options.get("deadline_ms") is not None

    def _sent_credit(self, message: Message) -> None:
        if len(message) != 3 or not _is_id(message[1]) or not _is_id(message[2]):
            self._sent_request(message)
            return
        id, n = message[1:]
        for asked in self._open.get(id, ()):
            if type(asked.credit) is int:
                asked.credit += n
        if id not in self._demanded:
            self._may_be_nameless += 1

    def _sent_cancel(self, message: Message) -> None:
        named = self._open.get(message[2], []) if len(message) == 3 and _is_id(message[2]) else []
        self._sent_end(message, [asked for asked in named if asked.is_demand])

    def _sent_close(self, message: Message) -> None:
        named = message[2] if len(message) == 3 else None
        self._sent_end(message, [asked for asked in self.waiting if asked.is_demand and asked.session == named])

    def _sent_end(self, message: Message, demands: list[Asked]) -> None:
        """The client wants these demands to end."""
        for demand in demands:
            demand.cancellable = True
        asked = self._sent_request(message)
        if asked is not None:
            asked.ends, asked.session = demands, _key(message[2]) if len(message) > 2 else None

    def _sent_drain(self, message: Message) -> None:
        self._drained = True
        for asked in self.waiting:
            asked.cancellable = asked.expires = True
        self._sent_request(message)

    def _sent_answer(self, message: Message) -> None:
        """An answer, or a chunk of one: it has no reply, but an error with id 0 when there never was such a call."""
        if len(message) not in ((4,) if message[0] == "answer" else (3, 4)):
            self._sent_request(message)
            return
        id = _key(message[1])
        call = self._calls.get(id)
        if call is None and id not in self._ended_calls:
            self._nameless.append(self._index)
        elif call is None or call.answered is not None:
            self._may_be_nameless += 1
        elif message[0] == "answer":
            call.answered = self._index
            if message[2] == "error" and type(message[3]) is dict:
                self._host_codes.add(message[3].get("code"))

    def _sent_of_session(self, message: Message) -> None:
        asked = self._sent_request(message)
        if asked is not None and len(message) > 2:
            asked.session = _key(message[2])

    # ----------------------------------------------------------------------------- what was received

    def _received(self, entry: Received) -> None:
        message = entry.message
        if self._over:
            self._break("after_goodbye", f"{_shown(message)} came after {self._over}")
            return
        kind = message[0] if type(message) is list and message else None
        if not self._ready:
            self._ready = True
            if kind != "ready":
                self._break("ready", f"the first message is {_shown(message)}")
        elif kind == "ready":
            self._break("ready", "ready came again")
        shape = _RECEIVED.get(kind) if type(kind) is str else None
        if shape is None or not shape[0](message):
            self._break("form", f"{_shown(message)} is not a message of the protocol")
            return
        self._in_parts = entry.number is not None
        self._check_parts(entry)
        shape[1](self, message)

    def _check_parts(self, entry: Received) -> None:
        if entry.number is None:
            if entry.size > self._part_bytes and entry.message[0] != "part":
                self._break("part", f"{_shown(entry.message)} is {entry.size} bytes long and came whole")
            return
        size = self._whole.pop(entry.number, None)
        if size is None:
            self._break("part", f"a message came of the parts {entry.number}, whose last is not there")
        elif entry.size and entry.size != size:
            self._break("part", f"the parts {entry.number} have {size} bytes, and their message {entry.size}")

    def _part(self, message: Message) -> None:
        _, number, last, piece = message
        if number in self._done_parts:
            self._break("part", f"a part of {number} came after its last")
            return
        if not 0 < len(piece) <= self._part_bytes:
            self._break("part", f"a part of {number} has {len(piece)} bytes")
        size = self._parts.pop(number, 0) + len(piece)
        if last:
            self._done_parts.add(number)
            self._whole[number] = size
        else:
            self._parts[number] = size

    def _reply(self, message: Message) -> None:
        kind, id, value = message
        if kind == "error" and id == 0:
            self._nameless_error()
            return
        queue = self._open.get(id)
        if not queue and kind == "error" and id in self._by_0 and self._may_be_nameless:
            self._by_0.discard(id)  # what was taken for its answer was that of one that may have an error with id 0
            self._may_be_nameless -= 1
            return
        if not queue:
            self._nobody_asked(id, f"{kind} {id}")
            return
        at = _place(queue, refused=kind == "error" and value["code"] == "bad_message")
        asked = queue[at]
        if asked.is_demand and (kind == "ok" or value["code"] != "bad_message" or asked.streams):
            self._break("wrong_reply", f"{asked} was answered by {_shown(message)}")
        self._answer(queue, at)
        self._judge_reply(asked, message)

    def _judge_reply(self, asked: Asked, message: Message) -> None:
        kind, _, value = message
        if asked.kind == "close" and kind == "ok":
            for demand in asked.ends:
                demand.closed = None if demand.ended else self._index
        elif asked.kind == "cancel" and kind == "ok" and value is True:
            self._judge_cancel(asked)
        if asked.kind == "subscribe" and kind == "ok":
            self._subscribed[asked.session] = -1  # it may begin anywhere
        elif asked.kind in ("unsubscribe", "close") and kind == "ok":
            self._subscribed.pop(asked.session, None)
        self._judge_code(asked, value if kind == "error" else None)

    def _judge_cancel(self, asked: Asked) -> None:
        """It was answered with true: a demand of that id has ended by it, or will."""
        left = [demand for demand in asked.ends if not demand.ended]
        if any(demand.cancelled for demand in asked.ends):
            return
        if left:
            left[-1].must_cancel = True
        else:
            self._break("cancel", f"{asked} was answered with true, and its demand did not end with cancelled")

    def _terminal(self, message: Message) -> None:
        kind, node, value, id, _ = message
        queue = self._open.get(id)
        if not queue:
            self._nobody_asked(id, f"{kind} of {id}")
            return
        asked = queue[0]
        if not asked.is_demand:
            self._break("wrong_reply", f"{asked} was answered by {kind}")
        elif node != asked.node:
            self._break("node", f"{asked} is of {asked.node!r}, and its terminal of {node!r}")
        self._answer(queue, 0)
        if asked.closed is not None and not self._in_parts:
            self._break("close", f"its session was closed before {asked} had ended", asked.closed)
        if kind == "demand_complete":
            self._judge_texts(asked, _finals(asked, node, value))
        error = value if kind == "demand_error" else None
        asked.cancelled = error is not None and error["code"] == "cancelled"
        if asked.must_cancel and not asked.cancelled:
            self._break("cancel", f"a cancel of {asked} was answered with true, and it ended with {_shown(value)}")
        self._judge_code(asked, error)

    def _judge_texts(self, asked: Asked, finals: dict[tuple[str, str], Any]) -> None:
        for key, chunks in asked.streams.items():
            if key not in finals or not (asked.whole or type(finals[key]) is str):
                continue
            if all(type(chunk) is str for chunk in chunks) and "".join(chunks) != finals[key]:
                streamed = "".join(chunks)
                self._break("text", f"{asked} streamed {streamed!r:.60} on {key}, and ended with {finals[key]!r:.60}")

    def _judge_code(self, asked: Asked, error: dict[str, Any] | None) -> None:
        code = error and error["code"]
        if code in self._host_codes:
            return  # it is the client's own
        if code == "cancelled" and not asked.cancellable:
            self._break("cancelled", f"nobody cancelled {asked}")
        elif code == "deadline_exceeded" and not asked.expires and asked.is_demand:
            self._break("deadline", f"{asked} has no deadline")
        elif code == "worker_crash" and not self._kills:
            self._break("crash", f"{asked} ended with worker_crash, and no worker was killed")
        elif code == "draining" and not self._drained:
            self._break("draining", f"{asked} was refused, and nobody drained")

    def _answer(self, queue: list[Asked], at: int) -> None:
        asked = queue.pop(at)
        asked.ended = True
        self._answered.add(asked.id)
        self._read_up_to = max(self._read_up_to, asked.index)
        if not queue:
            del self._open[asked.id]

    def _nameless_error(self) -> None:
        # A message that has no id of its own may be answered by the id that it names, or by 0.
        silent = next((asked for asked in self.waiting if asked.kind in _SILENT), None) if not self._nameless else None
        if self._nameless:
            self._read_up_to = max(self._read_up_to, self._nameless.pop(0))
        elif silent is not None:
            queue = self._open[silent.id]
            self._answer(queue, queue.index(silent))
            self._by_0.add(silent.id)
        elif self._may_be_nameless:
            self._may_be_nameless -= 1
        else:
            self._break("unasked", "an error with id 0, and every message had an id that can be read")

    def _nobody_asked(self, id: Any, what: str) -> None:
        if id in self._answered:
            self._break("after_end", f"{what} came after the answer to {id}")
        else:
            self._break("unasked", f"{what} came, and nobody asked")

    def _stream(self, message: Message) -> None:
        _, node, chunk, id, seq, port = message
        queue = self._open.get(id)
        if not queue:
            self._nobody_asked(id, f"a chunk for {id}")
            return
        asked = queue[0]
        if not asked.is_demand:
            self._break("wrong_reply", f"a chunk came for {asked}")
            return
        if self._in_parts:
            asked.closed = None
        chunks = asked.streams.setdefault((node, port), [])
        if seq != len(chunks):
            self._break("seq", f"chunk {seq} of {node!r}.{port} came for {asked}, and {len(chunks)} were there")
        chunks.append(chunk)
        if type(asked.credit) is int:
            asked.credit -= 1
            if asked.credit < 0:
                self._break("credit", f"{asked} got a chunk without credit")

    def _event(self, message: Message) -> None:
        _, session, event = message
        id = event.get("demand_id")
        if id is None:
            self._session_event(session, event)
            return
        queue = self._open.get(id)
        if not queue:
            self._nobody_asked(id, f"the event {event['event']!r} of {id}")
            return
        asked = queue[0]
        if not asked.events or asked.session != session:
            self._break("event", f"nobody asked for events of {asked} in {session!r}")
        elif event["seq"] <= asked.last_event:
            self._break("event", f"event {event['seq']} of {asked} came after event {asked.last_event}")
        asked.last_event = event["seq"]

    def _session_event(self, session: Any, event: dict[str, Any]) -> None:
        last = self._subscribed.get(session)
        if last is None:
            self._break("event", f"nobody subscribed to the session {session!r}")
        elif event["seq"] <= last:
            self._break("event", f"event {event['seq']} of the session {session!r} came after event {last}")
        self._subscribed[session] = event["seq"]

    def _execute(self, message: Message) -> None:
        id = _key(message[1])
        if id in self._calls or id in self._ended_calls:
            self._break("call", f"the call {id!r} came twice")
            return
        self._calls[id] = Call(self._index)

    def _let_go(self, message: Message) -> None:
        id = _key(message[1])
        call = self._calls.pop(id, None)
        if call is None:
            self._break("call", f"node_cancel names the call {id!r}, which is not open")
            return
        self._ended_calls.add(id)
        if call.answered is not None and call.answered <= self._read_up_to:
            self._break("call", f"the call {id!r} was cancelled after the service had read its answer")

    def _goodbye(self, message: Message) -> None:
        self._over = "goodbye"

    def _nothing(self, message: Message) -> None: ...


# --------------------------------------------------------------------------------------------------- tables


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 < value <= MAX_ID


def _readable_id(message: Message) -> int:
    """The id of a message, also of one that is wrong; 0 when none can be read."""
    return message[1] if len(message) > 1 and _is_id(message[1]) else 0


def _place(queue: list[Asked], *, refused: bool) -> int:
    """Which of several messages with one id a reply belongs to.

    Of two the second is refused, and the first goes on. It is accepted when the end of a demand is on its way already,
    and its reply may overtake that end, when it is large.
    """
    if len(queue) == 1:
        return 0
    if refused:
        return next((at for at, asked in enumerate(queue) if asked.kind in _SILENT), 1)
    return next((at for at, asked in enumerate(queue) if not asked.is_demand), 0)


def _key(value: Any) -> Any:
    """The value, as the key of a dictionary."""
    return value if isinstance(value, str | int) else repr(value)


def _shown(message: Any) -> str:
    text = repr(message)
    return text if len(text) <= 100 else text[:97] + "..."


def _finals(asked: Asked, node: Any, outputs: Any) -> dict[tuple[str, str], Any]:
    """Final values by node and port, as far as the terminal says them."""
    if asked.kind == "demand":
        return {(node, port): value for port, value in outputs.items()}
    return {
        (item["node"], port): value
        for item in outputs
        if item.get("outputs")
        for port, value in item["outputs"].items()
    }


def _shape(*fields: Callable[[Any], bool]) -> Callable[[Message], bool]:
    def fits(message: Message) -> bool:
        return len(message) == 1 + len(fields) and all(
            check(value) for check, value in zip(fields, message[1:], strict=True)
        )

    return fits


def _any(_: Any) -> bool:
    return True


def _text(value: Any) -> bool:
    return type(value) is str


def _map(value: Any) -> bool:
    return type(value) is dict


def _number(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_ID


def _error(value: Any) -> bool:
    return type(value) is dict and value.keys() >= ERROR_KEYS and value["code"] in CODES and _text(value["message"])


def _is_event(value: Any) -> bool:
    return type(value) is dict and _text(value.get("event")) and _number(value.get("seq"))


def _outputs(value: Any) -> bool:
    return type(value) is dict or (type(value) is list and all(map(_map, value)))


_SENT: dict[str, Callable[[Judge, Message], None]] = {
    "demand": Judge._sent_demand,
    "demand_many": Judge._sent_demand,
    "credit": Judge._sent_credit,
    "cancel": Judge._sent_cancel,
    "close": Judge._sent_close,
    "subscribe": Judge._sent_of_session,
    "unsubscribe": Judge._sent_of_session,
    "drain": Judge._sent_drain,
    "answer": Judge._sent_answer,
    "answer_stream": Judge._sent_answer,
}
_RECEIVED: dict[str, tuple[Callable[[Message], bool], Callable[[Judge, Message], None]]] = {
    "ready": (_shape(_map), Judge._nothing),
    "ok": (_shape(_is_id, _any), Judge._reply),
    "error": (_shape(_number, _error), Judge._reply),
    "node_stream": (_shape(_text, _any, _is_id, _number, _text), Judge._stream),
    "demand_complete": (_shape(_any, _outputs, _is_id, _map), Judge._terminal),
    "demand_error": (_shape(_any, _error, _is_id, _map), Judge._terminal),
    "node_event": (_shape(_text, _is_event), Judge._event),
    "node_execute": (_shape(_any, _text, _text, _text, _map, _map), Judge._execute),
    "node_cancel": (_shape(_any), Judge._let_go),
    "part": (_shape(_number, lambda last: type(last) is bool, lambda piece: type(piece) is bytes), Judge._part),
    "log": (_shape(lambda level: level in ("debug", "info", "warning", "error"), _text, _text, _map), Judge._nothing),
    "goodbye": (_shape(_error), Judge._goodbye),
}
