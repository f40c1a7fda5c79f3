"""A real service over the wire, asked anything in any order: every answer is what a small model says, and every promise
is kept as `history.py` judges it."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from history import TERMINALS, Fact
from recording import Recorder
from support import count, framed

TEXTS = st.sampled_from(["a", "bc", "ä€😀", ""])
#: What is never the answer of a person, since it is none.
ANSWERS = st.sampled_from(["yes", "no", "perhaps"])
SEPARATOR = "+"
LARGE = 150_000
#: A deadline that is never reached; the others may be, or may not.
FAR_MS = 60_000
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "credit": st.sampled_from([0, 1, 1, 2, 100]),
        "deadline_ms": st.sampled_from([0, 1, 5, *[FAR_MS] * 6]),
        "events": st.booleans(),
        "coalesce_ms": st.sampled_from([0, 1]),
        "coalesce_bytes": st.sampled_from([0, 3]),
        "priority": st.integers(-1, 1),
    },
)
#: Which of the latest demands.
PICKS = st.integers(0, 4)
MAX_RUNNING, MAX_QUEUED = 6, 4
#: The node type that the host runs.
HOSTED = "run-by-the-host"
#: The output port that is looked at, by node type.
MANY_OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "limit": st.integers(1, 3),
        "deadline_ms": st.sampled_from([1, FAR_MS, FAR_MS]),
        "events": st.booleans(),
    },
)
PORTS = {"text-input": "text", "human-input": "value", "merge": "merged", "t-turns": "out", "t-cpu": "output"}


# ------------------------------------------------------------------------------------------------- the model


@dataclass(frozen=True, slots=True)
class Answer:
    """A part of a text that a person is yet to give."""

    node: str


#: A text in parts, other values that a node streams, or the code of an error.
Parts = list[str | Answer]
Outcome = Parts | tuple[Any, ...] | str


@dataclass(slots=True)
class Node:
    """A node of the model, and the output port that is looked at."""

    kind: str
    data: dict[str, Any]

    @property
    def port(self) -> str:
        return {"text-input": "text", "human-input": "value", "merge": "merged", "t-turns": "out"}.get(
            self.kind, "output"
        )


@dataclass(slots=True)
class Graph:
    """The graph of a session, evaluated anew for every question."""

    nodes: dict[str, Node] = field(default_factory=dict)
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    #: id → source, target; all of them lead to the `inputs` of a merge.
    edges: dict[str, tuple[str, str]] = field(default_factory=dict)

    def of_kind(self, *kinds: str) -> list[str]:
        return [name for name, node in self.nodes.items() if node.kind in kinds]

    def outcome(self, name: str) -> Outcome:
        """What a demand made now must come to."""
        if name not in self.nodes:
            return "unknown_node"
        node = self.nodes[name]
        values = node.data | self.inputs.get(name, {})
        if node.kind == "t-raise":
            return "node_failed"
        if node.kind == "human-input":
            return [values["user_response"]] if values.get("user_response") is not None else [Answer(name)]
        if node.kind == "t-turns":
            chunks = values["chunks"]
            return ["".join(chunks)] if all(type(chunk) is str for chunk in chunks) else tuple(chunks)
        if node.kind == HOSTED:
            return ["".join(answer_of(name))]
        if node.kind == "t-large":
            return ["x" * values["size"]]
        return self._merged(name) if node.kind == "merge" else [values.get("text", "")]

    def _merged(self, name: str) -> Outcome:
        sources = [self.outcome(source) for source, target in self.edges.values() if target == name]
        if any(type(source) is str for source in sources):
            return "node_failed"
        parts: Parts = []
        for source in sources:
            assert type(source) is list
            parts += [SEPARATOR, *source] if parts else source
        return parts or [""]

    def to_json(self) -> dict[str, Any]:
        return {
            "nodes": [{"id": name, "node_type": node.kind, "data": node.data} for name, node in self.nodes.items()],
            "edges": [edge(id, *ends) for id, ends in self.edges.items()],
        }


def answer_of(name: str) -> list[str]:
    """What the host answers for a node that it runs, in chunks."""
    return ["from ", "the host: ", name]


def edge(id: str, source: str, target: str) -> dict[str, Any]:
    return {"id": id, "source": source, "target": target, "target_handle": "inputs"}


@dataclass(slots=True)
class Asked:
    """A demand, and what may come of it.

    Attributes:
        asked: number of answers that had been given before it.
        codes: errors that it may end with, too.
    """

    id: int
    node: str
    port: str
    outcome: Outcome
    asked: int
    codes: set[str]

    def stuck(self, graph: Graph, answers: list[tuple[str, str]]) -> bool:
        """It waits for a person who is gone."""
        holes = [part.node for part in self.outcome if type(part) is Answer] if type(self.outcome) is list else []
        given = {node for node, _ in answers[self.asked :]}
        return any(node not in graph.nodes and node not in given for node in holes)

    def fits(self, value: Any, answers: list[tuple[str, str]]) -> bool:
        """Whether the value is the outcome, given those answers."""
        if type(self.outcome) is tuple:
            return bool(value == list(self.outcome))
        later = answers[self.asked :]
        choices = [
            [text for node, text in later if node == part.node] if type(part) is Answer else [part]
            for part in self.outcome
        ]
        return any("".join(texts) == value for texts in itertools.product(*map(dict.fromkeys, choices)))


@dataclass(slots=True)
class Many:
    """A demand of several nodes: each of them, whether they all run to their end, and how it may fail as a whole."""

    each: list[Asked]
    all: bool
    codes: set[str]

    def judge(self, message: list[Any], answers: list[tuple[str, str]]) -> None:
        """Fail unless its terminal is one that it may have."""
        if message[0] == "demand_error":
            failed = {asked.outcome for asked in self.each if type(asked.outcome) is str}
            parts = {code for asked in self.each for code in asked.codes}
            assert message[2]["code"] in self.codes | failed | parts, (self, message)
            return
        assert [outcome["node"] for outcome in message[2]] == [asked.node for asked in self.each]
        for asked, outcome in zip(self.each, message[2], strict=True):
            if outcome["status"] == "ok":
                assert asked.fits(outcome["outputs"][asked.port], answers), (asked, outcome)
            elif outcome["status"] == "error":
                code = outcome["error"]["code"]
                assert code == asked.outcome or code in asked.codes, (asked, outcome)
            else:
                assert not self.all and outcome["status"] in ("cancelled", "not_started"), (asked, outcome)


# ---------------------------------------------------------------------------------------------- the service


class Hosts:
    """The service process that runs share, one after the other; replaced when one has ended, or a run has failed."""

    def __init__(self, nodes: Path) -> None:
        self._nodes = nodes
        self._host: Recorder | None = None
        #: Workers of its were killed; that may be felt by later runs: a pool whose workers never get ready rests.
        self.killed = False
        self.numbers = itertools.count(1)
        self.runs = self.steps = 0

    def take(self) -> Recorder:
        """A service for one run; the last one, if it was given back."""
        host, self._host = self._host, None
        if host is None:
            host, self.killed = Recorder(nodes=self._nodes), False
            host.open("gates", ("let", "t-let", {"turns": {}}))
        return host

    def give_back(self, host: Recorder) -> None:
        """It is well and nothing is open."""
        self._host = host

    def close(self) -> None:
        if self._host is not None:
            self._host.__exit__()


class ServiceMachine(RuleBasedStateMachine):
    """One run: a session with a graph that changes, and demands on it that wait for each other, people and gates."""

    hosts: Hosts

    def __init__(self) -> None:
        super().__init__()
        self.host = self.hosts.take()
        self.graph = Graph()
        self.session = ""
        self.demands: dict[int, Asked] = {}
        #: Ids of all demands so far, of one that never was first.
        self.made = [1]
        #: What is to be made of the reply to a request.
        self.replies: dict[int, Callable[[list[Any]], None]] = {}
        self.many: dict[int, Many] = {}
        self.answers: list[tuple[str, str]] = []
        #: Open calls to the host: their nodes, and how many chunks were answered. Those that are over.
        self.calls: dict[int, tuple[str, int]] = {}
        self.over: list[int] = []
        self.turns: dict[str, int] = {}
        self.hosts.runs += 1
        #: The host answered a call with an error, and nobody was heard to end with it: who asks now may join the call.
        self.refused = False
        self._wrong = False
        self._names = itertools.count(1)

    @initialize(texts=st.lists(TEXTS, min_size=1, max_size=3))
    def open(self, texts: list[str]) -> None:
        """A new session with a graph of every kind."""
        self.session = f"s{next(self.hosts.numbers)}"
        self.graph, self.turns, self.refused = Graph(), {}, False
        for number, text in enumerate(texts):
            self.graph.nodes[f"text{number}"] = Node("text-input", {"text": text})
        for number in range(2):
            self.graph.nodes[f"person{number}"] = Node("human-input", {})
            self._add_turns(f"turns{number}", [*"streamed"] if number else [{"n": 1}, [2], None, 4, "5", 6.5])
            self.graph.nodes[f"merge{number}"] = Node("merge", {"separator": SEPARATOR})
            self.graph.nodes[f"cpu{number}"] = Node("t-cpu", {"text": f"computed {number}"})
        self.graph.nodes["fails"] = Node("t-raise", {})
        self.graph.nodes["large"] = Node("t-large", {"size": LARGE})
        for target, sources in {"merge0": ["text0", "person0", "turns1"], "merge1": ["merge0", "person1"]}.items():
            for source in sources:
                self.graph.edges[f"{source}-{target}"] = (source, target)
        options: dict[str, Any] = {"max_running": MAX_RUNNING, "max_queued": MAX_QUEUED}
        if self._offers("host_nodes"):
            options["host_types"] = [HOSTED]
            self.graph.nodes["hosted"] = Node(HOSTED, {})
            self.graph.edges["hosted-merge1"] = ("hosted", "merge1")
        self._ask("open", self.session, self.graph.to_json(), options)

    def _offers(self, feature: str) -> bool:
        assert self.host.ready
        return feature in self.host.ready[1]["features"]

    def _add_turns(self, name: str, chunks: list[Any]) -> None:
        key = f"{self.session}-{name}"
        self.turns[key] = 0
        self.graph.nodes[name] = Node("t-turns", {"key": key, "chunks": chunks})

    # ---------------------------------------------------------------------------------------------- edits

    def _edit(self, *operations: dict[str, Any]) -> None:
        self._ask("edit", self.session, [*operations])

    @rule(
        data=st.data(),
        how=st.sampled_from([
            "set_a_text", "set_a_text", "clear_an_input", "add_a_node", "remove_a_node", "remove_an_edge", "invalidate",
            "edit_all_or_nothing", "close_a_cycle",
        ]),
    )  # fmt: skip
    def edit(self, data: st.DataObject, how: str) -> None:
        getattr(self, f"_{how}")(data)

    def _set_a_text(self, data: st.DataObject) -> None:
        if names := self.graph.of_kind("text-input"):
            self._set(data.draw(st.sampled_from(names)), "text", data.draw(TEXTS))

    @rule(data=st.data(), answer=ANSWERS)
    def answer_as_a_person(self, data: st.DataObject, answer: str) -> None:
        if names := self.graph.of_kind("human-input"):
            self._give(data.draw(st.sampled_from(names)), answer)

    def _give(self, name: str, answer: str) -> None:
        self.answers.append((name, answer))
        self._set(name, "user_response", answer)

    def _set(self, name: str, port: str, value: Any) -> None:
        self.graph.inputs.setdefault(name, {})[port] = value
        self._edit({"op": "set_input", "node": name, "port": port, "value": value})

    def _clear_an_input(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.graph.nodes)))
        port = {"text-input": "text", "human-input": "user_response"}.get(self.graph.nodes[name].kind)
        if port:
            self.graph.inputs.get(name, {}).pop(port, None)
            self._edit({"op": "clear_input", "node": name, "port": port})

    def _add_a_node(self, data: st.DataObject) -> None:
        """A text; or one that shows what another gives, and reads it."""
        name = f"new{next(self._names)}"
        if data.draw(st.booleans()):
            self.graph.nodes[name] = Node("text-input", {"text": data.draw(TEXTS)})
            self._edit({"op": "add_node", "node": self.graph.to_json()["nodes"][-1]})
            return
        self.graph.nodes[name] = Node("merge", {"separator": SEPARATOR})
        added = {"op": "add_node", "node": self.graph.to_json()["nodes"][-1]}
        ends = (data.draw(st.sampled_from(self._mergeable(but=name))), name) if self._mergeable(but=name) else None
        if ends is None:
            self._edit(added)
            return
        self.graph.edges[f"{ends[0]}-{name}"] = ends
        self._edit(added, {"op": "add_edge", "edge": edge(f"{ends[0]}-{name}", *ends)})

    def _mergeable(self, but: str) -> list[str]:
        found = self.graph.of_kind("text-input", "human-input", "merge", "t-raise", HOSTED)
        return [name for name in found if name != but]

    def _remove_a_node(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.graph.nodes)))
        if len(self.graph.nodes) > 3:
            del self.graph.nodes[name]
            self.graph.inputs.pop(name, None)
            self.graph.edges = {id: ends for id, ends in self.graph.edges.items() if name not in ends}
            self._edit({"op": "remove_node", "node": name})

    def _remove_an_edge(self, data: st.DataObject) -> None:
        if self.graph.edges:
            id = data.draw(st.sampled_from(sorted(self.graph.edges)))
            del self.graph.edges[id]
            self._edit({"op": "remove_edge", "edge": id})

    def _invalidate(self, data: st.DataObject) -> None:
        self._edit({"op": "invalidate", "node": data.draw(st.sampled_from(sorted(self.graph.nodes)))})

    def _edit_all_or_nothing(self, data: st.DataObject) -> None:
        """The second operation cannot be applied, so the first must leave nothing behind."""
        if names := self.graph.of_kind("text-input"):
            first = {"op": "set_input", "node": data.draw(st.sampled_from(names)), "port": "text", "value": "!"}
            self._ask("edit", self.session, [first, {"op": "invalidate", "node": "nowhere"}], code="unknown_node")

    def _close_a_cycle(self, data: st.DataObject) -> None:
        between = [ends for ends in self.graph.edges.values() if self.graph.nodes[ends[0]].kind == "merge"]
        if between:
            source, target = data.draw(st.sampled_from(between))
            self._ask("edit", self.session, [{"op": "add_edge", "edge": edge("back", target, source)}], code="cycle")

    # ------------------------------------------------------------------------------------------- demands

    @rule(data=st.data(), times=st.integers(1, 4), options=OPTIONS)
    def demand(self, data: st.DataObject, times: int, options: dict[str, Any]) -> None:
        """One of any node, or several of the same."""
        name = data.draw(st.sampled_from([*sorted(self.graph.nodes), "nowhere"]))
        for _ in range(times):
            self._demand(name, options)

    @rule(data=st.data(), asked=st.lists(st.tuples(OPTIONS, st.integers(0, 7)), min_size=1, max_size=3))
    def demand_a_stream(self, data: st.DataObject, asked: list[tuple[dict[str, Any], int]]) -> None:
        """Once or more, and between that a few chunks of it are let pass."""
        if names := self.graph.of_kind("t-turns"):
            name = data.draw(st.sampled_from(names))
            for options, chunks in asked:
                self._demand(name, options)
                self._let({f"{self.session}-{name}": chunks})
                self.hear()

    def _demand(self, name: str, options: dict[str, Any]) -> None:
        id = self.host.new_id()
        self.made.append(id)
        codes = {"deadline_exceeded"} if options.get("deadline_ms", FAR_MS) < FAR_MS else set()
        if self._crowded():
            codes.add("queue_full")
        self.demands[id] = self._asked(id, name, codes)
        self.host.send(["demand", id, self.session, name, options])

    def _crowded(self) -> bool:
        """There may be as many demands as can be."""
        return len(self.demands) + sum(len(many.each) for many in self.many.values()) >= MAX_RUNNING + MAX_QUEUED

    def _asked(self, id: int, name: str, codes: set[str]) -> Asked:
        node = self.graph.nodes.get(name)
        if node and node.kind == "t-cpu" and self.hosts.killed:  # the pool may give it to one that is dying
            codes = codes | {"worker_crash"}
        if self.refused:
            codes = codes | {"too_large"}
        return Asked(id, name, node.port if node else "", self.graph.outcome(name), len(self.answers), codes)

    @precondition(lambda self: self._offers("demand_many"))
    @rule(data=st.data(), mode=st.sampled_from(["all", "try", "race"]), options=MANY_OPTIONS)
    def demand_many(self, data: st.DataObject, mode: str, options: dict[str, Any]) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(self.graph.nodes)), min_size=1, max_size=4, unique=True))
        id = self.host.new_id()
        self.made.append(id)
        codes = {"queue_full"} | ({"deadline_exceeded"} if options.get("deadline_ms", FAR_MS) < FAR_MS else set())
        self.many[id] = Many([self._asked(id, name, codes) for name in names], mode == "all", codes)
        self.host.send(["demand_many", id, self.session, names, {"mode": mode, **options}])

    @rule(pick=PICKS, how=st.sampled_from(["chunk", "ok", "ok", "error", "late"]))
    def answer_a_call(self, pick: int, how: str) -> None:
        """As the host that runs a node. Which calls are open depends on what was heard, so nothing is drawn here."""
        if how == "late" and self.over:
            self.host.send(["answer", self.over[pick % len(self.over)], "ok", {"output": "late"}])
        elif self.calls:
            self._answer_call(sorted(self.calls)[pick % len(self.calls)], how)

    def _answer_call(self, id: int, how: str) -> None:
        name, chunks = self.calls[id]
        rest = answer_of(name)[chunks:]
        if how == "chunk" and rest:
            self.host.send(["answer_stream", id, rest[0]])
            self.calls[id] = name, chunks + 1
            return
        del self.calls[id]
        self.over.append(id)
        if how == "error":
            self.refused = True
            for asked in [*self.demands.values(), *self.many.values()]:
                asked.codes.add("too_large")
            self.host.send(["answer", id, "error", {"code": "too_large", "message": "so it is"}])
        elif chunks:
            self.host.send(*(["answer_stream", id, chunk] for chunk in rest), ["answer", id, "ok", {}])
        else:
            self.host.send(["answer", id, "ok", {"output": "".join(rest)}])

    @precondition(lambda self: self._offers("subscribe"))
    @rule(since=st.none() | st.integers(0, 20), on=st.booleans())
    def subscribe(self, since: int | None, on: bool) -> None:
        if on:
            self._ask("subscribe", self.session, {} if since is None else {"since": since})
        else:
            self._ask("unsubscribe", self.session)

    @rule(pick=PICKS)
    def cancel(self, pick: int) -> None:
        id = self._picked(pick)
        self._may_end(id, "cancelled")
        self._ask("cancel", id)

    @rule(pick=PICKS, n=st.integers(1, 3))
    def grant(self, pick: int, n: int) -> None:
        self.host.send(["credit", self._picked(pick), n])

    def _may_end(self, id: int, code: str) -> None:
        """A demand may end with this code from now on."""
        for asked in (self.demands.get(id), self.many.get(id)):
            if asked is not None:
                asked.codes.add(code)

    def _picked(self, pick: int) -> int:
        """One of the latest demands, ended or not: what hypothesis draws must not depend on when something ends."""
        return self.made[-1 - pick % len(self.made)]

    @rule(data=st.data(), chunks=st.integers(1, 8))
    def let_some_pass(self, data: st.DataObject, chunks: int) -> None:
        self._let({data.draw(st.sampled_from(sorted(self.turns))): chunks})

    def _let(self, chunks: dict[str, int]) -> None:
        """Let nodes stream so many chunks in all; those that are let pass already stay so."""
        turns = {key: max(count, self.turns[key]) for key, count in chunks.items()}
        self.turns |= turns
        given = {"op": "set_input", "node": "let", "port": "turns", "value": turns}
        self._ask("edit", "gates", [given])
        self.host.send(["demand", self.host.new_id(), "gates", "let", {}])

    @rule()
    def kill_the_workers(self) -> None:
        """Those of nodes that compute, with a signal that leaves them no time."""

        def kill(reply: list[Any]) -> None:
            for worker in reply[2]["pools"]["cpu"]["workers"]:
                if worker["os_pid"] is not None:
                    self.hosts.killed = True
                    self.host.record(Fact("worker_killed"))
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(worker["os_pid"], signal.SIGKILL)
            every = [*self.demands.values(), *(one for many in self.many.values() for one in many.each)]
            for asked in every:
                if self.hosts.killed and asked.port == PORTS["t-cpu"]:
                    asked.codes.add("worker_crash")

        self._ask("health", check=kill)

    # ------------------------------------------------------------------------------------- other requests

    @rule(data=st.data(), how=st.sampled_from(["get_output", "snapshot", "ask_how_it_is", "send_what_is_wrong"]))
    def ask(self, data: st.DataObject, how: str) -> None:
        getattr(self, f"_{how}")(data)

    def _get_output(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.graph.nodes)))
        now = Asked(0, name, "", self.graph.outcome(name), len(self.answers), set())

        def check(reply: list[Any]) -> None:
            if reply[2]["status"] == "fresh":
                assert type(now.outcome) is not str and now.fits(reply[2]["value"], []), (now, reply)
            else:
                assert reply[2] == {"status": "absent", "value": None}

        self._ask("get_output", self.session, name, self.graph.nodes[name].port, check=check)

    def _snapshot(self, data: st.DataObject) -> None:
        names, inputs = [*self.graph.nodes], {name: given.copy() for name, given in self.graph.inputs.items() if given}
        edges = {id: ends for id, ends in self.graph.edges.items()}

        def check(reply: list[Any]) -> None:
            found = reply[2]
            assert [node["id"] for node in found["graph"]["nodes"]] == names == [*found["states"]]
            assert {e["id"]: (e["source"], e["target"]) for e in found["graph"]["edges"]} == edges
            assert {name: given for name, given in found["inputs"].items() if given} == inputs

        self._ask("snapshot", self.session, check=check)

    def _ask_how_it_is(self, data: st.DataObject) -> None:
        self._ask(data.draw(st.sampled_from(["ping", "health", "models"])))

    def _send_what_is_wrong(self, data: st.DataObject) -> None:
        id = self.host.new_id()
        wrong: list[list[Any]] = [
            ["demand", id, self.session], ["demand", id, self.session, "text0", {"credit": -1}], ["ping"],
            ["nothing", id], [id], ["cancel", id, 0], ["edit", id, self.session, [{"op": "odd"}]], ["credit", id, 0],
            ["hello", id, {"protocol": [1, 1]}], ["open", id, self.session, {}], ["node_execute", id],
            ["ping", 1 << 64], ["close", id, "nowhere"], ["credit", id + (1 << 40), 1],
        ]  # fmt: skip
        self.host.send(data.draw(st.sampled_from(wrong)))

    @rule(payload=st.binary(max_size=5).map(lambda data: b"\xc1" + data) | st.just(b""))
    def send_no_message(self, payload: bytes) -> None:
        self.host.send_payload(payload)

    @rule(pick=PICKS, kind=st.sampled_from(["ping", "demand"]))
    def use_an_id_twice(self, pick: int, kind: str) -> None:
        id = self._picked(pick)
        if kind == "ping":
            self.host.send(["ping", id])
        elif self._answer_is_still_to_come(id):
            self.host.send(["demand", id, self.session, "text0", {}])

    def _answer_is_still_to_come(self, id: int) -> bool:
        """It waits for a person; or else its end may be on its way, and the id be free again."""
        asked = self.demands.get(id)
        if asked is None or asked.codes or len(self.answers) > asked.asked:
            return False
        return any(type(part) is Answer for part in asked.outcome)

    # ----------------------------------------------------------------------------------- hearing, and ends

    def _ask(self, kind: str, *fields: Any, code: str | None = None, check: Any = None) -> None:
        id = self.host.new_id()

        def checked(reply: list[Any]) -> None:
            assert (reply[2]["code"] if reply[0] == "error" else None) == code, (kind, fields, reply)
            if check is not None:
                check(reply)

        self.replies[id] = checked
        self.host.send([kind, id, *fields])

    @rule()
    def hear(self) -> None:
        """All that has been sent before the reply to a ping."""
        id = self.host.new_id()
        self.host.send(["ping", id])
        self._hear(lambda: not self.host.judge.is_open(id))

    def _hear(self, enough: Callable[[], bool]) -> None:
        self._wrong = True  # unless this goes well
        while not enough():
            message = self.host.receive()
            if message[0] in TERMINALS:
                self._judge(message)
            elif message[0] in ("ok", "error") and message[1] in self.replies:
                self.replies.pop(message[1])(message)
            elif message[0] == "node_execute":
                self.calls[message[1]] = message[3], 0
            elif message[0] == "node_cancel" and self.calls.pop(message[1], None):
                self.over.append(message[1])
        self._wrong = False

    def _judge(self, message: list[Any]) -> None:
        if message[3] in self.many:
            self.many.pop(message[3]).judge(message, self.answers)
            return
        asked = self.demands.pop(message[3], None)
        if asked is None:
            return  # of a gate
        if message[0] == "demand_error":
            code = message[2]["code"]
            assert code == asked.outcome or code in asked.codes, (asked, message)
            self.refused = self.refused and code != "too_large"
        else:
            assert type(asked.outcome) is not str, (asked, message)
            assert asked.fits(message[2][asked.port], self.answers), (asked, message, self.answers)

    @rule(texts=st.lists(TEXTS, min_size=1, max_size=2))
    def close_and_open_another(self, texts: list[str]) -> None:
        self._close()
        self.open(texts)

    def _close(self) -> None:
        for id in [*self.demands, *self.many]:
            self._may_end(id, "cancelled")
        self._ask("close", self.session)
        self._hear(lambda: self.host.judge.settled)
        while self.calls:  # a call is let go once its node has unwound, which may be after the reply to `close`
            self.hear()
        assert not self.demands and not self.many and not self.replies, self.host.shown()

    @precondition(lambda self: len(self.made) > 3)
    @rule(how=st.sampled_from(["drain", "too long", "end of input", "kill"]), chance=st.integers(0, 9))
    def end_the_service(self, how: str, chance: int) -> None:
        """Now and then; another takes its place."""
        if chance < 9:
            return
        for id in [*self.demands, *self.many]:
            self._may_end(id, "cancelled")
            self._may_end(id, "deadline_exceeded")
        if how == "drain":
            self._ask("drain", 0)
            self._hear(lambda: self.host.judge.settled)
            assert self.host.request("demand", self.session, "text0")[2]["code"] == "draining"
        status = self._end(how)
        assert self.host.wait() == status
        self.host.__exit__()
        for open_ones in (self.demands, self.many, self.replies, self.calls, self.over):
            open_ones.clear()
        self.host = self.hosts.take()
        self.open(["a"])

    def _end(self, how: str) -> int:
        """End the service; returns the status that it must end with."""
        if how == "kill":
            self.host.process.kill()
        elif how == "too long":
            self.host.write(framed(b"")[:0] + b"\xff\xff\xff\xff")
        else:
            self.host.end()
        self.host.hear_the_end()
        return {"kill": -9, "too long": 65}.get(how, 0)

    @invariant()
    def nothing_is_broken(self) -> None:
        self.hosts.steps += 1
        assert not self.host.judge.found

    def teardown(self) -> None:
        """Let everything go on to its end: what nothing holds back any more must be completed."""
        well = False
        try:
            if not self._wrong:
                self._finish()
                well = True
        finally:
            if well:
                self.hosts.give_back(self.host)
            else:
                self.host.__exit__()

    def _finish(self) -> None:
        if not self.session:
            return
        for name in self.graph.of_kind("human-input"):
            self._give(name, "at last")
        for asked in self.demands.values():
            self.host.send(["credit", asked.id, 1000])
            if asked.stuck(self.graph, self.answers):
                asked.codes.add("cancelled")
                self._ask("cancel", asked.id)
        for id, many in self.many.items():
            if any(asked.stuck(self.graph, self.answers) for asked in many.each):
                many.codes.add("cancelled")
                self._ask("cancel", id)
        self._let(dict.fromkeys(self.turns, 1000))
        while not self.host.judge.settled:
            for id in [*self.calls]:
                self._answer_call(id, "ok")
            self._hear(lambda: bool(self.calls) or self.host.judge.settled)
        assert not self.demands and not self.many and not self.replies, self.host.shown()
        self._close()
        self.host.verdict()
        assert self.host.request("health")[2]["demands"]["open"] == 0


def test_a_service_keeps_its_promises_whatever_it_is_asked(nodes: Path) -> None:
    hosts = Hosts(nodes)
    machine = type("Machine", (ServiceMachine,), {"hosts": hosts})
    try:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=count(40, 10_000),
                stateful_step_count=count(50, 100),
                # A run that fails may do so by hanging, and the next one's timing differs: nothing to shrink by.
                phases=[Phase.generate],
            ),
        )
    finally:
        hosts.close()
        print(f"{hosts.runs} runs, {hosts.steps} steps")
