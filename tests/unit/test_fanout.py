"""Many jobs at once: the three modes, on jobs that end when the test says so; and the `map` node."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from demandport.engine.executor import Executor
from demandport.engine.fanout import FanOut, fan_out
from demandport.engine.node import DECLARED, Context, node
from demandport.engine.registry import load_specs
from demandport.engine.session import Session
from demandport.errors import BadMessage, DemandportError, NodeFailed
from demandport.nodes import BUILT_IN
from sink import Sink
from support import run_within


class Jobs:
    """Jobs that wait to be told their outcome."""

    def __init__(self) -> None:
        self.waiting: dict[int, asyncio.Future[Any]] = {}
        self.launched: list[int] = []
        self.cancelled: list[int] = []

    async def __call__(self, number: int) -> Any:
        self.launched.append(number)
        self.waiting[number] = asyncio.get_running_loop().create_future()
        try:
            return await self.waiting[number]
        except asyncio.CancelledError:
            self.cancelled.append(number)
            raise
        finally:
            del self.waiting[number]

    async def end(self, number: int, outcome: Any) -> None:
        """End a job, and let the others go on as far as they can."""
        if isinstance(outcome, Exception):
            self.waiting[number].set_exception(outcome)
        else:
            self.waiting[number].set_result(outcome)
        for _ in range(8):  # task, its callback, who waits for it, the next tasks
            await asyncio.sleep(0)


def fanned(count: int, drive: Callable[[Jobs], Awaitable[None]], **options: Any) -> tuple[FanOut, Jobs]:
    jobs, came = Jobs(), []

    async def run() -> None:
        async def fan() -> None:
            came.append(await fan_out(count, jobs, **options))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(fan)
            await anyio.wait_all_tasks_blocked()
            await drive(jobs)

    run_within(20, run())
    return came[0], jobs


def test_all_waits_for_every_job_and_keeps_failures_in_their_place() -> None:
    async def drive(jobs: Jobs) -> None:
        assert jobs.launched == [0, 1, 2]
        await jobs.end(2, "c")
        await jobs.end(0, NodeFailed("no"))
        await jobs.end(1, "b")

    came, _ = fanned(3, drive)
    assert came.done == {1: "b", 2: "c"} and [*came.failed] == [0] and came.decided is None


def test_the_limit_holds_and_the_next_one_starts_as_one_ends() -> None:
    async def drive(jobs: Jobs) -> None:
        assert jobs.launched == [0, 1]
        await jobs.end(1, "b")
        assert jobs.launched == [0, 1, 2]
        await jobs.end(0, "a")
        await jobs.end(2, "c")

    came, _ = fanned(3, drive, limit=2)
    assert came.prefix() == ["a", "b", "c"]


def test_try_launches_none_after_a_failure_and_cancels_what_runs() -> None:
    async def drive(jobs: Jobs) -> None:
        await jobs.end(0, "a")
        await jobs.end(2, NodeFailed("no"))

    came, jobs = fanned(9, drive, mode="try", limit=3)
    assert came.prefix() == ["a"] and came.decided == 2
    assert jobs.launched == [0, 1, 2, 3] and jobs.cancelled == [1, 3]


def test_race_takes_the_first_success_and_cancels_the_others() -> None:
    async def drive(jobs: Jobs) -> None:
        await jobs.end(1, NodeFailed("no"))
        await jobs.end(2, "won")

    came, jobs = fanned(3, drive, mode="race")
    assert came.done == {2: "won"} and came.decided == 2 and came.lost is None and jobs.cancelled == [0]


def test_a_race_that_nobody_wins_is_the_first_failure_that_happened() -> None:
    async def drive(jobs: Jobs) -> None:
        await jobs.end(1, NodeFailed("first"))
        await jobs.end(0, NodeFailed("second"))

    came, _ = fanned(2, drive, mode="race")
    assert came.lost is not None and came.lost.message == "first"


@pytest.mark.parametrize("mode", ["all", "try", "race"])
def test_of_no_jobs_nothing_comes(mode: str) -> None:
    came, _ = fanned(0, lambda jobs: anyio.sleep(0), mode=mode)
    assert came.prefix() == [] and came.lost is None and came.decided is None


@pytest.mark.parametrize("options", [{"limit": 0}, {"limit": -1}, {"mode": "some"}])
def test_a_wrong_option_is_said_and_runs_nothing(options: dict[str, Any]) -> None:
    jobs = Jobs()
    with pytest.raises(BadMessage, match=next(iter(options))):
        asyncio.run(fan_out(3, jobs, **options))
    assert not jobs.launched


def test_cancelled_it_cancels_its_jobs_and_waits_for_them() -> None:
    async def run() -> None:
        jobs = Jobs()
        task = asyncio.ensure_future(fan_out(3, jobs))
        await anyio.wait_all_tasks_blocked()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert jobs.cancelled == [0, 1, 2] and not jobs.waiting

    run_within(20, run())


@given(
    st.lists(st.booleans(), max_size=12),
    st.sampled_from(["all", "try", "race"]),
    st.none() | st.integers(1, 5),
    st.randoms(use_true_random=False),
)
def test_whatever_the_order_the_modes_keep_their_word(successes: list[bool], mode: Any, limit: Any, draw: Any) -> None:
    order: list[int] = []

    async def drive(jobs: Jobs) -> None:
        while jobs.waiting:
            assert limit is None or len(jobs.waiting) <= limit
            number = draw.choice(sorted(jobs.waiting))
            order.append(number)
            await jobs.end(number, number if successes[number] else NodeFailed("no"))

    came, jobs = fanned(len(successes), drive, mode=mode, limit=limit)
    assert not jobs.waiting and set(came.done) | set(came.failed) == set(order)
    deciding = [number for number in order if successes[number] == (mode == "race")]
    if mode == "all" or not deciding:
        assert came.decided is None and set(order) == set(range(len(successes)))
    else:
        assert came.decided == deciding[0] == order[-1]
    assert set(jobs.launched) == set(order) | set(jobs.cancelled)


# ------------------------------------------------------------------------------------------------ the map node


@node("f-odd")
async def odd(ctx: Context, n: int) -> int:
    """Odd numbers alone."""
    if n % 2 == 0:
        raise NodeFailed(f"{n} is even")
    return n * 10


ODD = DECLARED.pop("f-odd")  # what is declared is everybody's
SPECS = {**load_specs(BUILT_IN), "f-odd": ODD}
EDGES = [
    {"id": "1", "source": "item", "target": "join", "target_handle": "who"},
    {"id": "2", "source": "hello", "target": "join", "target_handle": "hello"},
]
GREET = {
    "nodes": [
        {"id": "item", "node_type": "text-input"},
        {"id": "hello", "node_type": "text-input", "data": {"text": "Hello"}},
        {"id": "join", "node_type": "template", "data": {"template": "{{hello}}, {{who}}!"}},
    ],
    "edges": EDGES,
}


def mapped(**data: Any) -> dict[str, Any]:
    outcome: list[Any] = []

    async def run() -> None:
        async with anyio.create_task_group() as tasks:
            sink = Sink()
            try:
                graph = {"nodes": [{"id": "m", "node_type": "map", "data": data}]}
                Session(graph, SPECS, Executor(tasks, {})).demand("m", sink, lambda _: None)
                outcome.append(await sink.result())
            except DemandportError as failed:
                outcome.append(failed)

    run_within(20, run())
    if isinstance(outcome[0], DemandportError):
        raise outcome[0]
    return outcome[0]


def test_a_graph_is_evaluated_for_each_item_in_order() -> None:
    items = ["Ada", "Bob", "Cy"]
    came = mapped(items=items, graph=GREET, input_node="item", limit=2)
    assert came == {"results": [f"Hello, {name}!" for name in items], "failure": None, "winner": None}
    assert mapped(items=[], graph=GREET, input_node="item")["results"] == []


def test_failures_stand_in_their_place_or_end_it_as_the_mode_says() -> None:
    every = mapped(items=[1, 2, 3], each="f-odd")["results"]
    assert (every[0], every[2]) == (10, 30)
    assert (every[1]["code"], every[1]["details"]["index"]) == ("node_failed", 1)
    tried = mapped(items=[1, 2, 3], each="f-odd", mode="try", limit=1)
    assert tried["results"] == [10] and tried["failure"]["index"] == 1 and "2 is even" in tried["failure"]["message"]
    raced = mapped(items=[2, 4, 5], each="f-odd", mode="race", limit=1)
    assert (raced["results"], raced["winner"]) == ([50], 2)
    with pytest.raises(NodeFailed) as lost:
        mapped(items=[2, 4], each="f-odd", mode="race", limit=1)
    assert lost.value.details == {"index": 0}


def test_items_that_fail_with_one_error_each_say_which_they_are() -> None:
    nodes = [
        {"id": "item", "node_type": "text-input"},
        {"id": "shared", "node_type": "f-odd", "data": {"n": 2}},
        {"id": "both", "node_type": "merge"},
    ]
    edges = [{"id": s, "source": s, "target": "both", "target_handle": "inputs"} for s in ("item", "shared")]
    came = mapped(items=["a", "b", "c"], graph={"nodes": nodes, "edges": edges}, input_node="item")
    assert [failed["details"]["index"] for failed in came["results"]] == [0, 1, 2]


@pytest.mark.parametrize(
    ("data", "code"),
    [
        ({"items": "[1"}, "type_mismatch"),
        ({"items": {"a": 1}, "each": "f-odd"}, "type_mismatch"),
        ({"items": [1]}, "missing_input"),
        ({"items": [1], "each": "f-odd", "graph": GREET}, "missing_input"),
        ({"items": [1], "each": "nobody"}, "unknown_node_type"),
        ({"items": [1], "each": "f-odd", "limit": 0}, "bad_message"),
        ({"items": [1], "each": "f-odd", "mode": "some"}, "bad_message"),
        ({"items": [1], "each": "f-odd", "input_port": "x"}, "unknown_port"),
        ({"items": [1], "each": "f-odd", "output": "x"}, "unknown_port"),
        ({"items": [1], "graph": GREET}, "missing_input"),
        ({"items": [1], "graph": GREET, "input_node": "nobody"}, "unknown_node"),
        ({"items": [1], "graph": {"nodes": GREET["nodes"]}, "input_node": "item"}, "missing_input"),
    ],
)
def test_what_cannot_be_mapped_says_why(data: dict[str, Any], code: str) -> None:
    with pytest.raises(DemandportError) as refused:
        mapped(**data)
    assert refused.value.code == code
