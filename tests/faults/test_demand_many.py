"""`demand_many` and subscriptions to events, over the wire, with host nodes for gates."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from support import ServiceProcess, is_terminal


@pytest.fixture
def host(service: ServiceProcess) -> ServiceProcess:
    names = ("a", "b", "c", "d")
    service.open("s", *((name, "ask", {}) for name in names), ("t", "text-input", {"text": "x"}), host_types=["ask"])
    return service


def many(host: ServiceProcess, nodes: list[str], **options: Any) -> int:
    id = host.new_id()
    host.send(["demand_many", id, "s", nodes, options])
    return id


def calls(host: ServiceProcess, count: int) -> dict[str, int]:
    """The calls of the host's nodes, by node."""
    found: dict[str, int] = {}
    while len(found) < count:
        message = host.until(lambda m: m[0] == "node_execute")[-1]
        found[message[3]] = message[1]
    return found


def answer(host: ServiceProcess, call: int, value: Any = None) -> None:
    host.send(["answer", call, "ok", {"output": value}])


def fail(host: ServiceProcess, call: int) -> None:
    host.send(["answer", call, "error", "no"])


def terminal(host: ServiceProcess, id: int) -> list[Any]:
    return host.until(is_terminal(id))[-1]


def test_all_gives_every_outcome_in_the_order_asked(host: ServiceProcess) -> None:
    id = many(host, ["b", "t", "a"])
    open_calls = calls(host, 2)
    answer(host, open_calls["a"], 1)
    fail(host, open_calls["b"])
    kind, nodes, outcomes, _, meta = terminal(host, id)
    assert (kind, nodes) == ("demand_complete", ["b", "t", "a"])
    assert [one["node"] for one in outcomes] == nodes
    assert [one["status"] for one in outcomes] == ["error", "ok", "ok"]
    assert outcomes[0]["error"]["node"] == "b" and outcomes[1]["outputs"] == {"text": "x"}
    assert outcomes[2]["outputs"] == {"output": 1} and meta["ran"] == 2
    host.says_nothing_more()


def test_try_and_race_cancel_what_is_of_no_use(host: ServiceProcess) -> None:
    id = many(host, ["a", "b", "c", "d"], mode="try", limit=3)
    open_calls = calls(host, 3)
    answer(host, open_calls["a"])
    open_calls |= calls(host, 1)
    fail(host, open_calls["c"])
    seen = host.until(is_terminal(id))
    assert [one["status"] for one in seen[-1][2]] == ["ok", "cancelled", "error", "cancelled"]
    assert {m[1] for m in seen if m[0] == "node_cancel"} == {open_calls["b"], open_calls["d"]}
    id = many(host, ["b", "c", "d"], mode="race", limit=2)
    open_calls = calls(host, 2)
    answer(host, open_calls["c"], "won")
    seen = host.until(is_terminal(id))
    assert [one["status"] for one in seen[-1][2]] == ["cancelled", "ok", "not_started"]
    assert ["node_cancel", open_calls["b"]] in seen


def test_a_race_that_nobody_wins_is_an_error(host: ServiceProcess) -> None:
    id = many(host, ["a", "b"], mode="race")
    open_calls = calls(host, 2)
    fail(host, open_calls["b"])
    fail(host, open_calls["a"])
    ended = terminal(host, id)
    assert (ended[0], ended[2]["node"]) == ("demand_error", "b")


@pytest.mark.parametrize("how", ["cancel", "deadline", "close"])
def test_it_ends_at_once_and_once_and_takes_its_parts_with_it(host: ServiceProcess, how: str) -> None:
    id = many(host, ["a", "b"], **({"deadline_ms": 50} if how == "deadline" else {}))
    open_calls = calls(host, 2)
    if how == "cancel":
        assert host.request("cancel", id)[2] is True
    elif how == "close":
        host.send(["close", host.new_id(), "s"])
    if how == "cancel":  # its terminal came before the reply to the cancel
        host.ping()
    else:
        assert terminal(host, id)[2]["code"] == ("deadline_exceeded" if how == "deadline" else "cancelled")
    for call in open_calls.values():
        answer(host, call)
    host.ping()
    health = host.request("health")[2]
    assert health["host_calls"]["open"] == health["demands"]["open"] == 0
    assert health["demands"]["running"] == 0


def test_the_graph_is_seen_as_it_stood(host: ServiceProcess) -> None:
    id = many(host, ["a", "t"], limit=1)
    call = calls(host, 1)["a"]
    assert host.request("edit", "s", [{"op": "set_input", "node": "t", "port": "text", "value": "new"}])[0] == "ok"
    answer(host, call)
    assert terminal(host, id)[2][1]["outputs"] == {"text": "x"}


@pytest.mark.parametrize(
    ("nodes", "options", "code"),
    [
        (["nobody"], {}, "unknown_node"),
        ([], {}, "bad_message"),
        (["a"], {"limit": 0}, "bad_message"),
        (["a"], {"mode": "some"}, "bad_message"),
        (["a"], {"credit": 1}, "bad_message"),
    ],
)
def test_what_is_refused(host: ServiceProcess, nodes: list[str], options: dict[str, Any], code: str) -> None:
    id = many(host, nodes, **options)
    message = host.receive()
    assert message[0] in ("error", "demand_error") and id in message and message[2]["code"] == code
    host.says_nothing_more()


def test_its_parts_are_demands_of_the_sessions_queue(service: ServiceProcess) -> None:
    service.open("q", ("a", "ask", {}), ("b", "ask", {}), host_types=["ask"], max_running=1)
    id = service.new_id()
    service.send(["demand_many", id, "q", ["a", "b"], {}])
    first = calls(service, 1)
    assert [*first] == ["a"]
    service.ping()
    answer(service, first["a"])
    answer(service, calls(service, 1)["b"])
    assert [one["status"] for one in terminal(service, id)[2]] == ["ok", "ok"]


def test_events_of_all_parts_are_numbered_together(host: ServiceProcess) -> None:
    id = many(host, ["t", "a"], events=True)
    answer(host, calls(host, 1)["a"])
    terminal(host, id)
    host.request("edit", "s", [{"op": "invalidate", "node": "a"}, {"op": "invalidate", "node": "t"}])
    id = many(host, ["t", "a"], events=True)
    seen = host.until(lambda m: m[0] == "node_execute")
    answer(host, seen[-1][1])
    seen += host.until(is_terminal(id))
    events = [m[2] for m in seen if m[0] == "node_event"]
    assert [event["seq"] for event in events] == list(range(len(events)))
    assert {event["demand_id"] for event in events} == {id} and {event["node"] for event in events} == {"a", "t"}


# ---------------------------------------------------------------------------------------------------- subscriptions


def run_a(host: ServiceProcess) -> int:
    id = host.new_id()
    host.send(["demand", id, "s", "a", {}])
    return id


def events_until(host: ServiceProcess, event: str) -> list[dict[str, Any]]:
    seen = host.until(lambda m: m[0] == "node_event" and m[2]["event"] == event)
    return [m[2] for m in seen if m[0] == "node_event"]


def test_a_subscriber_hears_what_happens_in_the_session(host: ServiceProcess) -> None:
    assert host.request("subscribe", "s", {})[2] == {"first": 0, "next": 0}
    id = run_a(host)
    seen = host.until(lambda m: m[0] == "node_execute")
    answer(host, seen[-1][1])
    heard = [m[2] for m in seen if m[0] == "node_event"] + events_until(host, "demand_completed")
    assert [event["event"] for event in heard] == [
        "demand_started",
        "task_started",
        "task_completed",
        "demand_completed",
    ]
    assert [event["seq"] for event in heard] == [0, 1, 2, 3]
    assert all(a["time_us"] <= b["time_us"] for a, b in itertools.pairwise(heard))
    assert heard[0]["demand"] == heard[3]["demand"] == id and all("demand_id" not in event for event in heard)


def test_who_comes_back_misses_nothing(host: ServiceProcess) -> None:
    host.request("subscribe", "s", {})
    run_a(host)
    fail(host, calls(host, 1)["a"])
    first = events_until(host, "demand_failed")
    assert host.request("unsubscribe", "s")[2] is True
    assert host.request("unsubscribe", "s")[2] is False
    id = run_a(host)
    answer(host, calls(host, 1)["a"])
    missed = terminal(host, id)
    assert missed[0] == "demand_complete"
    reply = host.request("subscribe", "s", {"since": first[-1]["seq"] + 1})
    assert reply[2]["next"] > first[-1]["seq"] + 1
    second = events_until(host, "demand_completed")
    assert [event["seq"] for event in second] == list(range(first[-1]["seq"] + 1, reply[2]["next"]))
    failed = first[-1]
    assert failed["error"]["code"] == "node_failed" and failed["event"] == "demand_failed"


def test_what_is_no_longer_kept_is_told(service: ServiceProcess) -> None:
    service.open("s", ("t", "text-input", {"text": "x"}), event_history=2)
    for _ in range(3):
        assert service.request("demand", "s", "t")[0] == "demand_complete"
    id = service.new_id()
    service.send(["subscribe", id, "s", {"since": 0}])
    reply = service.receive()
    assert reply[1] == id
    first, kept = reply[2]["first"], reply[2]["next"]
    assert kept - first == 2
    heard = [service.receive()[2] for _ in range(3)]
    assert heard[0] == {"event": "missed", "node": None, "seq": first - 1, "count": first}
    assert [event["seq"] for event in heard[1:]] == [first, first + 1]


def test_kinds_are_chosen_and_failures_and_demands_come_always(host: ServiceProcess) -> None:
    host.request("subscribe", "s", {"kinds": ["task_progress"]})
    run_a(host)
    fail(host, calls(host, 1)["a"])
    heard = events_until(host, "demand_failed")
    assert [event["event"] for event in heard][-2:] == ["task_failed", "demand_failed"]
    assert "task_started" not in [event["event"] for event in heard]


def test_a_host_that_does_not_read_events_costs_no_memory_and_hears_what_it_missed(service: ServiceProcess) -> None:
    service.open("s", ("t", "text-input", {"text": "x" * 100}), event_history=100)
    service.request("subscribe", "s", {})
    edits = [{"op": "set_input", "node": "t", "port": "text", "value": "y"}]
    rest = service.write_alone(
        b"".join(service_frame(service, ["edit", service.new_id(), "s", edits]) for _ in range(60_000))
    )
    assert service.request("health") if not rest else True
    service.write(rest)
    last = service.new_id()
    service.send(["ping", last])
    seen = service.until(lambda m: m[:2] == ["ok", last])
    events = [m[2] for m in seen if m[0] == "node_event"]
    missed = sum(event["count"] for event in events if event["event"] == "missed")
    told = [event["seq"] for event in events if event["event"] != "missed"]
    assert told == sorted(set(told)) and missed + len(told) <= 60_000


def service_frame(service: ServiceProcess, message: list[Any]) -> bytes:
    from support import framed

    return framed(service.codec.encode(message))
