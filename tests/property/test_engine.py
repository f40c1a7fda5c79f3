"""The engine equals a plain recursive evaluator on random graphs with edits, and runs each node once."""

from __future__ import annotations

import asyncio
import copy
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any

import anyio
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from demandport.engine.demand import Demand
from demandport.engine.executor import Executor
from demandport.engine.node import DECLARED, Context, node
from demandport.engine.registry import load_specs
from demandport.engine.session import Session
from demandport.errors import DemandportError, UnknownNode
from demandport.graph.spec import NodeSpec, Port
from demandport.nodes import BUILT_IN

SPECS = load_specs(BUILT_IN)
#: Turns of the loop after which whatever can happen has happened.
TURNS = 100


class Sink:
    demand: Demand

    def __init__(self) -> None:
        self.ended: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def chunk(self, node: str, port: str, value: Any) -> None: ...
    def full(self) -> bool:
        return False

    async def room(self) -> None: ...
    def event(self, event: dict[str, Any]) -> None: ...
    def complete(self, outputs: dict[str, Any], meta: dict[str, Any]) -> None:
        self.ended.set_result((outputs, meta))

    def error(self, error: DemandportError, meta: dict[str, Any]) -> None:
        self.ended.set_result((error.code, meta))


def _plain(parents: list[list[int]], texts: list[str], node: int) -> str:
    return "+".join([texts[node], *(_plain(parents, texts, parent) for parent in parents[node])])


@given(st.data())
def test_any_graph_equals_the_plain_evaluator(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 7))
    parents = [data.draw(st.lists(st.integers(0, n - 1), max_size=2)) if n else [] for n in range(size)]
    texts = [f"t{n}" for n in range(size)]
    nodes, edges = [], []
    for n in range(size):
        nodes += [
            {"id": f"t{n}", "node_type": "text-input", "data": {"text": texts[n]}},
            {"id": f"m{n}", "node_type": "merge", "data": {"separator": "+"}},
        ]
        for index, source in enumerate([f"t{n}", *(f"m{parent}" for parent in parents[n])]):
            edges.append({"id": f"{n}-{index}", "source": source, "target": f"m{n}", "target_handle": "inputs"})
    steps = data.draw(st.lists(st.tuples(st.integers(0, size - 1), st.booleans()), max_size=8))

    async def check() -> None:
        async with anyio.create_task_group() as tasks:
            session = Session({"nodes": nodes, "edges": edges}, SPECS, Executor(tasks, {}))
            for number, (node, edit) in enumerate(steps):
                if edit:
                    texts[node] = f"e{number}"
                    session.edit([{"op": "set_input", "node": f"t{node}", "port": "text", "value": texts[node]}])
                for expect_cached in (False, True):
                    sink = Sink()
                    session.demand(f"m{node}", sink, lambda _: None)
                    outputs, meta = await sink.ended
                    assert outputs["merged"] == _plain(parents, texts, node)
                    assert not expect_cached or meta["ran"] == 0

    anyio.run(check)


def test_every_built_in_node_describes_itself() -> None:
    for name, spec in SPECS.items():
        about = spec.describe()
        assert about["node_type"] == name and about["description"] and about["outputs"], name


# ------------------------------------------------------------------------------------------------ any edits

#: Ids of the nodes that may be there. Those in capitals branch: they leave one of their outputs out.
IDS, BRANCHES = "aPbQcd", "PQ"
TEXTS = st.sampled_from(["x", "y"])
PAIRS = st.tuples(st.sampled_from(IDS), st.sampled_from(IDS))
Many = Annotated[Any, Port(type="any", multiple=True)]


def shown(name: str, text: str, items: Iterable[str]) -> str:
    return f"{name}{text}({','.join(items)})"


def side(text: str) -> str:
    return "yes" if text.startswith("y") else "no"


def _declared() -> dict[str, NodeSpec]:
    """Nodes that note their runs in the ledger; the slow one waits for its gate first."""

    @node("p-step", runs="inline")
    def step(ctx: Context, items: Many = (), text: str = "-") -> str:
        ctx.resources["ledger"].note(ctx.node)
        return shown(ctx.node, text, items)

    @node("p-slow")
    async def slow(ctx: Context, items: Many = (), text: str = "-") -> str:
        await ctx.resources["ledger"].gate.wait()
        ctx.resources["ledger"].note(ctx.node)
        return shown(ctx.node, text, items)

    @node("p-branch", runs="inline", outputs={"yes": "string", "no": "string"}, branches=True)
    def branch(ctx: Context, items: Many = (), text: str = "-") -> dict[str, str]:
        ctx.resources["ledger"].note(ctx.node)
        return {side(text): shown(ctx.node, text, items)}

    # Out of the table of the process: other tests list what is in it.
    return {name: DECLARED.pop(name) for name in ("p-step", "p-slow", "p-branch")}


NOTING = _declared()


class Ledger:
    """What the nodes of a test share with it."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.gate = asyncio.Event()
        self.failing: set[str] = set()

    def note(self, name: str) -> None:
        self.ran.append(name)
        if name in self.failing:
            raise RuntimeError("as told")


class Refused(Exception):
    """An operation, or the graph that is left, breaks a rule."""


@dataclass
class Plain:
    """The reference: a graph as plain tables, evaluated anew, by recursion, for every question.

    Attributes:
        edges: id → (source, output, target, input), in order.
    """

    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    edges: dict[str, tuple[str, str, str, str]] = field(default_factory=dict)

    def edited(self, operations: list[dict[str, Any]]) -> tuple[Plain, set[str]]:
        """The graph after the operations, and which nodes they make stale."""
        after = copy.deepcopy(self)
        changed = {name for operation in operations for name in after._apply(operation)}
        after._check()
        return after, self.downstream(changed)

    def _apply(self, operation: dict[str, Any]) -> set[str]:
        op, name, edge = operation["op"], operation.get("node"), operation.get("edge")
        if edge is not None:
            if (edge["id"] in self.edges) == (op == "add_edge"):
                raise Refused
            ends = (edge["source"], edge["source_handle"], edge["target"], edge["target_handle"])
            self.edges = {key: old for key, old in self.edges.items() if key != edge["id"]}
            self.edges |= {edge["id"]: ends} if op == "add_edge" else {}
            return {edge["target"]}
        if op == "add_node":
            if name["id"] in self.data:
                raise Refused
            self.data[name["id"]] = name["data"]
            return {name["id"]}
        if name not in self.data:
            raise Refused
        if op == "remove_node":
            after = {ends[2] for ends in self.edges.values() if ends[0] == name}
            self.edges = {key: ends for key, ends in self.edges.items() if name not in (ends[0], ends[2])}
            self.inputs.pop(name, None)
            del self.data[name]
            return after | {name}
        if op == "update_node_data":
            merged = self.data[name] | operation["data"]
            self.data[name] = {key: value for key, value in merged.items() if value is not None}
        elif op == "set_input":
            self.inputs.setdefault(name, {})[operation["port"]] = operation["value"]
        elif op == "clear_input":
            given = self.inputs.get(name, {})
            if operation["port"] not in given:
                return set()
            del given[operation["port"]]
        return {name}

    def _check(self) -> None:
        ends = list(self.edges.values())
        single = Counter((target, port) for _, _, target, port in ends if port == "text")
        cyclic = any(source in self.downstream({target}) for source, _, target, _ in ends)
        if cyclic or max(single.values(), default=0) > 1 or not {n for e in ends for n in e[::2]} <= self.data.keys():
            raise Refused

    def downstream(self, names: set[str]) -> set[str]:
        found = set(names)
        while more := {ends[2] for ends in self.edges.values() if ends[0] in found} - found:
            found |= more
        return found

    def links(self, name: str, port: str | None = None) -> list[tuple[str, str]]:
        """(source, output) of the edges that count: a value set by `set_input` comes before them."""
        given = self.inputs.get(name, {})
        ends = [e for e in self.edges.values() if e[2] == name and e[3] not in given]
        return [(source, out) for source, out, _, into in ends if port in (None, into)]

    def outputs(self, name: str) -> dict[str, str]:
        """Output values by port; none when the node is skipped."""
        values: dict[str, Any] = {"items": (), "text": "-"} | self.data[name] | self.inputs.get(name, {})
        for port in values:
            arriving = [self.outputs(source).get(out) for source, out in self.links(name, port)]
            there = [value for value in arriving if value is not None]
            if arriving and not there:
                return {}
            if arriving:
                values[port] = there if port == "items" else there[0]
        return {side(values["text"]) if name in BRANCHES else "output": shown(name, values["text"], values["items"])}

    def hangs(self, name: str) -> bool:
        """Whether a value of the node may be left out."""
        return name in BRANCHES or any(self.hangs(source) for source, _ in self.links(name))

    def needed(self, name: str) -> set[str]:
        """The nodes that run for a demand when nothing is cached; a skipped one asks only what decided that."""
        there = self.outputs(name)
        sources = {source for source, _ in self.links(name) if there or self.hangs(source)}
        return {name for _ in [0] if there}.union(*map(self.needed, sources))


def a_node(name: str, kind: str, data: dict[str, Any]) -> dict[str, Any]:
    return {"id": name, "node_type": "p-branch" if name in BRANCHES else kind, "data": data}


def an_edge(source: str, target: str, branch: str = "yes", into: str = "items") -> dict[str, Any]:
    out = branch if source in BRANCHES else "output"
    ends = {"source": source, "source_handle": out, "target": target, "target_handle": into}
    return {"id": "-".join(ends.values())} | ends


def edges(ends: st.SearchStrategy[Any] = PAIRS) -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(
        lambda ends, *handles: an_edge(*ends, *handles),
        ends,
        st.sampled_from(["yes", "no"]),
        st.sampled_from(["items", "text"]),
    )


def graphs() -> st.SearchStrategy[list[dict[str, Any]]]:
    """Edges to begin with; none closes a cycle."""
    forward = PAIRS.filter(lambda ends: ends[0] != ends[1]).map(lambda ends: sorted(ends, key=IDS.index))
    return st.lists(edges(forward), min_size=3, max_size=9)


def operations(kind: str) -> st.SearchStrategy[dict[str, Any]]:
    """Any operation, also such as cannot be applied."""
    names, data = st.sampled_from(IDS), st.fixed_dictionaries({}, optional={"text": TEXTS})
    at = {"node": names}
    return st.one_of(
        st.builds(lambda n, d: {"op": "add_node", "node": a_node(n, kind, d)}, names, data),
        st.fixed_dictionaries({"op": st.just("add_edge"), "edge": edges()}),
        st.fixed_dictionaries({"op": st.just("remove_edge"), "edge": edges()}),
        st.fixed_dictionaries({"op": st.sampled_from(["remove_node", "invalidate"]), **at}),
        st.fixed_dictionaries({"op": st.just("update_node_data"), **at, "data": st.just({"text": None}) | data}),
        st.fixed_dictionaries({"op": st.just("set_input"), **at, "port": st.just("text"), "value": TEXTS}),
        st.fixed_dictionaries({"op": st.just("set_input"), **at, "port": st.just("items"), "value": st.lists(TEXTS)}),
        st.fixed_dictionaries({"op": st.just("clear_input"), **at, "port": st.sampled_from(["items", "text"])}),
    )


def batches(kind: str) -> st.SearchStrategy[list[dict[str, Any]]]:
    return st.lists(operations(kind), min_size=1, max_size=3)


class Bench:
    """A session and its reference, edited alike."""

    def __init__(self, tasks: Any, kind: str, wanted: list[dict[str, Any]], **options: Any) -> None:
        self.ledger = Ledger()
        self.executor = Executor(tasks, {"ledger": self.ledger})
        self.plain = Plain({name: {} for name in IDS})
        nodes = [a_node(name, kind, {}) for name in IDS]
        self.session = Session({"nodes": nodes, "edges": []}, NOTING, self.executor, **options)
        for edge in wanted:
            self.edit([{"op": "add_edge", "edge": edge}])

    def edit(self, batch: list[dict[str, Any]]) -> set[str]:
        """Edit both; they must agree on whether it can be done. Returns what became stale."""
        before = self.session.snapshot()
        try:
            self.plain, stale = self.plain.edited(batch)
        except Refused:
            with pytest.raises(DemandportError):
                self.session.edit(batch)
            assert self.session.snapshot() == before
            return set()
        dropped = set(self.session.edit(batch))
        assert {name for name in stale if before["states"].get(name) in ("fresh", "skipped")} <= dropped <= stale
        return stale

    def demand(self, name: str) -> Sink | None:
        if name not in self.plain.data:
            with pytest.raises(UnknownNode):
                self.session.demand(name, Sink(), lambda _: None)
            return None
        sink = Sink()
        sink.demand = self.session.demand(name, sink, lambda _: None)
        return sink


@given(graphs(), st.lists(batches("p-step") | st.sampled_from(IDS), min_size=6, max_size=20))
def test_any_edit_makes_exactly_what_depends_on_it_run_again(wanted: list[Any], steps: list[Any]) -> None:
    async def check() -> None:
        async with anyio.create_task_group() as tasks:
            bench = Bench(tasks, "p-step", wanted)
            fresh: set[str] = set()
            for step in steps:
                if isinstance(step, list):
                    fresh -= bench.edit(step)
                elif sink := bench.demand(step):
                    outputs, meta = await sink.ended
                    assert outputs == bench.plain.outputs(step)
                    assert meta.get("skipped", False) == (outputs == {})
                    assert sorted(bench.ledger.ran) == sorted(bench.plain.needed(step) - fresh)
                    fresh |= set(bench.ledger.ran)
                    bench.ledger.ran.clear()

    anyio.run(check)


CANCELS = st.builds(lambda number: ("cancel", number), st.integers(0, 9))
STEPS = st.one_of(batches("p-slow"), batches("p-slow"), *[st.sampled_from(IDS)] * 4, CANCELS, st.just("let run"))
FAILURES = st.builds(lambda name: ("toggle failing", name), st.sampled_from(IDS))
PLACES = st.sampled_from([1, 2, 9])


@given(graphs(), st.lists(STEPS, min_size=6, max_size=25), PLACES)
def test_any_timeline_gives_each_demand_the_graph_of_its_place(
    wanted: list[Any], steps: list[Any], places: int
) -> None:
    """Edits and cancels come while demands run and wait in the queue; each version of a node runs once at most."""
    anyio.run(_timeline, wanted, steps, places, False)


@example([an_edge("a", "b")], [("toggle failing", "a"), "b", "b", "let run"], 1)
@given(graphs(), st.lists(STEPS | FAILURES, min_size=6, max_size=25), PLACES)
def test_any_timeline_with_failures_ends_each_demand_once(wanted: list[Any], steps: list[Any], places: int) -> None:
    anyio.run(_timeline, wanted, steps, places, True)


async def _timeline(wanted: list[Any], steps: list[Any], places: int, failures: bool) -> None:
    async with anyio.create_task_group() as tasks:
        bench = Bench(tasks, "p-slow", wanted, max_running=places)
        demands: list[tuple[Sink, str, Plain]] = []
        versions: Counter[str] = Counter(IDS)
        for step in [*steps, "let run", *IDS, "let run"]:
            if isinstance(step, list):
                versions.update(bench.edit(step))
            elif step == "let run":
                bench.ledger.gate.set()
                await _settled()
                bench.ledger.gate.clear()
            elif step[0] == "toggle failing":
                bench.ledger.failing ^= {step[1]}
            elif step[0] == "cancel":
                for sink, _, _ in demands[step[1] :: 10]:
                    bench.session.cancel(sink.demand)
                    versions.update(IDS)  # what was let go may run again
            elif sink := bench.demand(step):
                demands.append((sink, step, bench.plain))
        for sink, name, plain in demands:
            assert sink.ended.done(), "a demand has no terminal"
            outcome, _ = sink.ended.result()
            assert outcome in (plain.outputs(name), "cancelled", "node_failed" if failures else "")
        assert failures or all(count <= versions[name] for name, count in Counter(bench.ledger.ran).items())
        assert bench.session.load == (0, 0) and bench.executor.running == 0


async def _settled() -> None:
    for _ in range(TURNS):
        await asyncio.sleep(0)
