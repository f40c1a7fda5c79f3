"""What a graph may look like, which rules it must keep, and that edits are all or nothing."""

from __future__ import annotations

from typing import Any

import pytest

from demandport.engine.registry import load_specs
from demandport.errors import DemandportError, InvalidGraph
from demandport.graph.edits import apply
from demandport.graph.loading import load
from demandport.graph.model import find_cycle
from demandport.graph.validation import problems_of, require_runnable
from demandport.nodes import BUILT_IN

SPECS = load_specs(BUILT_IN)


def _node(id: str, type: str = "text-input", **data: Any) -> dict[str, Any]:
    return {"id": id, "node_type": type, "data": data}


def _edge(id: str, source: str, target: str, out: str = "", into: str = "") -> dict[str, Any]:
    return {"id": id, "source": source, "source_handle": out, "target": target, "target_handle": into}


@pytest.mark.parametrize(
    "raw",
    [
        {"id": "a", "node_type": "text-input"},
        {"id": "a", "nodeType": "text-input", "position": [1, 2]},
        {"id": "a", "data": {"node_type": "text-input"}, "position": {"x": 1, "y": 2}},
        {"id": "a", "node_type": None, "data": {"node_type": "text-input"}},
        {"id": "text-input-1"},
        {"id": "text-input-7", "data": None, "position": None},
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_every_shape_of_a_node(raw: dict[str, Any], wrapped: bool) -> None:
    body = {"nodes": [raw]}
    graph = load({"version": 1, "metadata": {}, "graph": body} if wrapped else body)
    assert [node.node_type for node in graph.nodes.values()] == ["text-input"]
    assert load(graph.to_json()).to_json() == graph.to_json()


@pytest.mark.parametrize(
    "bad",
    [
        None, [], {}, {"nodes": {}}, {"nodes": [1]}, {"nodes": [{}]}, {"nodes": [{"id": ""}]}, {"nodes": [{"id": 1}]},
        {"nodes": [{"id": "a"}, {"id": "a"}]}, {"nodes": [{"id": "a", "data": []}]}, {"nodes": [], "edges": {}},
        {"nodes": [], "edges": [1]}, {"nodes": [], "edges": [{"source": "a"}]},
        {"nodes": [{"id": "a", "position": [1]}]}, {"nodes": [{"id": "a", "node_type": 3}]},
        {"nodes": [], "edges": [_edge("e", "a", "b"), _edge("e", "b", "a")]},
    ],
    ids=repr,
)  # fmt: skip
def test_a_malformed_graph_is_refused(bad: Any) -> None:
    with pytest.raises(InvalidGraph):
        load(bad)


RULES = [
    ("unknown_node_type", [_node("a", "nope")], []),
    ("unknown_node", [_node("a")], [_edge("e", "a", "b")]),
    ("unknown_port", [_node("a"), _node("b", "text-output")], [_edge("e", "a", "b", "x")]),
    ("unknown_port", [_node("a"), _node("b", "text-output")], [_edge("e", "a", "b", "", "x")]),
    ("type_mismatch", [_node("a"), _node("b", "image-output")], [_edge("e", "a", "b")]),
    ("type_mismatch", [_node("a", text=b"x")], []),
    ("invalid_graph", [_node("a"), _node("b", "text-output")], [_edge("e", "a", "b"), _edge("f", "a", "b")]),
    ("missing_input", [_node("a", "conditional")], []),
    ("cycle", [_node("a", "text-output"), _node("b", "text-output")], [_edge("e", "a", "b"), _edge("f", "b", "a")]),
    ("cycle", [_node("a", "text-output")], [_edge("e", "a", "a")]),
]


@pytest.mark.parametrize(("code", "nodes", "edges"), RULES)
def test_a_broken_rule_is_reported_alike_everywhere(code: str, nodes: list[Any], edges: list[Any]) -> None:
    graph = load({"nodes": nodes, "edges": edges})
    problems = problems_of(graph, SPECS)
    assert code in {problem.code for problem in problems}
    assert all(problem.hint and problem.message for problem in problems)
    if code == "missing_input":
        assert [problem.code for problem in require_runnable(graph, SPECS)] == [code] * len(problems)
    else:
        with pytest.raises(DemandportError) as caught:
            require_runnable(graph, SPECS)
        assert caught.value.code == code


@pytest.mark.parametrize("name", ["maxTokens", "max-tokens", "MAX_TOKENS", "max_token", "max_tockens"])
def test_a_name_in_data_that_is_almost_a_ports_is_a_problem_and_the_graph_opens(name: str) -> None:
    node = _node(
        "llm",
        "llamacpp-inference",
        **{"prompt": "x", "model_path": "tiny", "label": "my model", "position": 1, name: 9},
    )
    (problem,) = require_runnable(load({"nodes": [node], "edges": []}), SPECS)
    assert (problem.code, problem.node, problem.port, problem.fatal) == ("unknown_port", "llm", name, False)
    assert "'max_tokens'" in problem.hint


def test_a_name_in_data_that_is_no_port_is_none_where_the_port_has_a_value_or_the_node_takes_any() -> None:
    given = _node("llm", "llamacpp-inference", model_path="tiny", prompt="x", max_tokens=1, maxTokens=2)
    anything = _node("t", "template", template="{{a}}", templates="x")
    assert require_runnable(load({"nodes": [given, anything], "edges": []}), SPECS) == []


def test_a_graph_grows_no_larger_than_one_may_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("demandport.graph.loading.MAX_NODES", 3)
    graph, _ = apply(load(BASE), [{"op": "add_node", "node": _node("c")}], SPECS)
    with pytest.raises(InvalidGraph, match="at most 3 nodes"):
        apply(graph, [{"op": "add_node", "node": _node("d")}], SPECS)


def test_to_clear_an_input_that_is_not_set_changes_nothing() -> None:
    graph = load(BASE)
    clear = [{"op": "clear_input", "node": "a", "port": "text"}]
    after, changed = apply(graph, clear, SPECS)
    assert changed == set()
    after, _ = apply(after, [{"op": "set_input", "node": "a", "port": "text", "value": "y"}], SPECS)
    after, changed = apply(after, clear, SPECS)
    assert changed == {"a"} and not after.inputs.get("a")


def test_a_cycle_is_named() -> None:
    graph = load({"nodes": [_node(i) for i in "abc"], "edges": [_edge(f"{s}{t}", s, t) for s, t in ("ab", "bc", "cb")]})
    assert find_cycle(graph) in (["b", "c", "b"], ["c", "b", "c"])


BASE = {"nodes": [_node("a", text="x"), _node("b", "text-output")], "edges": [_edge("e", "a", "b", "text", "text")]}
BAD_OPERATIONS = [
    None, {}, {"op": "nope"}, {"op": "add_node"}, {"op": "add_node", "node": _node("a")},
    {"op": "add_node", "node": _node("c", "nope")}, {"op": "remove_node", "node": "z"}, {"op": "remove_node"},
    {"op": "add_edge", "edge": _edge("e", "a", "b")}, {"op": "add_edge", "edge": _edge("f", "b", "a", "text", "text")},
    {"op": "add_edge", "edge": _edge("f", "a", "z")}, {"op": "remove_edge", "edge": "z"},
    {"op": "update_node_data", "node": "a", "data": 1}, {"op": "update_node_data", "node": "z", "data": {}},
    {"op": "set_input", "node": "a", "port": "nope", "value": 1}, {"op": "set_input", "node": "a", "port": "text"},
    {"op": "set_input", "node": "a", "port": "text", "value": b"x"}, {"op": "clear_input", "node": "a", "port": "z"},
    {"op": "invalidate", "node": "z"},
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_OPERATIONS, ids=repr)
def test_one_bad_operation_undoes_all(bad: Any) -> None:
    graph = load(BASE)
    before = graph.to_json()
    good = [
        {"op": "set_input", "node": "a", "port": "text", "value": "new"},
        {"op": "update_node_data", "node": "a", "data": {"k": 1}},
        {"op": "remove_edge", "edge": "e"},
        {"op": "add_edge", "edge": BASE["edges"][0]},
    ]
    with pytest.raises(DemandportError):
        apply(graph, [*good, bad], SPECS)
    assert graph.to_json() == before and graph.inputs == {}


def test_edits_change_a_copy_and_name_what_they_change() -> None:
    graph = load(BASE)
    edited, changed = apply(graph, [{"op": "remove_node", "node": "a"}], SPECS)
    assert changed == {"a", "b"} and list(edited.nodes) == ["b"] and not edited.edges
    assert list(graph.nodes) == ["a", "b"]
