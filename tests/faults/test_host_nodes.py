"""Nodes that the host runs: this test is the host, and speaks frames to a real service."""

from __future__ import annotations

from typing import Any

import pytest

from support import ServiceProcess, is_terminal

EDGE = {"id": "e", "source": "ask", "source_handle": "", "target": "out", "target_handle": "text"}


@pytest.fixture
def host(service: ServiceProcess) -> ServiceProcess:
    return service


def opened(host: ServiceProcess, *, session: str = "s", node_type: str = "ask", **options: Any) -> None:
    options = {"host_types": [node_type]} | options
    host.open(session, ("ask", node_type, {"text": "hi"}), ("out", "text-output", {}), edges=[EDGE], **options)


def demand(host: ServiceProcess, node: str = "out", session: str = "s", **options: Any) -> int:
    id = host.new_id()
    host.send(["demand", id, session, node, options])
    return id


def executed(host: ServiceProcess) -> list[Any]:
    return host.until(lambda m: m[0] == "node_execute")[-1]


def terminal(host: ServiceProcess, id: int) -> list[Any]:
    return host.until(is_terminal(id))[-1]


def test_the_host_runs_a_node_and_its_outputs_go_on(host: ServiceProcess) -> None:
    opened(host)
    id = demand(host, deadline_ms=60_000, priority=7)
    kind, call, session, node, node_type, inputs, options = executed(host)
    assert (kind, session, node, node_type, inputs) == ("node_execute", "s", "ask", "ask", {"text": "hi"})
    assert options["timeout_ms"] == 300_000 and options["priority"] == 7 and 0 < options["deadline_ms"] <= 60_000
    host.send(["answer", call, "ok", {"output": "hello"}])
    assert terminal(host, id)[:3] == ["demand_complete", "out", {"text": "hello"}]
    # It is cached as any other.
    assert terminal(host, demand(host))[4]["cached"] == 1
    assert host.request("health")[2]["host_calls"]["open"] == 0


def test_what_the_host_streams_is_streamed_and_is_the_output_where_it_answers_none(host: ServiceProcess) -> None:
    opened(host)
    id = demand(host, node="ask")
    call = executed(host)[1]
    for word in ("one ", "two ", "three"):
        host.send(["answer_stream", call, word])
    host.send(["answer_stream", call, [1], "numbers"], ["answer_stream", call, [2], "numbers"])
    host.send(["answer", call, "ok", {"more": True}])
    *streamed, end = host.until(is_terminal(id))
    assert end[2] == {"output": "one two three", "numbers": [[1], [2]], "more": True}
    text = [m for m in streamed if m[0] == "node_stream" and m[5] == "output"]
    assert "".join(m[2] for m in text) == "one two three" and [m[4] for m in text] == list(range(len(text)))
    assert [m[2] for m in streamed if m[5] == "numbers"] == [[1], [2]]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        ({"code": "node_failed", "message": "no"}, "node_failed", "no"),
        ({"code": "too_large", "message": "much"}, "too_large", "much"),
        ({"code": "my_own", "message": "what"}, "node_failed", "what"),
        ({"code": "cancelled", "message": "by itself"}, "node_failed", "by itself"),
        ("plain text", "node_failed", "plain text"),
        ({"nonsense": 1}, "node_failed", "nonsense"),
        (None, "node_failed", "None"),
    ],
)
def test_the_hosts_error_is_the_nodes(host: ServiceProcess, error: Any, code: str, message: str) -> None:
    opened(host)
    id = demand(host)
    host.send(["answer", executed(host)[1], "error", error])
    ended = terminal(host, id)
    assert (ended[0], ended[2]["code"], ended[2]["node"]) == ("demand_error", code, "ask")
    assert message in ended[2]["message"]


def test_an_answer_that_is_no_map_is_the_nodes_failure(host: ServiceProcess) -> None:
    opened(host)
    id = demand(host)
    host.send(["answer", executed(host)[1], "ok", ["x"]])
    assert terminal(host, id)[2]["code"] == "node_failed"


def test_cancel_deadline_and_close_reach_the_host_and_a_late_answer_is_let_pass(host: ServiceProcess) -> None:
    opened(host)
    for end in ("cancel", "deadline", "close"):
        id = demand(host, **({"deadline_ms": 50} if end == "deadline" else {}))
        call = executed(host)[1]
        if end == "cancel":
            host.send(["cancel", host.new_id(), id])
        elif end == "close":
            host.send(["close", host.new_id(), "s"])
        seen = host.until(lambda m: m[0] == "node_cancel")
        assert seen[-1] == ["node_cancel", call]
        ended = next((m for m in seen if is_terminal(id)(m)), None) or terminal(host, id)
        assert ended[2]["code"] == ("deadline_exceeded" if end == "deadline" else "cancelled")
        host.send(["answer_stream", call, "late"], ["answer", call, "ok", {"output": "late"}])
        host.ping()
    assert host.request("health")[2]["host_calls"]["open"] == 0


def test_a_host_that_does_not_answer_in_time_is_unavailable(host: ServiceProcess) -> None:
    opened(host, host_timeout_ms=1)
    id = demand(host)
    call = executed(host)[1]
    seen = host.until(is_terminal(id))
    assert seen[-1][2]["code"] == "host_unavailable" and seen[-1][2]["retryable"]
    assert ["node_cancel", call] in seen or host.receive() == ["node_cancel", call]


def test_an_answer_to_no_call_is_an_error_with_id_0_and_a_malformed_one_too(host: ServiceProcess) -> None:
    for message in (["answer", 99, "ok", {}], ["answer_stream", 99, "x"], ["answer", 1, "perhaps", {}], ["answer", 1]):
        host.send(message)
        assert host.receive()[:2] == ["error", 0]
    host.ping()


def test_only_the_first_answer_counts(host: ServiceProcess) -> None:
    opened(host)
    id = demand(host)
    call = executed(host)[1]
    host.send(["answer", call, "ok", {"output": "first"}], ["answer", call, "error", "second"])
    assert terminal(host, id)[2] == {"text": "first"}


def test_the_host_comes_first_for_what_it_claims_and_may_hand_a_node_back(host: ServiceProcess) -> None:
    host.open("s", ("t", "text-input", {"text": "core"}), host_types="all")
    id = demand(host, "t")
    host.send(["answer", executed(host)[1], "ok", {"text": "host"}])
    assert terminal(host, id)[2] == {"text": "host"}
    assert host.request("edit", "s", [{"op": "invalidate", "node": "t"}])[0] == "ok"
    id = demand(host, "t")
    host.send(["answer", executed(host)[1], "error", {"code": "unknown_node_type", "message": "not mine"}])
    assert terminal(host, id)[2] == {"text": "core"}


def test_core_first_leaves_the_host_what_the_core_does_not_run(host: ServiceProcess) -> None:
    host.open("s", ("t", "text-input", {"text": "core"}), ("mine", "mine", {}), host_else="all")
    assert terminal(host, demand(host, "t"))[2] == {"text": "core"}
    id = demand(host, "mine")
    host.send(["answer", executed(host)[1], "ok", {"x": 1}])
    assert terminal(host, id)[2] == {"x": 1}


def test_a_type_that_neither_runs_is_known_at_open_already(host: ServiceProcess) -> None:
    for node_type in ("mine", "tool-executor", "rag-search"):
        graph = {"nodes": [{"id": "n", "node_type": node_type, "data": {"tool": "t", "query": "q"}}], "edges": []}
        reply = host.request("open", "s", graph, {"host_types": ["other"]})
        assert (reply[0], reply[2]["code"]) == ("error", "unknown_node_type")
    # An answer of unknown_node_type with nobody to hand it to is that error.
    opened(host)
    id = demand(host)
    host.send(["answer", executed(host)[1], "error", {"code": "unknown_node_type", "message": "no"}])
    assert terminal(host, id)[2]["code"] == "unknown_node_type"


def test_a_descriptor_says_the_ports_and_they_are_held_to(host: ServiceProcess) -> None:
    described = {"node_type": "ask", "inputs": [{"name": "text", "type": "string"}], "outputs": ["reply"]}
    bad_edge = [EDGE | {"source_handle": "nothing"}]
    graph = {"nodes": [{"id": "ask", "node_type": "ask"}, {"id": "out", "node_type": "text-output"}], "edges": bad_edge}
    reply = host.request("open", "s", graph, {"host_types": [described]})
    assert (reply[0], reply[2]["code"]) == ("error", "unknown_port")
    opened(host, host_types=[described])
    id = demand(host)
    host.send(["answer", executed(host)[1], "ok", {"wrong": 1}])
    ended = terminal(host, id)
    assert ended[2]["code"] == "node_failed" and "wrong" in ended[2]["message"]


@pytest.mark.parametrize(
    "claims",
    ["some", 1, [1], [""], [{"inputs": []}], [{"node_type": "x", "outputs": 1}], [{"node_type": "x", "inputs": [{}]}]],
)
def test_a_wrong_claim_is_named(host: ServiceProcess, claims: Any) -> None:
    reply = host.request("open", "s", {"nodes": []}, {"host_types": claims})
    assert (reply[0], reply[2]["code"]) == ("error", "bad_message")
    assert "host_types" in reply[2]["message"] or "x." in reply[2]["message"]


def test_tools_and_search_are_the_hosts(host: ServiceProcess) -> None:
    nodes = [
        ("tool", "tool-executor", {"tool": "add", "arguments": {"a": 1}}),
        ("rag", "rag-search", {"query": "cats"}),
    ]
    host.open("s", *nodes, host_types=["tool-executor", "rag-search"])
    id = demand(host, "tool")
    call = executed(host)
    assert call[5] == {"tool": "add", "arguments": {"a": 1}}
    host.send(["answer", call[1], "ok", {"result": 2}])
    assert terminal(host, id)[2] == {"result": 2}
    id = demand(host, "rag")
    call = executed(host)
    assert call[5] == {"query": "cats", "limit": 5}
    host.send(["answer", call[1], "ok", {"documents": ["d"], "context": "d"}])
    assert terminal(host, id)[2] == {"documents": ["d"], "context": "d"}


def test_a_host_far_ahead_of_a_consumer_without_credit_is_stopped(host: ServiceProcess) -> None:
    opened(host)
    id = demand(host, "ask", credit=1)
    call = executed(host)[1]
    for number in range(1200):
        host.send(["answer_stream", call, [number], "numbers"])
    seen = host.until(is_terminal(id))
    assert seen[-1][2]["code"] == "queue_full"
    assert [m[2] for m in seen if m[0] == "node_stream"] == [[0]]


def test_values_wait_for_credit_in_order(host: ServiceProcess) -> None:
    opened(host)
    id = demand(host, "ask", credit=1)
    call = executed(host)[1]
    for number in range(50):
        host.send(["answer_stream", call, [number], "numbers"])
    host.send(["answer", call, "ok", {}])
    host.ping()
    host.send(["credit", id, 100])
    *rest, end = host.until(is_terminal(id))
    assert end[2]["numbers"] == [[number] for number in range(50)]
    assert [m[2] for m in rest if m[0] == "node_stream"][-1] == [49]


def test_a_host_node_wanted_by_two_runs_once_and_is_cancelled_with_the_last(host: ServiceProcess) -> None:
    opened(host)
    first, second = demand(host, "ask"), demand(host)
    call = executed(host)[1]
    host.send(["cancel", host.new_id(), first])
    assert terminal(host, first)[2]["code"] == "cancelled"
    host.ping()
    host.send(["cancel", host.new_id(), second])
    seen = host.until(lambda m: m[0] == "node_cancel")
    assert seen[-1] == ["node_cancel", call]


def test_inputs_that_cannot_be_told_are_the_nodes_failure(host: ServiceProcess) -> None:
    edge = {"id": "e", "source": "v", "source_handle": "", "target": "ask", "target_handle": "text"}
    host.open("s", ("v", "t-value", {"kind": "object"}), ("ask", "ask", {}), edges=[edge], host_types=["ask"])
    ended = terminal(host, demand(host, "ask"))
    assert ended[2]["code"] in ("type_mismatch", "node_failed")
    assert host.request("health")[2]["host_calls"]["open"] == 0


def test_a_person_may_answer_after_other_demands_and_edits(host: ServiceProcess) -> None:
    host.open("s", ("ask", "human-input", {"prompt": "Name?"}), ("t", "text-input", {"text": "x"}))
    id = demand(host, "ask", events=True)
    waiting = host.until(lambda m: m[0] == "node_event" and m[2]["event"] == "waiting_for_input")[-1]
    assert waiting[2]["prompt"] == "Name?"
    assert terminal(host, demand(host, "t"))[2] == {"text": "x"}
    assert host.request("edit", "s", [{"op": "set_input", "node": "t", "port": "text", "value": "y"}])[0] == "ok"
    assert host.request("edit", "s", [{"op": "set_input", "node": "ask", "port": "user_response", "value": "Ada"}])
    assert terminal(host, id)[2] == {"value": "Ada"}
