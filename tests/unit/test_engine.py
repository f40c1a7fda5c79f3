"""The engine in process: sessions, demands and cells, with gates in test nodes that decide what happens when.

No test waits for a time to pass: a node stops at its gate until the test opens it, and where a deadline is wanted, what
it ends would never end by itself. `GUARD_S` only turns a hang into a failure.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterable, Iterator
from typing import Annotated, Any
from unittest.mock import ANY

import anyio
import anyio.abc
import pytest

from demandport.engine.executor import Executor
from demandport.engine.node import DECLARED, Context, node
from demandport.engine.registry import load_specs
from demandport.engine.session import Session
from demandport.engine.threads import Threads
from demandport.errors import DeadlineExceeded, DemandportError, QueueFull, UnknownNode, UnknownPort
from demandport.graph.spec import Port
from demandport.inference.backend import Finished, Usage
from demandport.inference.requests import GenerateRequest
from demandport.nodes import BUILT_IN

GUARD_S = 10.0
#: Turns of the loop after which whatever can happen without a gate, a thread or a timer has happened.
TURNS = 50
Many = Annotated[Any, Port(type="any", multiple=True)]
SPECS = load_specs(BUILT_IN)


# ------------------------------------------------------------------------------------------------ nodes and helpers


class Lab:
    """One executor, and what test nodes share with the test: gates by node id, and who ran when."""

    def __init__(self, tasks: anyio.abc.TaskGroup) -> None:
        self.executor = Executor(tasks, {"lab": self})
        self.started: list[str] = []
        self.unwound: list[str] = []
        self.failing: dict[str, BaseException] = {}
        self.gates: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self.locks: dict[str, threading.Event] = {}
        self.ended: list[Listener] = []
        self.feeds: defaultdict[str, asyncio.Queue[Any]] = defaultdict(asyncio.Queue)
        self.last_words: dict[str, Callable[[Context], Coroutine[Any, Any, None]]] = {}
        self.meeting: Any = None
        self.contexts: dict[str, Context] = {}
        self.listeners: list[Listener] = []
        self.sessions: list[Session] = []

    def open(self, nodes: dict[str, Any], edges: str = "", **options: Any) -> Session:
        """A session on ``{id: type or (type, data)}`` and edges as ``"a.port>b.port c>d"``."""
        self.locks |= {name: threading.Event() for name in nodes}  # here: a thread must not race to make its own
        self.sessions.append(Session(graph(nodes, edges), SPECS, self.executor, **options))
        return self.sessions[-1]

    def demand(self, session: Session, name: str, **options: Any) -> Listener:
        listener = Listener(self)
        listener.demand = session.demand(name, listener, listener.on_end, **options)
        self.listeners.append(listener)
        return listener

    def enter(self, ctx: Context, items: Iterable[Any] = (), text: str = "") -> str:
        """Note a run of a node; returns a text that tells what it read."""
        self.contexts[ctx.node] = ctx
        self.started.append(ctx.node)
        return f"{ctx.node}{text}({','.join(map(str, items))})"

    def leave(self, ctx: Context, value: str) -> str:
        """The end of a node, which fails here if the test wants it to."""
        if ctx.node in self.failing:
            raised = self.failing[ctx.node]
            raise type(raised)(*raised.args)  # each time a new one: a traceback grows with every raise
        return value

    def runs(self, *names: str) -> list[int]:
        return [self.started.count(name) for name in names]

    def open_gates(self, *names: str) -> None:
        for name in names:
            self.gates[name].set()
            self.locks.get(name, threading.Event()).set()

    def feed(self, name: str, *chunks: Any) -> None:
        """Chunks for a streaming node; a None ends it."""
        for chunk in chunks:
            self.feeds[name].put_nowait(chunk)

    async def end(self) -> None:
        """Close what is open. Every demand then has had one terminal, and nothing after it, and no run is left."""
        for session in self.sessions:
            session.close()
        self.open_gates(*self.locks)
        await until(lambda: self.executor.running == 0 and self.executor.threads.in_flight == 0)
        for listener in self.listeners:
            terminals = [heard[0] in ("complete", "error") for heard in listener.heard]
            assert listener.ends == 1 and terminals == [False] * (len(terminals) - 1) + [True]


class Listener:
    """A demand's sink, which keeps what it hears in order. Awaiting it waits for the terminal."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.demand: Any = None
        self.heard: list[tuple[Any, ...]] = []
        self.ends = 0
        self.outputs: dict[str, Any] | None = None
        self.failure: DemandportError | None = None
        self.meta: dict[str, Any] = {}
        self.roomless = False
        self._room = asyncio.Event()
        self._ended = asyncio.Event()

    def __await__(self) -> Generator[Any, None, Listener]:
        yield from self._ended.wait().__await__()
        return self

    def chunk(self, node: str, port: str, value: Any) -> None:
        self.heard.append(("chunk", node, port, value))

    def full(self) -> bool:
        return self.roomless

    async def room(self) -> None:
        await asyncio.sleep(0)
        await self._room.wait()

    def event(self, event: dict[str, Any]) -> None:
        self.heard.append(("event", event))

    def complete(self, outputs: dict[str, Any], meta: dict[str, Any]) -> None:
        self.heard.append(("complete",))
        self.outputs, self.meta = outputs, meta
        self._room.set()

    def error(self, error: DemandportError, meta: dict[str, Any]) -> None:
        self.heard.append(("error",))
        self.failure, self.meta = error, meta
        self._room.set()

    def on_end(self, _: Any) -> None:
        self.ends += 1
        self.lab.ended.append(self)
        self._ended.set()

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    @property
    def output(self) -> Any:
        assert self.failure is None, self.failure
        assert self.outputs is not None and len(self.outputs) == 1
        return next(iter(self.outputs.values()))

    @property
    def code(self) -> str:
        assert self.failure is not None, self.outputs
        return self.failure.code

    @property
    def skipped(self) -> bool:
        return self.outputs == {} and self.meta.get("skipped") is True

    def chunks(self, name: str) -> list[Any]:
        return [heard[3] for heard in self.heard if heard[:2] == ("chunk", name)]

    def text(self, name: str) -> str:
        return "".join(self.chunks(name))

    def events(self) -> list[tuple[str, str]]:
        return [(heard[1]["event"], heard[1]["node"]) for heard in self.heard if heard[0] == "event"]


def engine_test(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test on a loop of its own with a fresh `Lab`, which is closed and checked in the end."""

    async def run(arguments: dict[str, Any]) -> None:
        failure: Exception | None = None
        with anyio.fail_after(GUARD_S):
            async with anyio.create_task_group() as tasks:
                lab = Lab(tasks)
                try:
                    await test(lab, **arguments)
                    await lab.end()
                except Exception as failed:  # raised below: a task group would wrap it
                    failure = failed
                finally:
                    lab.open_gates(*lab.locks)  # threads cannot be cancelled
                    tasks.cancel_scope.cancel()
        if failure is not None:
            raise failure

    @functools.wraps(test)
    def wrapped(**arguments: Any) -> None:
        anyio.run(run, arguments)

    parameters = list(inspect.signature(test).parameters.values())[1:]
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return wrapped


def graph(nodes: dict[str, Any], edges: str = "") -> dict[str, Any]:
    return {"nodes": [node_(name, about) for name, about in nodes.items()], "edges": [edge(e) for e in edges.split()]}


def node_(name: str, about: Any) -> dict[str, Any]:
    node_type, data = (about, {}) if isinstance(about, str) else about
    return {"id": name, "node_type": node_type, "data": data}


def edge(text: str) -> dict[str, Any]:
    (source, _, out), (target, _, into) = (end.partition(".") for end in text.split(">"))
    return {"id": text, "source": source, "source_handle": out, "target": target, "target_handle": into}


def set_input(name: str, value: Any, port: str = "text") -> dict[str, Any]:
    return {"op": "set_input", "node": name, "port": port, "value": value}


async def until(condition: Callable[[], Any]) -> None:
    """Let the loop turn until the condition holds; the guard of the test limits it."""
    while not condition():
        await asyncio.sleep(0)


async def settled() -> None:
    """Let happen what can happen; for asserting that something does not."""
    for _ in range(TURNS):
        await asyncio.sleep(0)


def _declare() -> None:
    """The test nodes; those that are counted tell the lab that they run."""

    @node("t-step", runs="inline")
    def step(ctx: Context, items: Many = (), text: str = "") -> str:
        """Runs at once."""
        lab = ctx.resources["lab"]
        return lab.leave(ctx, lab.enter(ctx, items, text))

    @node("t-gate")
    async def gate(ctx: Context, items: Many = (), text: str = "") -> str:
        """Waits at its gate."""
        lab = ctx.resources["lab"]
        value = lab.enter(ctx, items, text)
        try:
            await lab.gates[ctx.node].wait()
        except asyncio.CancelledError:
            lab.unwound.append(ctx.node)
            if ctx.node in lab.last_words:
                await lab.last_words[ctx.node](ctx)
            raise
        return lab.leave(ctx, value)

    @node("t-thread")
    def thread(ctx: Context, items: Many = (), text: str = "") -> str:
        """Blocks a thread at its gate."""
        lab = ctx.resources["lab"]
        value = lab.enter(ctx, items, text)
        lab.locks[ctx.node].wait(GUARD_S)
        lab.unwound.append(ctx.node)
        return lab.leave(ctx, value)

    @node("t-stream", outputs={"output": "any"})
    async def stream(ctx: Context, items: Many = ()) -> AsyncIterator[Any]:
        """Streams what it is fed."""
        lab = ctx.resources["lab"]
        lab.enter(ctx, items)
        try:
            while (chunk := await lab.feeds[ctx.node].get()) is not None:
                yield chunk
        finally:
            lab.unwound.append(ctx.node)

    @node("t-thread-stream", outputs={"output": "string"})
    def thread_stream(ctx: Context, chunks: list[Any] = [], held: int = 0) -> Iterator[str]:  # noqa: B006 - read only
        """Streams from a thread; waits at its gate after so many chunks."""
        lab = ctx.resources["lab"]
        lab.enter(ctx)
        for index, chunk in enumerate(chunks):
            if index == held:
                lab.locks[ctx.node].wait(GUARD_S)
            yield chunk

    @node("t-meet")
    async def meet(ctx: Context) -> str:
        """Waits for the others of the lab's meeting."""
        await ctx.resources["lab"].meeting.wait()
        return ctx.node

    @node("t-thread-meet")
    def thread_meet(ctx: Context) -> str:
        """Waits in a thread for the others of the lab's meeting."""
        ctx.resources["lab"].meeting.wait(GUARD_S / 2)
        return ctx.node

    @node("t-ask")
    async def ask(ctx: Context, number: int = 0, times: int = 1) -> list[Any]:
        """Waits for numbers."""
        return [await ctx.wait_input("number") for _ in range(times)]

    @node("t-value", runs="inline")
    def value(text: str = "default", parsed: Annotated[Any, Port(type="json")] = None, **more: Any) -> dict[str, Any]:
        """What arrived at its ports."""
        return {"text": text, "parsed": parsed, **more}

    for spec in (step, gate, thread, stream, thread_stream, meet, thread_meet, ask, value):
        found = spec.node_spec
        SPECS[found.node_type] = found
        del DECLARED[found.node_type]  # other tests list what is declared in this process


_declare()


# ------------------------------------------------------------------------------------------------ branches

FORK = {
    "cond": ("boolean-input", {"value": True}), "fork": "conditional",
    "only_yes": "t-step", "only_no": "t-step", "yes": "t-step", "no": "t-step", "all": "t-step",
}  # fmt: skip
#: A port that takes one more edge.
EXTRA = {"t-step": "items", "t-value": "extra"}
FORK_EDGES = (
    "cond>fork.condition in>fork.value fork.true_out>yes.text fork.false_out>no.text only_yes>yes only_no>no "
    "yes>all no>all"
)


@pytest.mark.parametrize("kind", ["t-step", "t-gate", "t-thread"])
@pytest.mark.parametrize(("taken", "side"), [(True, "yes"), (False, "no")])
@engine_test
async def test_only_the_branch_taken_runs(lab: Lab, kind: str, taken: bool, side: str) -> None:
    session = lab.open(FORK | {"in": kind, "only_yes": kind, "only_no": kind}, FORK_EDGES)
    session.edit([set_input("cond", taken, "value")])
    lab.open_gates("in", "only_yes", "only_no")
    found = await lab.demand(session, "all")
    assert found.output == f"all({side}in()(only_{side}()))"
    assert sorted(lab.started) == sorted(["in", side, f"only_{side}", "all"])


@engine_test
async def test_nothing_of_either_branch_runs_before_the_condition_is_known(lab: Lab) -> None:
    session = lab.open(FORK | {"in": "t-gate"}, FORK_EDGES)
    demand = lab.demand(session, "all")
    await settled()
    assert lab.started == ["in"]
    lab.open_gates("in")
    assert (await demand).output == "all(yesin()(only_yes()))"


@engine_test
async def test_a_demand_behind_the_other_branch_is_complete_and_skipped(lab: Lab) -> None:
    session = lab.open(FORK | {"in": "t-step", "n1": "t-step", "n2": "t-gate"}, f"{FORK_EDGES} no>n1.text n1>n2.text")
    first, second = await lab.demand(session, "n2", events=True), await lab.demand(session, "n2")
    assert first.skipped and second.skipped
    assert lab.started == ["in"] and (second.meta["ran"], second.meta["cached"]) == (0, 1)
    assert [heard[1] for heard in first.heard if heard[0] == "event" and heard[1].get("skipped")][-1]["node"] == "n2"
    for name in ("no", "n1", "n2"):
        assert session.output(name, "output") == {"status": "skipped", "value": None}
        assert session.snapshot()["states"][name] == "skipped"
    assert session.output("fork", "false_out")["status"] == "skipped"
    assert session.output("fork", "true_out") == {"status": "fresh", "value": "in()"}
    assert (await lab.demand(session, "fork")).outputs == {"true_out": "in()"}


@pytest.mark.parametrize(
    ("edges", "expected"),
    [
        ("yes>end no>end", "end(yesin()())"),
        ("no>end yes>end other>end", "end(yesin()(),other())"),
        ("no>end other>end", "end(other())"),
        ("no>end fork.false_out>end", None),
        ("no>end.text other>end", None),
        ("yes>end.text other>end", "endyesin()()(other())"),
        ("yes>end no>end.text", None),
        ("yes>end.text no>end other>end", "endyesin()()(other())"),
        ("yes>end.text no>end", None),
    ],
)
@pytest.mark.parametrize("kind", ["t-step", "t-gate"])
@engine_test
async def test_taken_and_untaken_sides_meet(lab: Lab, edges: str, expected: str | None, kind: str) -> None:
    """A port for many leaves out what was not taken; one for a single value is skipped with it, its others unasked."""
    nodes = {name: FORK[name] for name in ("cond", "fork", "yes", "no")} | {"in": kind, "other": kind, "end": "t-step"}
    joins = "cond>fork.condition in>fork.value fork.true_out>yes.text fork.false_out>no.text"
    session = lab.open(nodes, f"{joins} {edges}")
    lab.open_gates("in", "other")
    found = await lab.demand(session, "end")
    assert found.skipped if expected is None else found.output == expected
    assert lab.runs("no", "end", "other") == [0, int(expected is not None), int("other" in (expected or ""))]


@engine_test
async def test_the_condition_may_change(lab: Lab) -> None:
    session = lab.open(FORK | {"in": "t-step"}, FORK_EDGES)
    for taken, side in [(True, "yes"), (False, "no"), (True, "yes")]:
        session.edit([set_input("cond", taken, "value")])
        assert (await lab.demand(session, "all")).output == f"all({side}in()(only_{side}()))"
    assert lab.runs("in", "only_yes", "only_no", "yes", "no") == [1, 1, 1, 2, 1]


@engine_test
async def test_a_demand_does_not_hear_what_hangs_on_the_other_branch(lab: Lab) -> None:
    """The demand turned out not to need the stream; that another one wants it is none of its business."""
    nodes = {name: FORK[name] for name in ("cond", "fork", "no")} | {"in": "t-gate", "stream": "t-stream"}
    session = lab.open(
        nodes | {"slow": "t-gate", "end": "t-step"},
        "cond>fork.condition in>fork.value fork.false_out>no.text stream>no no>end slow>end",
    )
    whole = lab.demand(session, "end")
    lab.open_gates("in")
    await until(lambda: session.snapshot()["states"]["no"] == "skipped")
    other = lab.demand(session, "stream")
    lab.feed("stream", "a", None)
    assert (await other).text("stream") == "a"
    lab.open_gates("slow")
    assert (await whole).output == "end(slow())"
    assert whole.chunks("stream") == []


@pytest.mark.parametrize("events", [False, True])
@pytest.mark.parametrize("kind", ["t-step", "t-value"])
@engine_test
async def test_what_a_branch_asks_for_is_heard_from_its_start(lab: Lab, events: bool, kind: str) -> None:
    """Another demand had the stream run already when the branch was taken."""
    nodes = {name: FORK[name] for name in ("cond", "fork")} | {"in": "t-gate", "s": "t-stream", "yes": kind}
    session = lab.open(
        nodes | {"end": "t-step"},
        f"cond>fork.condition in>fork.value fork.true_out>yes.text s>yes.{EXTRA[kind]} yes>end",
    )
    other, demand = lab.demand(session, "s"), lab.demand(session, "end", events=events)
    lab.feed("s", "one ", "two ")
    await until(lambda: len(other.chunks("s")) == 2)
    assert demand.chunks("s") == []
    lab.open_gates("in")
    await settled()
    assert demand.chunks("s") == ["one two "]
    lab.feed("s", "three", None)
    assert "one two three" in (await demand).output
    assert demand.chunks("s") == ["one two ", "three"]
    assert (("task_completed", "s") in demand.events()) == events


# ------------------------------------------------------------------------------------------------ single flight


@pytest.mark.parametrize("kind", ["t-gate", "t-thread"])
@engine_test
async def test_demands_in_flight_share_one_run(lab: Lab, kind: str) -> None:
    session = lab.open({"a": kind, "b": kind, "c": "t-step", "d": "t-step"}, "a>b a>c b>d c>d")
    demands = [lab.demand(session, name) for name in ("a", "a", "b", "d", "d")]
    await until(lambda: lab.started)
    demands.append(lab.demand(session, "d"))
    lab.open_gates("a", "b")
    assert [(await demand).output for demand in demands] == ["a()", "a()", "b(a())", *["d(b(a()),c(a()))"] * 3]
    assert lab.runs("a", "b", "c", "d") == [1, 1, 1, 1]


@pytest.mark.parametrize("through", ["s", "end"])
@pytest.mark.parametrize("before", [0, 1, 3])
@engine_test
async def test_who_joins_a_stream_late_hears_all_of_it(lab: Lab, before: int, through: str) -> None:
    session = lab.open({"s": "t-stream", "end": "t-step"}, "s>end")
    chunks = ["one ", "two ", "three ", "four"]
    first = lab.demand(session, "s")
    lab.feed("s", *chunks[:before])
    await until(lambda: len(first.chunks("s")) == before)
    late = lab.demand(session, through)
    lab.feed("s", *chunks[before:], None)
    assert (await first).output == first.text("s") == "".join(chunks)
    assert (await late).text("s") == "".join(chunks)
    assert late.output in ("one two three four", "end(one two three four)")
    assert lab.runs("s") == [1]
    after = await lab.demand(session, "s")
    assert after.output == "".join(chunks) and after.chunks("s") == []


@engine_test
async def test_who_joins_a_stream_of_maps_hears_each(lab: Lab) -> None:
    session = lab.open({"s": "t-stream"})
    first = lab.demand(session, "s")
    lab.feed("s", {"n": 0}, {"n": 1})
    await until(lambda: len(first.chunks("s")) == 2)
    late = lab.demand(session, "s")
    lab.feed("s", {"n": 2}, None)
    assert (await first).chunks("s") == (await late).chunks("s") == late.output == [{"n": 0}, {"n": 1}, {"n": 2}]


@engine_test
async def test_who_joins_a_stream_from_a_thread_hears_all_of_it(lab: Lab) -> None:
    session = lab.open({"s": ("t-thread-stream", {"chunks": ["a", "b", "c"], "held": 2})})
    first = lab.demand(session, "s")
    await until(lambda: len(first.chunks("s")) == 2)
    late = lab.demand(session, "s")
    assert late.chunks("s") == ["ab"]
    lab.open_gates("s")
    assert (await late).text("s") == (await first).text("s") == late.output == "abc"
    assert lab.runs("s") == [1]


@engine_test
async def test_a_consumer_with_no_room_holds_up_maps_and_not_text(lab: Lab) -> None:
    session = lab.open({"s": "t-stream", "t": "t-stream"})
    maps, text = lab.demand(session, "s"), lab.demand(session, "t")
    maps.roomless = text.roomless = True
    lab.feed("s", {"n": 0}, {"n": 1}, None)
    lab.feed("t", "a", "b", None)
    assert (await text).text("t") == "ab"
    await settled()
    assert maps.chunks("s") == [{"n": 0}]
    other = lab.demand(session, "s")
    session.cancel(maps.demand)  # who left has no say any more
    assert (await other).output == [{"n": 0}, {"n": 1}]


@engine_test
async def test_a_producer_that_is_held_up_can_be_cancelled(lab: Lab) -> None:
    session = lab.open({"s": "t-stream"})
    demand = lab.demand(session, "s")
    demand.roomless = True
    lab.feed("s", {"n": 0}, {"n": 1}, None)
    await settled()
    session.cancel(demand.demand)
    await until(lambda: lab.unwound == ["s"])
    assert demand.chunks("s") == [{"n": 0}]


# ------------------------------------------------------------------------------------------------ failures


@pytest.mark.parametrize("kind", ["t-step", "t-gate", "t-thread"])
@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (RuntimeError("no"), "node_failed"),
        (StopIteration("no"), "node_failed"),
        (SystemExit("no"), "node_failed"),
        (asyncio.CancelledError("no"), "node_failed"),
        (QueueFull("no"), "queue_full"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
@engine_test
async def test_a_failure_is_not_kept_and_what_came_before_is(
    lab: Lab, kind: str, raised: BaseException, code: str
) -> None:
    session = lab.open({"a": "t-step", "bad": kind, "end": "t-step"}, "a>bad bad>end")
    lab.open_gates("bad")
    lab.failing["bad"] = raised
    both = (
        [lab.demand(session, "end"), lab.demand(session, "bad")] if kind == "t-gate" else [lab.demand(session, "end")]
    )
    for failed in both:
        await failed
        assert (failed.code, failed.failure.node) == (code, "bad")
    assert session.snapshot()["states"] == {"a": "fresh", "bad": "stale", "end": "stale"}
    assert session.output("bad", "output")["status"] == "absent"
    assert (await lab.demand(session, "bad")).code == code
    assert lab.runs("a", "bad", "end") == [1, 2, 0]
    lab.failing.clear()
    assert (await lab.demand(session, "end")).output == "end(bad(a()))"
    assert lab.runs("a", "bad", "end") == [1, 3, 1]


@pytest.mark.parametrize("wanted", [False, True])
@engine_test
async def test_a_failure_lets_go_what_only_it_kept_wanted(lab: Lab, wanted: bool) -> None:
    session = lab.open({"bad": "t-gate", "slow": "t-gate", "end": "t-step"}, "bad>end slow>end")
    lab.failing["bad"] = RuntimeError("no")
    end = lab.demand(session, "end")
    slow = lab.demand(session, "slow") if wanted else None
    await until(lambda: len(lab.started) == 2)
    lab.open_gates("bad")
    assert (await end).code == "node_failed"
    await settled()
    assert lab.unwound == ([] if wanted else ["slow"])
    lab.open_gates("slow")
    assert slow is None or (await slow).output == "slow()"


@pytest.mark.parametrize(
    ("again", "expected"),
    [
        ("bad", "bad()"),
        ("end", "end(bad())"),
        ("beyond", "beyond(end(bad()))"),
    ],
)
@engine_test
async def test_a_demand_that_queued_behind_a_failure_tries_again(lab: Lab, again: str, expected: str) -> None:
    session = lab.open({"bad": "t-gate", "end": "t-step", "beyond": "t-step"}, "bad>end end>beyond", max_running=1)
    lab.failing["bad"] = RuntimeError("no")
    first, second = lab.demand(session, "end"), lab.demand(session, again)
    await until(lambda: lab.started)
    lab.open_gates("bad")
    assert (await first).code == "node_failed"
    lab.failing.clear()
    await settled()
    assert second.ended and second.output == expected


# ------------------------------------------------------------------------------------------------ cancel


@pytest.mark.parametrize("kind", ["t-gate", "t-thread"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (2, 0, 1)], ids=str)
@pytest.mark.parametrize("last_stays", [True, False])
@engine_test
async def test_only_the_last_to_leave_cancels(
    lab: Lab, kind: str, order: tuple[int, int, int], last_stays: bool
) -> None:
    session = lab.open({"a": kind, "b": "t-step", "c": "t-step"}, "a>b b>c")
    demands = [lab.demand(session, name) for name in ("a", "a", "c")]
    await until(lambda: lab.started)
    for index in order[:2]:
        session.cancel(demands[index].demand)
        assert demands[index].code == "cancelled"
        await settled()
        assert lab.unwound == [] and not lab.contexts["a"].cancelled and not demands[order[2]].ended
    if last_stays:
        lab.open_gates("a")
        assert (await demands[order[2]]).output in ("a()", "c(b(a()))")
        assert lab.runs("a") == [1]
    else:
        session.cancel(demands[order[2]].demand)
        assert lab.contexts["a"].cancelled
        lab.open_gates("a")
        await until(lambda: lab.unwound)
        assert lab.runs("b") == [0] and session.snapshot()["states"]["a"] == "stale" and session.load == (0, 0)


@engine_test
async def test_a_cancelled_demand_lets_go_only_what_nobody_else_wants(lab: Lab) -> None:
    session = lab.open({"a": "t-gate", "b": "t-gate", "end": "t-step"}, "a>end b>end")
    end, a = lab.demand(session, "end"), lab.demand(session, "a")
    await until(lambda: len(lab.started) == 2)
    session.cancel(end.demand)
    await settled()
    assert lab.unwound == ["b"] and not a.ended
    again = lab.demand(session, "end")
    lab.open_gates("a", "b")
    assert (await again).output == "end(a(),b())" and (await a).output == "a()"
    assert lab.runs("a", "b") == [1, 2]


@pytest.mark.parametrize("kind", ["t-gate", "t-thread"])
@engine_test
async def test_who_comes_at_once_after_a_cancel_gets_a_run_of_its_own(lab: Lab, kind: str) -> None:
    session = lab.open({"a": kind})
    first = lab.demand(session, "a")
    await until(lambda: lab.started)
    session.cancel(first.demand)
    second = lab.demand(session, "a")
    await until(lambda: lab.runs("a") == [2])
    session.cancel(first.demand)  # again: it has no say any more
    lab.open_gates("a")
    assert (await second).output == "a()" and first.code == "cancelled"
    assert (await lab.demand(session, "a")).meta["cached"] == 1


@engine_test
async def test_what_a_cancelled_run_still_streams_is_dropped(lab: Lab) -> None:
    session = lab.open({"a": "t-gate"})
    lab.last_words["a"] = lambda ctx: ctx.emit("late")
    first = lab.demand(session, "a")
    await until(lambda: lab.started)
    session.cancel(first.demand)
    second = lab.demand(session, "a")
    await until(lambda: lab.runs("a") == [2] and lab.unwound)
    lab.open_gates("a")
    assert (await second).output == "a()"
    assert second.chunks("a") == []


@pytest.mark.parametrize("raised", [ValueError("clean-up failed"), SystemExit(3)], ids=repr)
@engine_test
async def test_a_node_that_fails_while_it_is_cancelled_ends_nothing_else(lab: Lab, raised: BaseException) -> None:
    async def fail(_: Context) -> None:
        raise raised

    session = lab.open({"a": "t-gate", "other": "t-gate"})
    lab.last_words["a"] = fail
    first, other = lab.demand(session, "a"), lab.demand(session, "other")
    await until(lambda: len(lab.started) == 2)
    session.cancel(first.demand)
    await until(lambda: lab.unwound)
    await settled()
    lab.open_gates("other")
    assert (await other).output == "other()" and lab.executor.running == 0


@pytest.mark.parametrize("failing", [False, True])
@engine_test
async def test_a_cancel_may_meet_the_end_of_the_run(lab: Lab, failing: bool) -> None:
    """The gate opens and the demand is cancelled in one turn: the task wakes up to an outcome, and to a cancel."""
    session = lab.open({"a": "t-gate", "other": "t-gate"})
    if failing:
        lab.failing["a"] = ValueError("no")
    first, other = lab.demand(session, "a"), lab.demand(session, "other")
    await until(lambda: len(lab.started) == 2)
    lab.open_gates("a")
    session.cancel(first.demand)
    await settled()
    lab.open_gates("other")
    assert first.code == "cancelled" and (await other).output == "other()"


@engine_test
async def test_close_ends_every_demand(lab: Lab) -> None:
    session = lab.open({"a": "t-gate", "b": "t-thread"}, max_running=2)
    demands = [lab.demand(session, name) for name in ("a", "b", "a", "b")]
    session.close()
    assert [demand.code for demand in demands] == ["cancelled"] * 4 and session.load == (0, 0)
    await until(lambda: lab.executor.running == 0)


# ------------------------------------------------------------------------------------------------ deadlines


@pytest.mark.parametrize("kind", ["t-gate", "t-thread", "t-stream", "t-ask"])
@engine_test
async def test_a_deadline_ends_a_running_demand_and_no_other(lab: Lab, kind: str) -> None:
    session = lab.open({"a": kind, "end": "t-step"}, "a>end")
    patient, hasty = lab.demand(session, "end"), lab.demand(session, "end", deadline_ms=1)
    assert ((await hasty).code, hasty.failure.node) == ("deadline_exceeded", "end")
    assert not patient.ended and session.load == (1, 0)
    lab.open_gates("a")
    lab.feed("a", "x", None)
    session.edit([set_input("a", 7, "number")] if kind == "t-ask" else [])
    await patient
    assert patient.failure is None


@engine_test
async def test_a_deadline_cancels_what_nobody_else_wants(lab: Lab) -> None:
    session = lab.open({"a": "t-gate", "end": "t-step"}, "a>end")
    assert (await lab.demand(session, "end", deadline_ms=1)).code == "deadline_exceeded"
    await settled()
    assert lab.unwound == lab.started and session.load == (0, 0)


@engine_test
async def test_a_demand_that_waited_for_a_place_says_how_long_and_others_do_not(lab: Lab) -> None:
    session = lab.open({"a": "t-gate", "b": "t-step"}, max_running=1)
    running, waiting = lab.demand(session, "a"), lab.demand(session, "b")
    late, cancelled = lab.demand(session, "b", deadline_ms=20), lab.demand(session, "b")
    await late
    assert late.meta["queued_us"] == late.meta["duration_us"] > 0
    session.cancel(cancelled.demand)
    assert cancelled.meta["queued_us"] == cancelled.meta["duration_us"]
    lab.open_gates("a")
    await waiting
    assert late.meta["queued_us"] <= waiting.meta["queued_us"] <= waiting.meta["duration_us"]
    at_once = lab.demand(session, "a")
    await at_once
    assert "queued_us" not in {**running.meta, **at_once.meta}


@engine_test
async def test_a_deadline_holds_in_the_queue(lab: Lab) -> None:
    session = lab.open({"a": "t-gate", "b": "t-step"}, max_running=1)
    running = lab.demand(session, "a")
    queued, behind = lab.demand(session, "b", deadline_ms=1), lab.demand(session, "b")
    assert (await queued).code == "deadline_exceeded" and queued.meta["ran"] == 0
    assert lab.runs("b") == [0] and session.load == (1, 1) and not running.ended
    lab.open_gates("a")
    assert (await behind).output == "b()"


@engine_test
async def test_a_node_knows_the_latest_deadline_of_those_who_want_it(lab: Lab) -> None:
    session = lab.open({"a": "t-gate", "end": "t-step"}, "a>end")
    soon = lab.demand(session, "a", deadline_ms=50_000)
    late = lab.demand(session, "end", deadline_ms=90_000)
    await until(lambda: lab.started)
    context = lab.contexts["a"]
    assert context.deadline == late.demand.deadline > soon.demand.deadline
    assert 0 < context.remaining_s <= 90
    never = lab.demand(session, "end")
    assert context.deadline is None and context.remaining_s is None
    session.cancel(never.demand)
    session.cancel(late.demand)
    assert context.deadline == soon.demand.deadline


class Model:
    """A gateway whose model keeps the deadline of its request, as a worker does; it passes when the gate opens."""

    def __init__(self) -> None:
        self.asked, self.gate = False, asyncio.Event()

    async def generate(self, request: GenerateRequest, *_: Any, **__: Any) -> AsyncIterator[Finished]:
        self.asked = True
        await self.gate.wait()
        if request.deadline_ms is not None:
            raise DeadlineExceeded("the deadline of the request has passed")
        yield Finished("stop", Usage(1, 1), 0)


@engine_test
async def test_the_deadline_of_one_demand_does_not_end_a_model_that_another_waits_for(lab: Lab) -> None:
    model = lab.executor.resources["gateway"] = Model()
    session = lab.open({"m": ("llamacpp-inference", {"prompt": "Tell", "model_path": "tiny"})})
    hasty = lab.demand(session, "m", deadline_ms=60_000)
    await until(lambda: model.asked)
    patient = lab.demand(session, "m")
    session.cancel(hasty.demand)
    model.gate.set()
    await patient
    assert patient.failure is None


# ------------------------------------------------------------------------------------------------ the queue


@engine_test
async def test_one_at_a_time_is_a_strict_queue(lab: Lab) -> None:
    names = ["a", "b", "c", "d"]
    session = lab.open({name: "t-gate" for name in names} | {"cached": "t-step"}, max_running=1)
    await lab.demand(session, "cached")
    lab.started.clear()
    lab.open_gates("b", "d")  # ready at once, and yet in turn
    demands = {name: lab.demand(session, name) for name in [*names[:2], "cached", *names[2:]]}
    await settled()
    assert lab.started == ["a"] and session.load == (1, 4) and not demands["cached"].ended
    lab.open_gates("a")
    await demands["cached"]
    await settled()
    assert lab.started == ["a", "b", "c"] and not demands["c"].ended
    lab.open_gates("c")
    await demands["d"]
    assert lab.ended[1:] == list(demands.values())


@engine_test
async def test_of_those_in_the_queue_the_highest_priority_starts_first(lab: Lab) -> None:
    session = lab.open({"a": "t-gate", "b": "t-step"}, max_running=1)
    running = lab.demand(session, "a", priority=-100)
    queued = [lab.demand(session, "b", priority=priority) for priority in (0, 5, -3, 5, 0, 9, 9)]
    session.cancel(queued.pop().demand)
    assert session.load == (1, 6)
    lab.open_gates("a")
    await queued[2]
    assert lab.ended[1:] == [running, *(queued[index] for index in (5, 1, 3, 0, 4, 2))]


@pytest.mark.parametrize("ending", ["cancel", "deadline"])
@pytest.mark.parametrize("following", ["a", "end", "beyond", "other"])
@engine_test
async def test_the_next_in_the_queue_starts_when_one_is_ended_early(lab: Lab, ending: str, following: str) -> None:
    """Also where both want the same node: it is then not let go."""
    nodes = {"a": "t-gate", "end": "t-step", "beyond": "t-step", "other": "t-gate"}
    session = lab.open(nodes, "a>end end>beyond", max_running=1)
    first = lab.demand(session, "end", deadline_ms=1 if ending == "deadline" else None)
    second = lab.demand(session, following)
    await until(lambda: lab.started)
    if ending == "cancel":
        session.cancel(first.demand)
    await first
    await settled()
    assert session.load == (1, 0) and lab.unwound == (["a"] if following == "other" else [])
    lab.open_gates("a", "other")
    assert (await second).output == {"end": "end(a())", "beyond": "beyond(end(a()))"}.get(following, f"{following}()")


@engine_test
async def test_a_cached_demand_takes_no_place_while_there_is_one(lab: Lab) -> None:
    session = lab.open({"a": "t-gate", "cached": "t-step"}, max_running=2)
    await lab.demand(session, "cached")
    lab.demand(session, "a")
    assert lab.demand(session, "cached").ended and session.load == (1, 0)


@pytest.mark.parametrize(("max_running", "max_queued"), [(1, 0), (1, 2), (3, 1)])
@engine_test
async def test_past_the_limit_a_demand_is_refused_at_once(lab: Lab, max_running: int, max_queued: int) -> None:
    session = lab.open({"a": "t-gate", "b": "t-step"}, max_running=max_running, max_queued=max_queued)
    accepted = [lab.demand(session, "a") for _ in range(max_running + max_queued)]
    assert session.load == (max_running, max_queued)
    with pytest.raises(QueueFull):
        lab.demand(session, "b")
    session.cancel(accepted[-1].demand)
    replaced = lab.demand(session, "b")
    lab.open_gates("a")
    assert (await replaced).output == "b()"
    assert [(await demand).output for demand in accepted[:-1]] == ["a()"] * (len(accepted) - 1)


@pytest.mark.parametrize("ending", ["complete", "cached", "fail", "cancel", "close"])
@engine_test
async def test_thousands_may_queue(lab: Lab, ending: str) -> None:
    """Each that ends starts the next; were that a call within a call, the stack would not do."""
    count = 3000
    session = lab.open({"a": "t-gate"} | {f"n{n}": "t-step" for n in range(count)}, max_running=1)
    running = lab.demand(session, "a")
    if ending == "fail":
        lab.failing["n0"] = RuntimeError("no")
    queued = [lab.demand(session, f"n{n if ending == 'complete' else 0}") for n in range(count)]
    if ending == "close":
        session.close()
    elif ending == "cancel":
        for demand in reversed(queued):
            session.cancel(demand.demand)
    lab.open_gates("a")
    await running
    await until(lambda: len(lab.ended) == count + 1)
    ends = {"complete": None, "cached": None, "fail": "node_failed"}.get(ending, "cancelled")
    assert {demand.failure and demand.failure.code for demand in queued} == {ends}
    assert len(lab.started) == {"complete": count + 1, "cached": 2, "fail": count + 1, "cancel": 1, "close": 0}[ending]
    if ending not in ("close", "cancel"):
        assert lab.ended == [running, *queued]
    assert session.load == (0, 0)


@engine_test
async def test_a_long_chain_lets_the_loop_turn_and_can_be_cancelled(lab: Lab) -> None:
    count = 5000
    links = " ".join(f"n{n}>n{n + 1}.extra" for n in range(count - 1))
    session = lab.open({f"n{n}": "t-value" for n in range(count)}, links)
    first = lab.demand(session, "n4999")
    assert not first.ended
    session.cancel(first.demand)
    await settled()
    reached = sum(state == "fresh" for state in session.snapshot()["states"].values())
    assert 0 < reached < count
    assert (await lab.demand(session, "n4999")).meta == {"duration_us": ANY, "ran": count - reached, "cached": 1}


@engine_test
async def test_a_chain_of_thousands_is_evaluated_and_skipped_and_failed(lab: Lab) -> None:
    count = 3000
    nodes = {f"n{n}": "t-value" for n in range(count)} | {"cond": "boolean-input", "fork": "conditional"}
    links = " ".join(f"n{n}>n{n + 1}.extra" for n in range(count - 1))
    session = lab.open(nodes | {"in": "t-step"}, f"cond>fork.condition in>fork.value fork.true_out>n0.extra {links}")
    last = f"n{count - 1}"
    assert (await lab.demand(session, last)).skipped
    session.edit([set_input("cond", True, "value")])
    assert (await lab.demand(session, last)).meta["ran"] == count + 2
    session.edit([{"op": "invalidate", "node": "in"}])
    lab.failing["in"] = RuntimeError("no")
    assert (await lab.demand(session, last)).failure.node == "in"


# ------------------------------------------------------------------------------------------------ snapshots and edits

LINE = {"a": ("t-step", {"text": "1"}), "g": "t-gate", "z": "t-step"}
EDITS: list[tuple[list[dict[str, Any]], str, list[int]]] = [
    ([set_input("a", "2")], "z(g(a2()))", [2, 2, 2]),
    ([{"op": "update_node_data", "node": "a", "data": {"text": "3"}}], "z(g(a3()))", [2, 2, 2]),
    ([{"op": "invalidate", "node": "a"}], "z(g(a1()))", [2, 2, 2]),
    ([set_input("z", "!")], "z!(g(a1()))", [1, 1, 2]),
    ([{"op": "remove_edge", "edge": "a>g"}], "z(g())", [1, 2, 2]),
    ([{"op": "remove_node", "node": "a"}], "z(g())", [1, 2, 2]),
    ([{"op": "add_edge", "edge": edge("a>z")}], "z(g(a1()),a1())", [1, 1, 2]),
    (
        [{"op": "add_node", "node": node_("new", "t-step")}, {"op": "add_edge", "edge": edge("new>g")}],
        "z(g(a1(),new()))",
        [1, 2, 2],
    ),
    ([{"op": "remove_node", "node": "g"}, {"op": "add_edge", "edge": edge("a>z")}], "z(a1())", [1, 1, 2]),
]


@pytest.mark.parametrize(("operations", "after", "runs"), EDITS, ids=lambda value: value if type(value) is str else "")
@pytest.mark.parametrize("queued", [False, True])
@engine_test
async def test_a_demand_sees_the_graph_of_its_place_in_the_timeline(
    lab: Lab, operations: list[dict[str, Any]], after: str, runs: list[int], queued: bool
) -> None:
    session = lab.open(LINE | {"block": "t-gate"}, "a>g g>z", max_running=1 if queued else 9)
    lab.demand(session, "block")
    before = lab.demand(session, "z")
    if not queued:
        await until(lambda: lab.runs("g") == [1])
    session.edit(operations)
    later = lab.demand(session, "z")
    await settled()
    assert not before.ended
    lab.open_gates("g", "block")
    assert (await before).output == "z(g(a1()))"
    assert (await later).output == after
    assert lab.runs("a", "g", "z") == runs


@pytest.mark.parametrize("queued", [False, True])
@engine_test
async def test_a_demand_outlives_its_node(lab: Lab, queued: bool) -> None:
    session = lab.open(LINE | {"block": "t-gate"}, "a>g g>z", max_running=1 if queued else 9)
    lab.demand(session, "block")
    demand = lab.demand(session, "z")
    session.edit([{"op": "remove_node", "node": name} for name in LINE])
    with pytest.raises(UnknownNode):
        lab.demand(session, "z")
    lab.open_gates("g", "block")
    assert (await demand).output == "z(g(a1()))"
    assert session.snapshot()["states"] == {"block": "fresh"}


DIAMOND = {name: "t-step" for name in "abcde"}
RERUNS: list[tuple[dict[str, Any], str]] = [
    (set_input("a", "x"), "abcd"),
    (set_input("b", "x"), "bd"),
    (set_input("e", "x"), "e"),
    ({"op": "clear_input", "node": "c", "port": "text"}, ""),  # nothing was set
    ({"op": "update_node_data", "node": "c", "data": {"note": "x"}}, "cd"),
    ({"op": "invalidate", "node": "d"}, "d"),
    ({"op": "remove_edge", "edge": "a>c"}, "cd"),
    ({"op": "remove_edge", "edge": "c>d"}, "d"),
    ({"op": "add_edge", "edge": edge("e>b")}, "bd"),
    ({"op": "add_edge", "edge": edge("d>e")}, "e"),
    ({"op": "add_node", "node": node_("f", "t-step")}, ""),
    ({"op": "remove_node", "node": "b"}, "d"),
]


@pytest.mark.parametrize(("operation", "reruns"), RERUNS)
@engine_test
async def test_an_edit_makes_exactly_what_depends_on_it_stale(lab: Lab, operation: dict[str, Any], reruns: str) -> None:
    session = lab.open(DIAMOND, "a>b a>c b>d c>d")
    for name in "de":
        await lab.demand(session, name)
    lab.started.clear()
    stale = session.edit([operation])
    assert sorted(stale) == sorted({*reruns, *([operation["node"]] if operation["op"] == "remove_node" else [])})
    states = session.snapshot()["states"]
    assert {name for name in states if states[name] == "stale"} == {*reruns} | (states.keys() & {"f"})
    assert session.edit([operation]) == [] if operation["op"] == "invalidate" else True
    for name in "de":
        await lab.demand(session, name)
    assert sorted(lab.started) == sorted(reruns)


GOOD = [
    set_input("e", "x"),
    {"op": "update_node_data", "node": "a", "data": {"text": "x"}},
    {"op": "remove_edge", "edge": "a>b"},
    {"op": "remove_node", "node": "c"},
    {"op": "invalidate", "node": "d"},
]


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        ({"op": "none"}, "bad_message"),
        ({"op": "add_edge", "edge": edge("d>a")}, None),
        ({"op": "add_edge", "edge": edge("d>d")}, "cycle"),
        ({"op": "add_edge", "edge": edge("e>b.none")}, "unknown_port"),
        ({"op": "add_node", "node": node_("f", "no-such")}, "unknown_node_type"),
        (set_input("e", b"x"), "type_mismatch"),
        (set_input("e", "x", "none"), "unknown_port"),
        ({"op": "invalidate", "node": "c"}, "unknown_node"),
    ],
    ids=lambda value: value if type(value) is str else "",
)
@engine_test
async def test_edits_are_all_or_nothing(lab: Lab, bad: dict[str, Any], code: str | None) -> None:
    session = lab.open(DIAMOND | {"ask": "t-ask"}, "a>b a>c b>d c>d")
    waiting = lab.demand(session, "ask")
    await lab.demand(session, "d")
    await settled()
    before = session.snapshot()
    if code is None:  # with the removed edges gone there is no cycle
        assert session.edit([*GOOD, bad])
        return
    with pytest.raises(DemandportError) as caught:
        session.edit([*GOOD, set_input("ask", 1, "number"), bad])
    assert caught.value.code == code
    assert session.snapshot() == before
    assert (await lab.demand(session, "d")).meta["cached"] == 1
    await settled()
    assert not waiting.ended


@engine_test
async def test_output_runs_nothing_and_names_what_is_not_there(lab: Lab) -> None:
    session = lab.open({"a": "t-step"})
    assert session.output("a", "output") == {"status": "absent", "value": None}
    await lab.demand(session, "a")
    assert session.output("a", "output") == {"status": "fresh", "value": "a()"}
    session.edit([{"op": "invalidate", "node": "a"}])
    assert session.output("a", "output")["status"] == "absent" and lab.runs("a") == [1]
    for name, port, error in [("b", "output", UnknownNode), ("a", "none", UnknownPort)]:
        with pytest.raises(error):
            session.output(name, port)


# ------------------------------------------------------------------------------------------------ waiting for people

HUMAN = {"h": ("human-input", {"prompt": "Name?"}), "end": "t-step"}


def asked(listener: Listener) -> bool:
    return ("waiting_for_input", "h") in listener.events()


@engine_test
async def test_a_person_may_answer_later(lab: Lab) -> None:
    session = lab.open(HUMAN, "h>end")
    first, second = lab.demand(session, "end", events=True), lab.demand(session, "h")
    await until(lambda: asked(first))
    event = next(heard[1] for heard in first.heard if heard[0] == "event" and "prompt" in heard[1])
    assert (event["prompt"], event["default"]) == ("Name?", None)
    assert not first.ended and lab.started == []
    session.edit([set_input("h", "Ann", "user_response")])
    assert (await first).output == "end(Ann)" and (await second).output == "Ann"
    again = await lab.demand(session, "h", events=True)
    assert again.output == "Ann" and not asked(again)
    session.edit([{"op": "clear_input", "node": "h", "port": "user_response"}])
    asks_again = lab.demand(session, "h", events=True)
    await until(lambda: asked(asks_again))
    session.edit([set_input("h", None, "user_response")])
    assert (await asks_again).output is None


@engine_test
async def test_an_answer_reaches_those_who_asked_before_an_edit(lab: Lab) -> None:
    session = lab.open(HUMAN, "h>end")
    old = lab.demand(session, "end", events=True)
    await until(lambda: asked(old))
    session.edit([set_input("end", "!"), {"op": "update_node_data", "node": "h", "data": {"prompt": "Who?"}}])
    new = lab.demand(session, "end", events=True)
    await until(lambda: asked(new))
    session.edit([set_input("h", "Ann", "user_response")])
    assert (await old).output == "end(Ann)" and (await new).output == "end!(Ann)"


@pytest.mark.parametrize("ending", ["cancel", "deadline", "close"])
@engine_test
async def test_waiting_ends_with_the_demand(lab: Lab, ending: str) -> None:
    session = lab.open(HUMAN, "h>end")
    demand = lab.demand(session, "end", events=True, deadline_ms=20 if ending == "deadline" else None)
    await until(lambda: asked(demand) or demand.ended)
    if ending == "cancel":
        session.cancel(demand.demand)
    elif ending == "close":
        session.close()
    await demand
    assert demand.code == ("deadline_exceeded" if ending == "deadline" else "cancelled")
    await until(lambda: lab.executor.running == 0)
    session.edit([set_input("h", "Ann", "user_response")])
    assert (await lab.demand(session, "end")).output == "end(Ann)"


@pytest.mark.parametrize(
    ("data", "outcome"),
    [
        ({"user_response": "Ann"}, "Ann"),
        ({"auto_accept": True, "default": "Bob"}, "Bob"),
        ({"auto_accept": True, "default": "Bob", "user_response": "Ann"}, "Ann"),
        ({"auto_accept": True}, "missing_input"),
    ],
)
@engine_test
async def test_nobody_is_asked_when_the_answer_is_there(lab: Lab, data: dict[str, Any], outcome: str) -> None:
    found = await lab.demand(lab.open({"h": ("human-input", data)}), "h", events=True)
    assert (found.failure.code if found.failure else found.output) == outcome and not asked(found)


@pytest.mark.parametrize("held_up", ["", "queue", "upstream"])
@engine_test
async def test_an_answer_before_the_question_is_not_lost(lab: Lab, held_up: str) -> None:
    """A host may send the demand and the answer in one write: the node has not run by then."""
    nodes = HUMAN | {"slow": "t-gate"}
    session = lab.open(nodes, "slow>h.prompt" if held_up == "upstream" else "", max_running=1 if held_up else 9)
    if held_up == "queue":
        lab.demand(session, "slow")
    demand = lab.demand(session, "h")
    session.edit([set_input("h", "Ann", "user_response")])
    lab.open_gates("slow")
    await settled()
    assert demand.ended and demand.output == "Ann"


@pytest.mark.parametrize(
    ("operations", "expected"),
    [
        ([set_input("a", 40.0, "number")], "[40]"),
        ([set_input("a", 1, "number"), set_input("a", 2, "number")], "[2]"),
    ],
)
@engine_test
async def test_an_answer_is_what_the_port_would_have_got(
    lab: Lab, operations: list[dict[str, Any]], expected: str
) -> None:
    session = lab.open({"a": "t-ask"})
    demand = lab.demand(session, "a")
    await settled()
    session.edit(operations)
    assert repr((await demand).output) == expected


@engine_test
async def test_each_answer_is_taken_once(lab: Lab) -> None:
    """What was set before the demand answers nothing: the node had it as its input."""
    session = lab.open({"a": ("t-ask", {"times": 2})})
    session.edit([set_input("a", 1, "number")])
    demand = lab.demand(session, "a")
    for number in (2, 3):
        await settled()
        assert not demand.ended
        session.edit([set_input("a", number, "number")])
    assert (await demand).output == [2, 3]


@pytest.mark.parametrize(
    "undone", [{"op": "clear_input", "node": "h", "port": "user_response"}, {"op": "remove_node", "node": "h"}], ids=str
)
@engine_test
async def test_an_answer_that_the_same_edit_takes_back_is_none(lab: Lab, undone: dict[str, Any]) -> None:
    session = lab.open(HUMAN)
    demand = lab.demand(session, "h")
    await settled()
    session.edit([set_input("h", "Ann", "user_response"), undone])
    await settled()
    assert not demand.ended


# ------------------------------------------------------------------------------------------------ threads, parallel


@engine_test
async def test_a_full_pool_refuses_and_a_thread_is_charged_until_it_ends(lab: Lab) -> None:
    lab.executor.threads = threads = Threads(2, max_queued=1)
    session = lab.open({name: "t-thread" for name in "abcd"})
    a, b, c = (lab.demand(session, name) for name in "abc")
    await until(lambda: lab.started == ["a", "b"] or lab.started == ["b", "a"])
    refused = await lab.demand(session, "d")
    assert refused.code == "queue_full" and "'threads'" in refused.failure.message and refused.failure.retryable
    session.cancel(a.demand)
    await until(lambda: lab.executor.running == 2)
    assert a.code == "cancelled" and threads.health() == {
        "size": 2,
        "in_flight": 2,
        "queued": 1,
        "max_queued": 1,
    }
    assert (await lab.demand(session, "d")).code == "queue_full"  # its thread still blocks
    session.cancel(c.demand)  # this one had none yet
    await until(lambda: threads.in_flight == 2)
    d = lab.demand(session, "d")
    lab.open_gates("a")
    await until(lambda: "d" in lab.started)
    lab.open_gates("b", "c", "d")
    assert ((await b).output, (await d).output) == ("b()", "d()")
    await until(lambda: threads.in_flight == 0)
    assert lab.runs("c") == [0]


@pytest.mark.parametrize("kind", ["t-meet", "t-thread-meet"])
@pytest.mark.parametrize("sessions", [1, 2])
@engine_test
async def test_independent_branches_run_at_the_same_time(lab: Lab, kind: str, sessions: int) -> None:
    """Neither branch ends before the other has begun."""
    lab.meeting = asyncio.Barrier(2) if kind == "t-meet" else threading.Barrier(2)
    opened = [lab.open({"a": kind, "b": kind, "end": "t-step"}, "a>end b>end") for _ in range(sessions)]
    if sessions == 1:
        assert (await lab.demand(opened[0], "end")).output == "end(a,b)"
    else:
        both = [lab.demand(session, name) for session, name in zip(opened, "ab", strict=True)]
        assert [(await demand).output for demand in both] == ["a", "b"]


# ------------------------------------------------------------------------------------------------ inputs


@pytest.mark.parametrize("opening", ["abc", "cba", "bca"])
@engine_test
async def test_a_port_for_many_gets_a_list_in_edge_order(lab: Lab, opening: str) -> None:
    nodes = {name: "t-gate" for name in "abc"} | {"end": ("t-step", {"items": ["data"]})}
    session = lab.open(nodes, "c>end a>end b>end")
    demand = lab.demand(session, "end")
    for name in opening:
        lab.open_gates(name)
        await settled()
    assert (await demand).output == "end(c(),a(),b())"
    session.edit([{"op": "remove_edge", "edge": "c>end"}, {"op": "add_edge", "edge": edge("c>end")}])
    assert (await lab.demand(session, "end")).output == "end(a(),b(),c())"
    session.edit([set_input("end", [1, 2], "items")])
    assert (await lab.demand(session, "end")).output == "end(1,2)"
    session.edit([{"op": "remove_node", "node": name} for name in "abc"])
    session.edit([{"op": "clear_input", "node": "end", "port": "items"}])
    assert (await lab.demand(session, "end")).output == "end(data)"


@pytest.mark.parametrize(("port", "default"), [("text", "default"), ("extra", None)])
@engine_test
async def test_set_input_before_edge_before_data_before_default(lab: Lab, port: str, default: str | None) -> None:
    session = lab.open({"a": ("text-input", {"text": "edge"}), "v": "t-value"})
    into = edge(f"a>v.{port}")
    steps: list[tuple[dict[str, Any], str | None]] = [
        ({"op": "update_node_data", "node": "v", "data": {port: "data"}}, "data"),
        ({"op": "add_edge", "edge": into}, "edge"),
        (set_input("v", "input", port), "input"),
        ({"op": "remove_edge", "edge": into["id"]}, "input"),
        ({"op": "add_edge", "edge": into}, "input"),
        (set_input("v", None, port), None),
        ({"op": "clear_input", "node": "v", "port": port}, "edge"),
        ({"op": "remove_edge", "edge": into}, "data"),
        ({"op": "update_node_data", "node": "v", "data": {port: None}}, default),
    ]
    assert (await lab.demand(session, "v")).output.get(port) == default
    for operation, expected in steps:
        session.edit([operation])
        assert (await lab.demand(session, "v")).output.get(port) == expected, operation


@pytest.mark.parametrize(
    ("way", "given", "expected"),
    [
        *((way, '{"a": 1}', {"a": 1}) for way in ("data", "edge", "input")),
        *((way, '"1"', "1") for way in ("data", "edge")),
        ("input", '"1"', "1"),
        ("input", '"x"', "x"),
    ],
)
@engine_test
async def test_a_value_is_made_to_fit_once(lab: Lab, way: str, given: str, expected: Any) -> None:
    data = {"parsed": given} if way == "data" else {}
    edges = "a>v.parsed" if way == "edge" else ""
    session = lab.open({"a": ("text-input", {"text": given}), "v": ("t-value", data)}, edges)
    session.edit([set_input("v", given, "parsed")] if way == "input" else [])
    assert (await lab.demand(session, "v")).output["parsed"] == expected


@engine_test
async def test_a_missing_input_fails_the_demands_that_need_it(lab: Lab) -> None:
    session = lab.open({"c": "conditional", "end": "t-step", "a": "t-step"}, "c.true_out>end")
    assert [(problem.code, problem.node) for problem in session.problems] == [("missing_input", "c")] * 2
    found = await lab.demand(session, "end")
    assert (found.code, found.failure.node) == ("missing_input", "c")
    assert (await lab.demand(session, "a")).output == "a()"
    session.edit([set_input("c", True, "condition"), set_input("c", "v", "value")])
    assert (await lab.demand(session, "end")).output == "end(v)"


# ------------------------------------------------------------------------------------------------ events and counts


@pytest.mark.parametrize("kind", ["t-step", "t-gate", "t-thread"])
@engine_test
async def test_events_go_to_those_who_asked(lab: Lab, kind: str) -> None:
    session = lab.open({"a": kind, "end": kind}, "a>end")
    lab.open_gates("a", "end")
    first, without = lab.demand(session, "end", events=True), lab.demand(session, "end")
    assert (await without).events() == []
    ran = [("task_started", "a"), ("task_completed", "a"), ("task_started", "end"), ("task_completed", "end")]
    assert first.events() == [("demand_started", "end"), *ran]
    heard = [event for kind, event in first.heard[:-1]]
    assert [event["seq"] for event in heard] == list(range(5)) and all(event["time_us"] > 0 for event in heard)
    assert (await lab.demand(session, "end", events=True)).events() == [("cache_hit", "end")]
    lab.failing["end"] = RuntimeError("no")
    session.edit([{"op": "invalidate", "node": "end"}])
    failed = await lab.demand(session, "end", events=True)
    assert failed.events() == [("demand_started", "end"), ("task_started", "end"), ("task_failed", "end")]
    assert failed.heard[-2][1]["error"]["code"] == "node_failed"


@engine_test
async def test_who_joins_late_hears_the_events_from_then_on(lab: Lab) -> None:
    session = lab.open({"a": "t-gate", "end": "t-step"}, "a>end")
    lab.demand(session, "end")
    await until(lambda: lab.started)
    late = lab.demand(session, "end", events=True)
    lab.contexts["a"].progress(1, 2, "steps")
    lab.open_gates("a")
    names = [name for name, _ in (await late).events()]
    assert names == ["demand_started", "task_progress", "task_completed", "task_started", "task_completed"]


@engine_test
async def test_a_demand_counts_what_it_ran_and_what_it_found(lab: Lab) -> None:
    session = lab.open({"a": "t-step", "b": "t-gate", "end": "t-step"}, "a>b b>end a>end")
    lab.open_gates("b")

    async def counts() -> tuple[int, int]:
        meta = (await lab.demand(session, "end")).meta
        return meta["ran"], meta["cached"]

    assert await counts() == (3, 0)
    assert await counts() == (0, 1)
    session.edit([set_input("b", "x")])
    assert await counts() == (2, 1)


@engine_test
async def test_what_is_asked_for_behind_a_branch_counts_too(lab: Lab) -> None:
    session = lab.open(FORK | {"in": "t-gate"}, FORK_EDGES)
    lab.open_gates("in")
    found = await lab.demand(session, "yes")
    assert sorted(lab.started) == ["in", "only_yes", "yes"]
    assert found.meta["ran"] == 5  # and the two built-in nodes
