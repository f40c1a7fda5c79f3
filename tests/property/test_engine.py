"""The engine equals a plain recursive evaluator on random graphs with edits, and runs each node once."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
from hypothesis import given
from hypothesis import strategies as st

from demandport.engine.executor import Executor
from demandport.engine.registry import load_specs
from demandport.engine.session import Session
from demandport.errors import DemandportError
from demandport.nodes import BUILT_IN

SPECS = load_specs(BUILT_IN)


class Sink:
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
