"""The history checker finds every planted fault, names it rightly, and finds nothing in a history that is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from history import PART_BYTES, Entry, Fact, Judge, Received, Rule, Sent, violations
from support import count

History = list[Entry]
READY = Received(["ready", {"protocol": 1}])


def error(code: str) -> dict[str, Any]:
    return {"code": code, "message": "so it is", "node": None, "retryable": False, "details": None, "traceback": None}


def chunk(id: int, seq: int, text: Any, port: str = "text") -> Received:
    return Received(["node_stream", "a", text, id, seq, port])


def complete(id: int, outputs: dict[str, Any]) -> Received:
    return Received(["demand_complete", "a", outputs, id, {"ran": 1}])


def failed(id: int, code: str) -> Received:
    return Received(["demand_error", "a", error(code), id, {}])


def event(id: int, seq: int) -> Received:
    return Received(["node_event", "s", {"event": "task_started", "demand_id": id, "seq": seq}])


# ------------------------------------------------------------------------------------- histories that are right


@st.composite
def demands(draw: st.DrawFn, id: int, code: str | None = None) -> History:
    """A demand with a stream, credit as it needs it, and its terminal (`code`, or it completes)."""
    texts = draw(st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=5))
    credit = draw(st.none() | st.integers(0, 2))
    options = {
        "credit": credit,
        "events": draw(st.booleans()),
        "deadline_ms": 9 if code == "deadline_exceeded" else None,
    }
    found: History = [Sent(["demand", id, "s", "a", options])]
    left = credit
    for seq, text in enumerate(texts):
        if left == 0:
            left = draw(st.integers(1, 3))
            found.append(Sent(["credit", id, left]))
        left = None if left is None else left - 1
        found += [event(id, seq)] if options["events"] else []
        found.append(chunk(id, seq, text))
    if code == "cancelled":
        return [*found, Sent(["cancel", id + 1, id]), failed(id, code), Received(["ok", id + 1, True])]
    if code == "worker_crash":
        return [*found, Fact("worker_killed"), failed(id, code)]
    return [*found, failed(id, code) if code else complete(id, {"text": "".join(texts)})]


def requests(id: int) -> st.SearchStrategy[History]:
    return st.sampled_from(
        [
            [Sent(["ping", id]), Received(["ok", id, "pong"])],
            [Sent(["edit", id, "s", []]), Received(["error", id, error("unknown_node")])],
            [Sent(["ping", id, "more"]), Received(["error", id, error("bad_message")])],
            [Sent(["ping"]), Received(["error", 0, error("bad_message")])],
            [Sent(None), Received(["error", 0, error("bad_frame")])],
            [Sent(["credit", id, 1]), Received(["error", 0, error("bad_message")])],
            [Sent(["credit", id, "x"]), Received(["error", id, error("bad_message")])],
            [Received(["log", "info", "a", "b", {}])],
        ]
    )


def others(id: int) -> st.SearchStrategy[History]:
    """Of a session of its own, of an id used twice, of a call to the client, of parts, of many nodes at once."""
    own = f"own{id}"
    large = "x" * (PART_BYTES + 9)
    many = [{"node": "a", "status": "ok", "outputs": {"text": "ab"}}, {"node": "b", "status": "error"}]
    return st.sampled_from(
        [
            [
                Sent(["demand", id, own, "a"]),
                Sent(["close", id + 1, own]),
                failed(id, "cancelled"),
                Received(["ok", id + 1, None]),
                Sent(["demand", id, own, "a"]),
                failed(id, "unknown_session"),
            ],
            [
                Sent(["demand", id, "s", "a"]),
                Sent(["ping", id]),
                Received(["error", id, error("bad_message")]),
                chunk(id, 0, "text"),
                complete(id, {"text": "text"}),
                Sent(["cancel", id + 1, id]),
                Received(["ok", id + 1, False]),
            ],
            [
                Received(["node_execute", id, "s", "a", "tool", {}, {}]),
                Sent(["answer_stream", id, "chunk"]),
                Sent(["answer", id, "ok", {"output": 1}]),
            ],
            [
                Received(["node_execute", id, "s", "a", "tool", {}, {}]),
                Received(["node_cancel", id]),
                Sent(["answer", id, "error", error("node_failed")]),
            ],
            [
                Sent(["demand", id, "s", "a"]),
                chunk(id, 0, {"n": 1}),
                chunk(id, 1, [2]),
                Received(["part", id, False, b"x" * PART_BYTES], PART_BYTES + 20),
                Received(["part", id, True, b"x" * 40], 60),
                Received(complete(id, {"text": large}).message, PART_BYTES + 40, id),
            ],
            [
                Sent(["demand", id, "s", "a", {"credit": 0}]),
                Sent(["credit", id, 9]),
                chunk(id, 0, "text"),
                complete(id, {"text": [1, "text"]}),
            ],
            [
                Sent(["demand_many", id, "s", ["a", "b"], {"credit": 2}]),
                chunk(id, 0, "a"),
                chunk(id, 1, "b"),
                Received(["demand_complete", ["a", "b"], many, id, {}]),
            ],
        ]
    )


CODES = [None, "node_failed", "cancelled", "deadline_exceeded", "worker_crash"]


@st.composite
def histories(draw: st.DrawFn) -> History:
    """Exchanges, each in its own order, with the entries of all of them mixed."""
    exchanges = [draw(demands(10, draw(st.sampled_from(CODES))))]
    for number in range(2, draw(st.integers(2, 7))):
        id = 10 * number
        exchanges.append(draw(demands(id, draw(st.sampled_from(CODES))) | requests(id) | others(id)))
    mixed: History = [READY]
    left = [exchange.copy() for exchange in exchanges]
    while left:
        exchange = draw(st.sampled_from(left))
        mixed.append(exchange.pop(0))
        left = [exchange for exchange in left if exchange]
    return mixed


@given(histories())
def test_what_is_right_is_found_right(history: History) -> None:
    judge = Judge()
    for entry in history:
        judge.note(entry)
    assert judge.finish() == [] and judge.settled


# ------------------------------------------------------------------------------------------------ planted faults

DEMAND, CLOSE, CANCEL = Sent(["demand", 5, "s", "a"]), Sent(["close", 6, "s"]), Sent(["cancel", 6, 5])
PING, PONG, CANCELLED = Sent(["ping", 7]), Received(["ok", 7, "pong"]), failed(5, "cancelled")
CALL, ANSWER = Received(["node_execute", 5, "s", "a", "tool", {}, {}]), Sent(["answer", 5, "ok", {}])
LET_GO, LOG = Received(["node_cancel", 5]), Received(["log", "info", "a", "b", {}])
SUBSCRIBE = Sent(["subscribe", 6, "s", {}])
MANY = [{"node": "a", "status": "ok", "outputs": {"text": "ab"}}]


def credited(n: int) -> Sent:
    return Sent(["demand", 5, "s", "a", {"credit": n}])


def ok(id: int, value: Any) -> Received:
    return Received(["ok", id, value])


def edited(seq: int) -> Received:
    return Received(["node_event", "s", {"event": "edited", "seq": seq}])


#: What breaks a promise after any history: the rule, how many entries before the last it is seen, and the entries.
APPENDED: dict[str, tuple[Rule, int, History]] = {
    "a reply is lost": ("unanswered", 0, [PING]),
    "a demand is forgotten": ("unanswered", 1, [DEMAND, chunk(5, 0, "a")]),
    "a frame without a message is not answered": ("unanswered", 0, [Sent(None)]),
    "an id that cannot be read is not answered": ("unanswered", 0, [Sent(["ping", -1])]),
    "a malformed message without a reply of its own is not answered": (
        "unanswered",
        1,
        [Sent(["credit", 7, "x"]), LOG],
    ),
    "an answer to a call that never was": ("unanswered", 0, [ANSWER]),
    "a call is left open": ("unanswered", 1, [CALL, Sent(["answer_stream", 5, "a"])]),
    "a reply comes twice": ("after_end", 0, [PING, PONG, PONG]),
    "a refusal comes twice": ("after_end", 0, [DEMAND, failed(5, "queue_full"), failed(5, "queue_full")]),
    "a reply to a demand": ("wrong_reply", 0, [DEMAND, ok(5, None)]),
    "a refusal by error": ("wrong_reply", 0, [DEMAND, Received(["error", 5, error("unknown_node")])]),
    "a malformed demand that streams": (
        "wrong_reply",
        0,
        [DEMAND, chunk(5, 0, "a"), Received(["error", 5, error("bad_message")])],
    ),
    "a terminal for a request": ("wrong_reply", 0, [PING, complete(7, {})]),
    "a chunk for a request": ("wrong_reply", 1, [PING, chunk(7, 0, "a"), PONG]),
    "the text of one of many": (
        "text",
        0,
        [
            Sent(["demand_many", 5, "s", ["a"], {}]),
            chunk(5, 0, "a"),
            Received(["demand_complete", ["a"], MANY, 5, {}]),
        ],
    ),
    "text is lost in a list": ("text", 0, [DEMAND, chunk(5, 0, "a"), complete(5, {"text": ["a", "b"]})]),
    "text from before there was credit is lost": (
        "text",
        0,
        [
            Sent(["demand", 5, "s", "a", {"credit": 0}]),
            Sent(["credit", 5, 1]),
            chunk(5, 0, "b"),
            complete(5, {"text": "ab"}),
        ],
    ),
    "text is lost at the end": ("text", 0, [DEMAND, chunk(5, 0, "a"), complete(5, {"text": "ab"})]),
    "a number is left out": ("seq", 1, [DEMAND, chunk(5, 0, "a"), chunk(5, 2, "b"), complete(5, {"text": "ab"})]),
    "two ports share their numbers": ("seq", 1, [DEMAND, chunk(5, 0, "a"), chunk(5, 1, "b", "q"), complete(5, {})]),
    "numbers go on after the id is used again": (
        "seq",
        1,
        [DEMAND, chunk(5, 0, "a"), complete(5, {}), DEMAND, chunk(5, 1, "a"), complete(5, {})],
    ),
    "one chunk more than credit": (
        "credit",
        1,
        [credited(1), Sent(["credit", 5, 1]), *(chunk(5, seq, "a") for seq in range(3)), complete(5, {"text": "aaa"})],
    ),
    "credit comes late": (
        "credit",
        2,
        [credited(0), chunk(5, 0, "a"), Sent(["credit", 5, 1]), complete(5, {"text": "a"})],
    ),
    "credit of another": (
        "credit",
        1,
        [PING, credited(0), Sent(["credit", 7, 1]), PONG, chunk(5, 0, ""), complete(5, {})],
    ),
    "cancelled by nobody": ("cancelled", 0, [DEMAND, CANCELLED]),
    "cancelled by the cancel of another": ("cancelled", 1, [DEMAND, Sent(["cancel", 6, 7]), CANCELLED, ok(6, False)]),
    "cancelled by the close of another": ("cancelled", 0, [DEMAND, Sent(["close", 6, "t"]), ok(6, None), CANCELLED]),
    "cancelled before the cancel": ("cancelled", 2, [DEMAND, CANCELLED, CANCEL, ok(6, False)]),
    "completed and then cancelled, it says": ("cancel", 0, [DEMAND, CANCEL, complete(5, {}), ok(6, True)]),
    "cancelled, it says, and completed": ("cancel", 0, [DEMAND, CANCEL, ok(6, True), complete(5, {})]),
    "cancelled, it says, and was over": ("cancel", 0, [DEMAND, complete(5, {}), CANCEL, ok(6, True)]),
    "closed too early": ("close", 1, [DEMAND, CLOSE, ok(6, None), CANCELLED]),
    "expired without a deadline": ("deadline", 0, [DEMAND, failed(5, "deadline_exceeded")]),
    "refused as when draining": ("draining", 0, [DEMAND, failed(5, "draining")]),
    "a word after goodbye": ("after_goodbye", 0, [Received(["goodbye", error("bad_frame")]), LOG]),
    "a terminal after goodbye": (
        "after_goodbye",
        0,
        [DEMAND, Received(["goodbye", error("internal")]), complete(5, {})],
    ),
    "a word after the end": ("after_goodbye", 0, [Fact("ended"), LOG]),
    "an event that nobody wants": ("event", 1, [DEMAND, event(5, 0), complete(5, {})]),
    "an event twice": (
        "event",
        1,
        [Sent(["demand", 5, "s", "a", {"events": True}]), event(5, 1), event(5, 1), complete(5, {})],
    ),
    "an event of a session twice": ("event", 0, [SUBSCRIBE, ok(6, {}), edited(1), edited(2), edited(2)]),
    "an event before the subscription": ("event", 1, [SUBSCRIBE, edited(1), ok(6, {})]),
    "an event after the subscription": (
        "event",
        0,
        [SUBSCRIBE, ok(6, {}), edited(1), Sent(["unsubscribe", 6, "s"]), ok(6, True), edited(2)],
    ),
    "an event of a session that is closed": ("event", 0, [SUBSCRIBE, ok(6, {}), CLOSE, ok(6, None), edited(1)]),
    "a large message comes whole": ("part", 0, [PING, Received(["ok", 7, "pong"], PART_BYTES + 1)]),
    "a part after the last": (
        "part",
        0,
        [
            PING,
            Received(["part", 5, True, b"a"]),
            Received(["ok", 7, "pong"], 1, 5),
            Received(["part", 5, False, b"a"]),
        ],
    ),
    "parts without an end": ("part", 0, [Received(["part", 5, False, b"a"])]),
    "a part that is too large": (
        "part",
        1,
        [
            PING,
            Received(["part", 5, True, b"a" * (PART_BYTES + 1)]),
            Received(["ok", 7, "pong"], PART_BYTES + 1, 5),
        ],
    ),
    "a part of nothing": (
        "part",
        2,
        [PING, Received(["part", 5, False, b""]), Received(["part", 5, True, b"a"]), PONG],
    ),
    "bytes are lost between parts": (
        "part",
        0,
        [PING, Received(["part", 5, True, b"a"]), Received(["ok", 7, "pong"], 2, 5)],
    ),
    "a call comes twice": ("call", 0, [CALL, ANSWER, CALL]),
    "a call is let go twice": ("call", 0, [CALL, LET_GO, LET_GO]),
    "a call that never was is let go": ("call", 0, [LET_GO]),
    "a call is let go though its answer was read": ("call", 0, [CALL, ANSWER, PING, PONG, LET_GO]),
}
APPENDED["a part of nothing"][2][3] = Received(["ok", 7, "pong"], 1, 5)

FORMLESS: list[Any] = [
    [], None, {}, ["nothing"], [1, 2], ["ok", 1], ["ok", 0, 1], ["ok", "a", 1], ["error", 1, {}],
    ["error", 1, error("odd")], ["node_stream", "a", "b", 1, -1, "p"], ["demand_complete", "a", None, 1, {}],
    ["demand_error", "a", "bad", 1, {}], ["node_event", "s", {}], ["goodbye"], ["log", "loud", "a", "b", {}],
    ["part", 1, 1, b"a"], ["node_execute", 1, "s"], ["node_cancel"],
]  # fmt: skip


def test_a_call_may_be_let_go_while_its_answer_is_on_the_way() -> None:
    assert violations([READY, PING, CALL, ANSWER, PONG, LET_GO]) == []


def test_a_subscription_may_begin_anew_at_any_number() -> None:
    again = [SUBSCRIBE, ok(6, {}), edited(7), edited(9), SUBSCRIBE, edited(10), ok(6, {}), edited(2)]
    assert violations([READY, *again]) == []


@pytest.mark.parametrize("id", [0, 5])
def test_a_message_that_is_no_request_is_refused_by_0_or_by_what_it_names(id: int) -> None:
    refused = Received(["error", id, error("bad_message")])
    assert violations([READY, Sent(["credit", 5, "x"]), refused]) == []
    assert [v.rule for v in violations([READY, Sent(["credit", 5, "x"]), refused, refused])] in (
        ["after_end"],
        ["unasked"],
    )


def test_an_error_that_the_client_answered_comes_back() -> None:
    answer = Sent(["answer", 5, "error", error("deadline_exceeded")])
    assert violations([READY, DEMAND, CALL, answer, failed(5, "deadline_exceeded")]) == []


def test_a_terminal_that_is_large_may_be_on_its_way_when_the_session_is_closed() -> None:
    large = Received(complete(5, {}).message, 1, 5)
    entries = [DEMAND, CLOSE, ok(6, None), Received(["part", 5, True, b"a"]), large]
    assert violations([READY, *entries]) == []


def append(history: History, data: st.DataObject) -> tuple[Rule, int]:
    rule, before, entries = APPENDED[data.draw(st.sampled_from(sorted(APPENDED)))]
    history += entries
    return rule, len(history) - 1 - before


def places(history: History, *kinds: str) -> list[int]:
    """Where messages of the first demand stand."""
    found = [(at, e.message) for at, e in enumerate(history) if isinstance(e, Received) and e.message]
    return [at for at, message in found if message[0] in kinds and message[3] == 10]


def terminal(history: History) -> int:
    return places(history, "demand_complete", "demand_error")[0]


def asked(history: History) -> int:
    return next(
        at for at, e in enumerate(history) if isinstance(e, Sent) and e.message and e.message[:2] == ["demand", 10]
    )


def swap(history: History, at: int, field: int, value: Any) -> None:
    """Another value in a field of a message."""
    entry = history[at]
    assert isinstance(entry, Sent | Received) and entry.message
    message = entry.message.copy()
    message[field] = value
    history[at] = type(entry)(message)


def field_of(history: History, at: int, field: int) -> Any:
    entry = history[at]
    assert isinstance(entry, Sent | Received) and entry.message
    return entry.message[field]


def end_with(history: History, code: str) -> int:
    """The first demand must have ended with this code; returns where."""
    at = terminal(history)
    assume(field_of(history, at, 0) == "demand_error" and field_of(history, at, 2)["code"] == code)
    return at


def lose_a_terminal(history: History, data: st.DataObject) -> tuple[Rule, int]:
    at = terminal(history)
    assume(field_of(history, at, 0) == "demand_complete" or field_of(history, at, 2)["code"] != "cancelled")
    del history[at]
    return "unanswered", asked(history)


def say_more_after_the_end(history: History, data: st.DataObject) -> tuple[Rule, int]:
    at = terminal(history)
    later = data.draw(st.integers(at + 1, len(history)))
    more = data.draw(st.sampled_from([history[at], chunk(10, 0, "a"), event(10, 99), complete(10, {})]))
    history.insert(later, more)
    return "after_end", later


def answer_nobody(history: History, data: st.DataObject) -> tuple[Rule, int]:
    at = data.draw(st.integers(1, len(history)))
    more = [ok(7, None), complete(7, {}), chunk(7, 0, "a"), failed(7, "internal"), event(7, 1)]
    history.insert(at, data.draw(st.sampled_from(more)))
    return "unasked", at


def end_another_node(history: History, data: st.DataObject) -> tuple[Rule, int]:
    history[:] = [e for at, e in enumerate(history) if at not in places(history, "node_stream")]
    at = terminal(history)
    swap(history, at, 1, "b")
    return "node", at


def number_wrongly(history: History, data: st.DataObject) -> tuple[Rule, int]:
    at = data.draw(st.sampled_from(places(history, "node_stream")))
    right = field_of(history, at, 4)
    swap(history, at, 4, data.draw(st.integers(0, 9).filter(lambda seq: seq != right)))
    return "seq", at


def change_a_text(history: History, data: st.DataObject) -> tuple[Rule, int]:
    end = terminal(history)
    assume(field_of(history, end, 0) == "demand_complete")
    at = data.draw(st.sampled_from(places(history, "node_stream")))
    swap(history, at, 2, field_of(history, at, 2) + data.draw(st.sampled_from("ab")))
    return "text", end


def stream_without_credit(history: History, data: st.DataObject) -> tuple[Rule, int]:
    streamed = places(history, "node_stream")
    history[:] = [e for e in history if not (isinstance(e, Sent) and e.message and e.message[:2] == ["credit", 10])]
    swap(history, asked(history), 4, {**field_of(history, asked(history), 4), "credit": len(streamed) - 1})
    return "credit", places(history, "node_stream")[-1]


def cancel_by_nobody(history: History, data: st.DataObject) -> tuple[Rule, int]:
    at = end_with(history, "node_failed")
    swap(history, at, 2, error("cancelled"))
    return "cancelled", at


def expire_without_a_deadline(history: History, data: st.DataObject) -> tuple[Rule, int]:
    at = end_with(history, "deadline_exceeded")
    swap(history, asked(history), 4, {**field_of(history, asked(history), 4), "deadline_ms": None})
    return "deadline", at


def crash_without_a_kill(history: History, data: st.DataObject) -> tuple[Rule, int]:
    assume(history.count(Fact("worker_killed")) == 1)
    end_with(history, "worker_crash")
    history.remove(Fact("worker_killed"))
    return "crash", terminal(history)


def begin_with_another(history: History, data: st.DataObject) -> tuple[Rule, int]:
    history[0] = LOG
    return "ready", 0


def be_ready_again(history: History, data: st.DataObject) -> tuple[Rule, int]:
    at = data.draw(st.integers(1, len(history)))
    history.insert(at, READY)
    return "ready", at


def speak_without_form(history: History, data: st.DataObject) -> tuple[Rule, int]:
    at = data.draw(st.integers(1, len(history)))
    history.insert(at, Received(data.draw(st.sampled_from(FORMLESS))))
    return "form", at


def fail_without_a_cause(history: History, data: st.DataObject) -> tuple[Rule, int]:
    history.insert(1, Received(["error", 0, error("bad_message")]))
    return "unasked", 1


PLANTS: list[Callable[[History, st.DataObject], tuple[Rule, int]]] = [
    append, lose_a_terminal, say_more_after_the_end, answer_nobody, end_another_node, number_wrongly, change_a_text,
    stream_without_credit, cancel_by_nobody, expire_without_a_deadline, crash_without_a_kill, begin_with_another,
    be_ready_again, speak_without_form, fail_without_a_cause,
]  # fmt: skip


def found_in(history: History) -> list[tuple[Rule, int]]:
    return [(violation.rule, violation.index) for violation in violations(history)]


@pytest.mark.parametrize("name", APPENDED)
def test_each_fault_is_found_and_no_other(name: str) -> None:
    rule, before, entries = APPENDED[name]
    assert found_in([READY, *entries]) == [(rule, len(entries) - before)]


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
@settings(max_examples=count(15, 1000))
@given(history=histories(), data=st.data())
def test_a_fault_planted_anywhere_is_found_and_no_other(plant: Any, history: History, data: st.DataObject) -> None:
    planted = plant(history, data)
    assert found_in(history) == [planted]


def test_every_rule_has_a_fault_that_shows_it() -> None:
    shown = {rule for rule, _, _ in APPENDED.values()} | {"unasked", "node", "crash", "ready", "form"}
    assert shown == set(get_args(Rule))
