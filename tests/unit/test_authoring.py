"""Nodes that others write: what `@node` reads off a function, what its `Context` can do, and that whatever an author
does wrong stays the author's: it is said in time, and no other node, demand or package suffers for it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import anyio
import anyio.lowlevel
import pytest

from demandport import Context, Port, node
from demandport.engine.executor import Executor
from demandport.engine.node import DECLARED
from demandport.engine.registry import hash_of, load_specs
from demandport.engine.session import Session
from demandport.errors import Cancelled, DemandportError, Forbidden, TypeMismatch
from demandport.graph.spec import REQUIRED, NodeSpec
from demandport.nodes import BUILT_IN
from sink import Sink
from support import ServiceProcess, environment, is_terminal

BUILT_INS = load_specs(BUILT_IN)
TIMEOUT_S = 20


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Node types declared by one test are unknown to the next."""
    before = dict(DECLARED)
    yield
    DECLARED.clear()
    DECLARED.update(before)


# ------------------------------------------------------------------------------------------------ the bench


class Gate:
    """Opened on one side, awaited on the other; in tasks and threads alike."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self.open = self._open.set
        self.is_open = self._open.is_set

    def wait(self) -> None:
        assert self._open.wait(TIMEOUT_S), "nobody opened the gate"

    async def reached(self) -> None:
        await anyio.to_thread.run_sync(self.wait)


class Bench:
    """A session whose nodes are these functions, one each, under their own names; no wire, no process."""

    def __init__(self, tasks: Any, functions: Any, data: dict[str, Any], edges: list[Any], resources: Any) -> None:
        self.executor = Executor(tasks, resources)
        nodes = [{"id": f.__name__, "node_type": f.node_spec.node_type, "data": data} for f in functions]
        specs = {f.node_spec.node_type: f.node_spec for f in functions}
        self.session = Session({"nodes": nodes, "edges": edges}, specs, self.executor)

    def demand(self, node: Any, sink: Sink | None = None, **options: Any) -> Sink:
        sink = sink or Sink()
        sink.demand = self.session.demand(node.__name__, sink, lambda _: None, **options)
        return sink

    def cancel(self, sink: Sink) -> None:
        self.session.cancel(sink.demand)

    def set_input(self, node: Any, port: str, value: Any) -> None:
        self.session.edit([{"op": "set_input", "node": node.__name__, "port": port, "value": value}])

    async def idle(self) -> None:
        """Wait until no node runs any more, in the loop or in a thread."""
        while self.executor.running or self.executor.threads.in_flight:
            await anyio.lowlevel.checkpoint()


def on_bench(
    check: Callable[[Bench], Awaitable[Any]],
    *functions: Any,
    data: dict[str, Any] | None = None,
    edges: list[dict[str, Any]] | None = None,
    **resources: Any,
) -> Any:
    """Run `check` beside a task group as the service has one, and fail if anything a node raises gets that far."""
    found: list[Any] = []

    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            try:
                with anyio.fail_after(TIMEOUT_S):
                    found.append(await check(Bench(tasks, functions, data or {}, edges or [], resources)))
            except Exception as failed:
                found.append(failed)
                tasks.cancel_scope.cancel()

    try:
        anyio.run(main)
    except BaseException as escaped:
        pytest.fail(f"this ends the service: {escaped!r}")
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def run(function: Any, *, resources: dict[str, Any] | None = None, events: bool = False, **data: Any) -> Sink:
    """One demand on one node; raises what the host would be told."""

    async def check(bench: Bench) -> Sink:
        sink = bench.demand(function, events=events)
        await sink.result()
        return sink

    return on_bench(check, function, data=data, **(resources or {}))


def declared(function: Any, **options: Any) -> Any:
    """The function as a node type called after it."""
    return node(f"t-{function.__name__}", **options)(function)


def spec_of(function: Any, **options: Any) -> NodeSpec:
    return declared(function, **options).node_spec


# ------------------------------------------------------------------------------------------------ kinds of function


def function(text: str, times: int = 2) -> str:
    """Repeats a text.

    This is for those who read the code."""
    return text * times


def generator(text: str, times: int = 2) -> Iterator[str]:
    """Repeats a text."""
    for _ in range(times):
        yield text


async def async_function(text: str, times: int = 2) -> str:
    """Repeats a text."""
    await anyio.lowlevel.checkpoint()
    return text * times


async def async_generator(text: str, times: int = 2) -> AsyncIterator[str]:
    """Repeats a text."""
    for _ in range(times):
        await anyio.lowlevel.checkpoint()
        yield text


FOUR = [function, generator, async_function, async_generator]


@pytest.mark.parametrize("kind", FOUR)
def test_any_kind_of_function_is_a_node(kind: Any) -> None:
    spec = spec_of(kind)
    assert spec.style == kind.__name__ and spec.runs == ("async" if "async" in kind.__name__ else "thread")
    assert spec.description == "Repeats a text." and spec.category == "custom"
    assert spec.inputs == {"text": Port("text", "string"), "times": Port("times", "integer", 2)}
    assert spec.inputs["text"].required and not spec.inputs["times"].required
    assert spec.outputs == {"output": Port("output", "string")} and spec.stream == "output"
    heard = run(kind, text="ab")
    assert heard.outputs == {"output": "abab"}
    assert heard.chunks == ([("output", "ab")] * 2 if "generator" in kind.__name__ else [])
    assert run(kind, text="x", times=3.0).outputs == {"output": "xxx"}  # 3.0 is an integer


@pytest.mark.parametrize("kind", FOUR)
@pytest.mark.parametrize(
    ("data", "code"),
    [({}, "missing_input"), ({"text": b"x"}, "type_mismatch"), ({"text": "x", "times": 1.5}, "type_mismatch")],
)
def test_inputs_are_checked_for_it(kind: Any, data: dict[str, Any], code: str) -> None:
    with pytest.raises(DemandportError) as caught:
        run(declared(kind), **data)
    assert caught.value.code == code and caught.value.node == kind.__name__


def test_a_declared_function_is_still_a_function() -> None:
    assert declared(function) is function and function("a") == "aa"
    assert DECLARED["t-function"] is function.node_spec


@pytest.mark.parametrize(("runs", "in_loop"), [("inline", True), ("thread", False), (None, False)])
def test_where_a_function_runs(runs: str | None, in_loop: bool) -> None:
    def where() -> Any:
        return threading.current_thread() is threading.main_thread()

    assert run(declared(where, runs=runs)).outputs == {"output": in_loop}


def test_an_empty_stream_of_text_is_an_empty_text_and_one_of_objects_a_list() -> None:
    async def objects(count: int = 0) -> AsyncIterator[dict[str, Any]]:
        for n in range(count):
            yield {"n": n}

    assert run(declared(generator), text="x", times=0).outputs == {"output": ""}
    assert run(declared(objects)).outputs == {"output": []}
    heard = run(objects, count=2)
    assert heard.outputs == {"output": [{"n": 0}, {"n": 1}]} and heard.chunks == [("output", {"n": n}) for n in (0, 1)]


# ------------------------------------------------------------------------------------------------ ports

HINTS: list[Any] = [
    (str, "string"), (int, "integer"), (float, "number"), (bool, "boolean"), (dict, "json"), (list, "json"),
    (dict[str, Any], "json"), (list[int], "json"), (list[int | None], "json"), (Any, "any"), (object, "any"),
    (bytes, "any"), (Path, "any"), (set[int], "any"),
    (Optional[str], "string"), (str | None, "string"),  # noqa: UP045 - old spelling, still read
    (list[str] | None, "json"), (int | float, "number"),
    (int | float | None, "number"), (str | int, "any"), (str | int | None, "any"),
    (Literal["a", "b"], "any"), (Literal["a"] | None, "any"),
    (Annotated[str, "for readers"], "string"), (Annotated[str | None, "for readers"], "string"),
    (Annotated[Any, Port(type="image")], "image"), (Annotated[str, "x", Port(type="prompt")], "prompt"),
    (Annotated[str, Port(type="prompt")] | None, "prompt"),
    (Callable[[int], str], "any"),
]  # fmt: skip


@pytest.mark.parametrize(("hint", "type_name"), HINTS, ids=lambda part: str(part).replace("typing.", ""))
def test_hints_become_port_types(hint: Any, type_name: str) -> None:
    def takes(x: Any) -> Any: ...

    def streams() -> Any:
        yield

    takes.__annotations__ = {"x": hint, "return": hint}
    spec = spec_of(takes)
    assert spec.inputs["x"].type == spec.outputs["output"].type == type_name
    for stream in (Iterator[hint], AsyncIterator[hint], Generator[hint, None, None], AsyncGenerator[hint, None]):
        streams.__annotations__ = {"return": stream}
        assert spec_of(streams).outputs["output"].type == type_name


def test_defaults_and_every_way_to_name_a_parameter() -> None:
    def takes(a: str, b=3, c: str | None = None, *, d: list[int], e: float = 0.5, **rest: Any) -> None:  # type: ignore[no-untyped-def]
        ...

    spec = spec_of(takes)
    assert {port.name: (port.type, port.default) for port in spec.inputs.values()} == {
        "a": ("string", REQUIRED), "b": ("any", 3), "c": ("string", None), "d": ("json", REQUIRED),
        "e": ("number", 0.5),
    }  # fmt: skip
    assert spec.open_inputs and spec.context is None
    about = {port["name"]: port for port in spec.describe()["inputs"]}
    assert about["a"]["required"] and about["a"]["default"] is None and not about["c"]["required"]


def test_an_annotated_port_takes_several_edges_and_keeps_its_description() -> None:
    def source() -> str:
        return "s"

    def joined(parts: Annotated[list[str], Port(type="string", multiple=True, description="the parts")]) -> str:
        return "+".join(parts)

    async def check(bench: Bench) -> None:
        assert await bench.demand(joined).result() == {"output": "s+s"}

    assert spec_of(joined).inputs["parts"].description == "the parts"
    edges = [{"id": str(n), "source": "source", "target": "joined"} for n in (1, 2)]
    on_bench(check, declared(source), joined, edges=edges)


def test_several_outputs() -> None:
    def split(text: str) -> dict[str, Any]:
        head, _, tail = text.partition(" ")
        return {"tail": tail, "head": head}

    ports = {"head": Port(type="string", description="the first word"), "tail": "string"}
    spec = spec_of(split, outputs=ports, category="text", description="Splits.")
    assert [(p["name"], p["type"], p["description"]) for p in spec.describe()["outputs"]] == [
        ("head", "string", "the first word"),
        ("tail", "string", ""),
    ]
    assert (spec.category, spec.description, spec.stream) == ("text", "Splits.", "head")
    assert run(split, text="two words").outputs == {"head": "two", "tail": "words"}


def test_one_declared_output_takes_the_value_as_it_is() -> None:
    def pair() -> Any:
        return {"a": 1}

    assert run(declared(pair, outputs={"pair": "json"})).outputs == {"pair": {"a": 1}}


def test_a_generator_streams_one_port_and_gives_the_others_at_the_end() -> None:
    def returned() -> Generator[str, None, dict[str, Any]]:
        yield from "ab"
        return {"count": 2}

    async def through_context(ctx: Context) -> AsyncGenerator[str, None]:
        yield "a"
        ctx.output("count", 2)
        yield "b"

    ports = {"count": "integer", "text": "string"}
    for kind in (returned, through_context):
        heard = run(declared(kind, outputs=ports, stream="text"))
        assert heard.outputs == {"text": "ab", "count": 2} and heard.chunks == [("text", "a"), ("text", "b")]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("text", "has several outputs and must return a dict, not str"),
        ({"a": 1, "b": 2, "c": 3}, "gave a value for 'c'; its outputs: a, b"),
        ({"a": 1}, "b"),
    ],
)
@pytest.mark.parametrize("runs", ["inline", "thread"])
def test_a_return_value_that_does_not_fit_the_ports(runs: str, given: Any, says: str) -> None:
    def two() -> Any:
        return given

    with pytest.raises(DemandportError, match=says) as caught:
        run(declared(two, outputs={"a": "any", "b": "any"}, runs=runs))
    assert caught.value.code == "node_failed" and caught.value.node == "two"


def test_only_a_node_that_branches_may_leave_an_output_out() -> None:
    def either(left: bool) -> Any:
        return {"left" if left else "right": 1}

    assert run(declared(either, outputs={"left": "any", "right": "any"}, branches=True), left=False).outputs == {
        "right": 1
    }


# ------------------------------------------------------------------------------------------------ wrong declarations


def positional(x: str, /) -> str: ...
def starred(*texts: str) -> str: ...
def misspelt(x: Annotated[str, Port(type="strnig")]) -> str: ...
def doubled(a: Context, b: Context) -> str: ...
def unresolved(x: Undefined) -> str: ...  # noqa: F821


WRONG: list[Any] = [
    (lambda: declared(positional), "the parameter x cannot be a port"),
    (lambda: declared(starred), "the parameter texts cannot be a port"),
    (lambda: declared(function, runs="gpu"), "t-function: runs is one of .*cpu.* not 'gpu'"),
    (lambda: declared(async_function, runs="cpu"), "t-async_function: a async_function cannot run cpu"),
    (lambda: declared(async_generator, runs="cpu"), "async_generator cannot run cpu"),
    (lambda: declared(function, runs="async"), "t-function: a function cannot run async"),
    (lambda: declared(generator, runs="inline"), "t-generator: a generator cannot run inline"),
    (lambda: declared(async_function, runs="thread"), "async_function cannot run thread"),
    (lambda: declared(async_generator, runs="inline"), "async_generator cannot run inline"),
    (lambda: declared(function, outputs={"a": "strnig"}), "port a: there is no port type 'strnig'"),
    (lambda: declared(function, outputs={"a": 5}), "port a: there is no port type 5"),
    (lambda: node("t-5")(5), "5"),
    (lambda: declared(function, outputs={"a": Port(type="strnig")}), "strnig"),
    (lambda: declared(misspelt), "strnig"),
    (lambda: declared(function, outputs=["a"]), "outputs"),
    (lambda: declared(generator, stream="nope"), "nope"),
    (lambda: declared(doubled), "Context"),
    (lambda: declared(unresolved), "unresolved.*Undefined"),
    (lambda: node(function), "function"),
    (lambda: node("")(function), "name"),
    (lambda: node(5)(function), "5"),
]  # fmt: skip


@pytest.mark.parametrize(("declare", "says"), WRONG)
def test_a_wrong_declaration_is_said_at_once_and_leaves_nothing(declare: Callable[[], Any], says: str) -> None:
    before = dict(DECLARED)
    with pytest.raises(TypeError, match=says):
        declare()
    assert before == DECLARED


def test_declaring_a_function_anew_replaces_it() -> None:
    declared(function, category="before")
    assert spec_of(function, category="after").category == DECLARED["t-function"].category == "after"


def test_two_functions_cannot_have_one_name() -> None:
    node("t-same")(function)
    with pytest.raises(TypeError, match="t-same"):
        node("t-same")(generator)


def test_the_hash_of_descriptors_changes_when_one_does() -> None:
    specs = {"a": spec_of(function), "b": spec_of(generator)}
    before = hash_of(specs)
    assert hash_of(dict(reversed(specs.items()))) == before
    assert hash_of(specs | {"a": spec_of(function, description="Other.")}) != before


# ------------------------------------------------------------------------------------------------ the context


def _on(events: list[dict[str, Any]], name: str) -> dict[str, Any]:
    (found,) = [event for event in events if event["event"] == name]
    return found


def report(ctx: Context) -> Any:
    ctx.progress(1, 2, "pages")
    ctx.event("weather", sunny=True)
    ctx.log("warning", "clouds", height=3)
    ctx.log("no such level", "still logged")
    return [ctx.node, ctx.node_type, ctx.resources["tool"]]


async def report_async(ctx: Context) -> Any:
    return report(ctx)


@pytest.mark.parametrize(("kind", "runs"), [(report, "thread"), (report, "inline"), (report_async, "async")])
def test_a_node_reports_events_progress_and_logs(kind: Any, runs: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    name = kind.__name__
    heard = run(declared(kind, runs=runs), resources={"tool": "hammer"}, events=True)
    assert heard.outputs == {"output": [name, f"t-{name}", "hammer"]}
    told = [event["event"] for event in heard.events]
    assert told == ["demand_started", "task_started", "task_progress", "weather", "task_completed"]
    assert [event["seq"] for event in heard.events] == list(range(5)) and {e["node"] for e in heard.events} == {name}
    progress, weather = _on(heard.events, "task_progress"), _on(heard.events, "weather")
    assert (progress["done"], progress["total"], progress["unit"], weather["sunny"]) == (1, 2, "pages", True)
    logged = [(r.name, r.levelname, r.getMessage(), r.metadata) for r in caplog.records if r.name == f"node.t-{name}"]
    assert logged == [
        (f"node.t-{name}", "WARNING", "clouds", {"node": name, "height": 3}),
        (f"node.t-{name}", "INFO", "still logged", {"node": name}),
    ]
    assert run(kind, resources={"tool": ""}).events == []  # nobody asked for them


async def emits(ctx: Context) -> None:
    for chunk in ("a", "b", "c"):
        await ctx.emit(chunk)


def emits_in_thread(ctx: Context) -> None:
    for chunk in ("a", "b", "c"):
        ctx.emit_from_thread(chunk)


async def emits_and_returns(ctx: Context) -> str:
    await ctx.emit("draft")
    return "final"


@pytest.mark.parametrize(
    ("kind", "chunks", "output"),
    [(emits, "abc", "abc"), (emits_in_thread, "abc", "abc"), (emits_and_returns, ["draft"], "final")],
)
def test_emitted_text_joined_is_the_output_unless_one_is_returned(kind: Any, chunks: Any, output: str) -> None:
    heard = run(declared(kind))
    assert [chunk for _, chunk in heard.chunks] == list(chunks) and heard.outputs == {"output": output}


def test_emit_to_another_port() -> None:
    async def two(ctx: Context) -> None:
        await ctx.emit("thinking", port="thoughts")
        await ctx.emit("answer")
        ctx.output("count", 1)

    heard = run(declared(two, outputs={"text": "string", "thoughts": "string", "count": "integer"}))
    assert heard.chunks == [("thoughts", "thinking"), ("text", "answer")]
    assert heard.outputs == {"thoughts": "thinking", "text": "answer", "count": 1}


@pytest.mark.parametrize("answer", [None, pytest.param("x")])
def test_emit_to_a_port_that_is_not_there(answer: str | None) -> None:
    async def lost(ctx: Context) -> str | None:
        await ctx.emit("x", port="nope")
        return answer

    with pytest.raises(DemandportError, match="'nope'; its outputs: output"):
        run(declared(lost))


def test_an_output_that_is_not_there() -> None:
    def lost(ctx: Context) -> None:
        ctx.output("nope", 1)

    for runs in ("inline", "thread"):
        with pytest.raises(DemandportError, match="'nope'; its outputs: output"):
            run(declared(lost, runs=runs))


def test_a_context_may_be_optional_for_those_who_also_call_the_function() -> None:
    def greets(ctx: Context | None = None) -> str:
        return f"I am {ctx.node}" if ctx else "nobody asked"

    assert run(declared(greets)).outputs == {"output": "I am greets"}


@pytest.mark.parametrize("runs", ["inline", "async"])
def test_emit_from_thread_in_the_loop_is_an_error(runs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def inline(ctx: Context) -> None:
        ctx.emit_from_thread("x")

    async def in_loop(ctx: Context) -> None:
        ctx.emit_from_thread("x")

    def waits(future: Any, timeout: float | None = None) -> None:
        raise RuntimeError("the loop waits for itself")

    monkeypatch.setattr(Future, "result", waits)  # instead of doing so
    with pytest.raises(DemandportError, match="emit_from_thread"):
        run(declared(inline if runs == "inline" else in_loop, runs=runs))


def test_objects_wait_for_room_and_text_does_not() -> None:
    async def mixed() -> AsyncIterator[Any]:
        yield "text"
        yield {"object": 1}
        yield {"object": 2}

    async def check(bench: Bench) -> None:
        has_room = anyio.Event()
        sink = bench.demand(mixed, Sink(has_room))
        await sink.asked_for_room.wait()
        assert sink.chunks == [("output", "text"), ("output", {"object": 1})]
        has_room.set()
        assert await sink.result() == {"output": ["text", {"object": 1}, {"object": 2}]}

    on_bench(check, declared(mixed))


def deadline(ctx: Context) -> Any:
    assert (ctx.deadline is None) == (ctx.remaining_s is None)
    return [ctx.deadline, ctx.remaining_s]


@pytest.mark.parametrize("runs", ["thread", pytest.param("inline")])
def test_a_node_knows_its_deadline(runs: str) -> None:
    async def check(bench: Bench) -> Any:
        sink = bench.demand(deadline, deadline_ms=60_000)
        ((at, left),) = (await sink.result()).values()
        assert at == sink.demand.deadline and 0 < left <= 60

    assert run(declared(deadline, runs=runs)).outputs == {"output": [None, None]}
    on_bench(check, deadline)


async def looks_twice(ctx: Context, again: int | None = None) -> Any:
    first = [ctx.deadline, ctx.cancelled]
    ctx.resources["asked"].set()
    answer = await ctx.wait_input("again")
    return [first, [ctx.deadline, ctx.cancelled], answer]


def test_a_node_is_wanted_for_as_long_as_any_demand_waits() -> None:
    asked = anyio.Event()

    async def check(bench: Bench) -> None:
        short, long = (bench.demand(looks_twice, deadline_ms=ms) for ms in (50_000, 60_000))
        await asked.wait()
        bench.cancel(long)
        bench.set_input(looks_twice, "again", 7)
        assert long.failure and long.failure.code == "cancelled"
        seen = [[long.demand.deadline, False], [short.demand.deadline, False], 7]
        assert await short.result() == {"output": seen}

    on_bench(check, declared(looks_twice), asked=asked)


def test_an_awaited_input_is_made_to_fit_its_port() -> None:
    asked = anyio.Event()

    async def check(bench: Bench) -> None:
        sink = bench.demand(looks_twice)
        await asked.wait()
        bench.set_input(looks_twice, "again", 40.0)
        assert repr((await sink.result())["output"][2]) == "40"

    on_bench(check, declared(looks_twice), asked=asked)


# ------------------------------------------------------------------------------------------------ cleaning up


class Door:
    """A resource that a node opens. It says when, stays open while the test wishes, and says when it was closed."""

    def __init__(self) -> None:
        self.opened, self.go_on, self.closed = Gate(), Gate(), Gate()

    def __enter__(self) -> Door:
        self.opened.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.open()


def _through(door: Door, how: str) -> None:
    if how == "raises":
        raise ValueError("slammed")


def door_function(ctx: Context, how: str) -> str:
    with ctx.resources["door"] as door:
        _through(door, how)
        if how == "waits":
            door.go_on.wait()
            ctx.emit_from_thread("never heard")
    return "done"


def door_generator(ctx: Context, how: str) -> Iterator[str]:
    with ctx.resources["door"] as door:
        yield "done"
        _through(door, how)
        if how == "waits":
            door.go_on.wait()
            yield "never heard"


async def door_async_function(ctx: Context, how: str) -> str:
    with ctx.resources["door"] as door:
        _through(door, how)
        if how == "waits":
            await anyio.sleep_forever()
    return "done"


async def door_async_generator(ctx: Context, how: str) -> AsyncIterator[str]:
    with ctx.resources["door"] as door:
        yield "done"
        _through(door, how)
        if how == "waits":
            await anyio.sleep_forever()


async def door_in_a_full_stream(ctx: Context, how: str) -> AsyncIterator[Any]:
    with ctx.resources["door"] as door:
        yield {"done": True}
        _through(door, how)
        if how == "waits":
            yield {"never": "heard"}


DOORS = [door_function, door_generator, door_async_function, door_async_generator, door_in_a_full_stream]
ENDINGS = [("ends", {}, None), ("raises", {}, "node_failed"), ("waits", {}, "cancelled"),
           ("waits", {"deadline_ms": 20}, "deadline_exceeded")]  # fmt: skip


@pytest.mark.parametrize("kind", DOORS)
@pytest.mark.parametrize(("how", "options", "code"), ENDINGS)
def test_what_a_node_opened_is_closed_however_it_ends(kind: Any, how: str, options: dict[str, Any], code: str) -> None:
    door = Door()

    async def check(bench: Bench) -> None:
        waits = how == "waits"
        room = anyio.Event()
        sink = Sink(room)
        if not waits:
            room.set()
        bench.demand(kind, sink, **options)
        if code != "deadline_exceeded":
            await door.opened.reached()
        if code == "cancelled":
            bench.cancel(sink)
        await sink.done.wait()
        assert (sink.failure and sink.failure.code) == code
        heard = list(sink.chunks)
        door.go_on.open()
        await bench.idle()
        if door.opened.is_open():  # a thread may be called off before it began
            await door.closed.reached()
        assert sink.chunks == heard  # nothing is heard after the end

    on_bench(check, declared(kind), data={"how": how}, door=door)


class SlowDoor(Door):
    """Closing it takes a turn of the loop."""

    async def __aenter__(self) -> SlowDoor:
        self.opened.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await anyio.lowlevel.checkpoint()
        self.closed.open()


async def slow_door(ctx: Context, how: str) -> str:
    async with ctx.resources["door"] as door:
        _through(door, how)
        if how == "waits":
            await anyio.sleep_forever()
    return "done"


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ("ends", None),
        ("raises", "node_failed"),
        ("waits", "cancelled"),
    ],
)
def test_cleaning_up_may_await(how: str, code: str | None) -> None:
    door = SlowDoor()

    async def check(bench: Bench) -> None:
        sink = bench.demand(slow_door)
        await door.opened.reached()
        if how == "waits":
            bench.cancel(sink)
        await sink.done.wait()
        await bench.idle()
        assert (sink.failure and sink.failure.code) == code and door.closed.is_open()

    on_bench(check, declared(slow_door), data={"how": how}, door=door)


CLEANUPS = [
    ValueError("late"),
    SystemExit(3),
    None,
]


@pytest.mark.parametrize("raised", CLEANUPS, ids=repr)
def test_a_cancelled_node_may_raise_or_return_what_it_likes(raised: BaseException | None) -> None:
    opened = anyio.Event()

    async def stubborn() -> str:
        try:
            opened.set()
            await anyio.sleep_forever()
        except asyncio.CancelledError:
            if raised is None:
                return "not me"
            raise raised from None
        raise AssertionError

    async def check(bench: Bench) -> None:
        sink = bench.demand(stubborn)
        await opened.wait()
        bench.cancel(sink)
        await bench.idle()
        assert sink.failure and sink.failure.code == "cancelled"
        assert await bench.demand(function).result() == {"output": "xx"}

    on_bench(check, declared(stubborn), declared(function), data={"text": "x"})


def test_a_thread_that_nobody_waits_for_hears_of_it() -> None:
    started, go_on, heard = Gate(), Gate(), []

    def works() -> None: ...

    def stops(ctx: Context) -> None:
        started.open()
        go_on.wait()
        heard.append(ctx.cancelled)
        try:
            ctx.emit_from_thread("x")
        except Cancelled as cancelled:
            heard.append(str(cancelled))

    async def check(bench: Bench) -> None:
        sink = bench.demand(stops)
        await started.reached()
        assert bench.executor.threads.in_flight == 1
        bench.cancel(sink)
        await sink.done.wait()
        assert bench.executor.threads.in_flight == 1  # its place is taken until it really ends
        go_on.open()
        await bench.idle()
        assert heard == [True, "nobody wants this node any more"] and sink.chunks == []

    on_bench(check, declared(stops))


# ------------------------------------------------------------------------------------------------ errors


def _broken_helper() -> None:
    raise LookupError("no such page")


def fails() -> str:
    try:
        _broken_helper()
    except LookupError as cause:
        raise RuntimeError("the book is torn") from cause
    return ""


def fails_in_stream() -> Iterator[str]:
    yield "half a "
    fails()


async def fails_async() -> str:
    return fails()


async def fails_in_async_stream() -> AsyncIterator[str]:
    yield "half a "
    fails()


@pytest.mark.parametrize(
    ("kind", "runs"),
    [(fails, "thread"), (fails, "inline"), *((k, None) for k in (fails_in_stream, fails_async, fails_in_async_stream))],
)
def test_an_exception_is_node_failed_with_its_traceback(kind: Any, runs: str | None) -> None:
    with pytest.raises(DemandportError) as caught:
        run(declared(kind, runs=runs))
    error = caught.value.to_wire()
    assert (error["code"], error["node"], error["retryable"]) == ("node_failed", kind.__name__, False)
    assert error["message"] == "RuntimeError: the book is torn"
    assert all(part in error["traceback"] for part in ("in _broken_helper", "LookupError: no such page", "in fails\n"))


@pytest.mark.parametrize("runs", ["inline", "thread"])
@pytest.mark.parametrize("raised", [Forbidden("not on Sundays"), TypeMismatch("wants tea", node="elsewhere")])
def test_an_error_of_the_tree_keeps_its_code(raised: DemandportError, runs: str) -> None:
    def refuses() -> None:
        raise raised

    with pytest.raises(type(raised)) as caught:
        run(declared(refuses, runs=runs))
    assert caught.value is raised and raised.node in ("refuses", "elsewhere")


def test_a_failure_is_not_kept_and_reaches_only_what_hangs_on_it() -> None:
    attempts: list[int] = []

    def flaky() -> str:
        attempts.append(1)
        if len(attempts) == 1:
            raise OSError("not yet")
        return "there"

    def after(text: str) -> str:
        return text.upper()

    def aside() -> str:
        return "fine"

    async def check(bench: Bench) -> None:
        sink = bench.demand(after)
        assert await bench.demand(aside).result() == {"output": "fine"}
        with pytest.raises(DemandportError, match="OSError: not yet") as caught:
            await sink.result()
        assert caught.value.node == "flaky"
        assert await bench.demand(after).result() == {"output": "THERE"}
        assert await bench.demand(flaky).result() == {"output": "there"} and len(attempts) == 2

    edges = [{"id": "e", "source": "flaky", "target": "after"}]
    on_bench(check, declared(flaky), declared(after), declared(aside), edges=edges)


class Speechless(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


class Final(BaseException):
    """As a library of its own mind has it."""


RAISED = [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError(), StopIteration(1),
          StopAsyncIteration(), MemoryError(), RecursionError(), Final("x"), ExceptionGroup("both", [ValueError()]),
          Speechless()]  # fmt: skip


def _worst_cases() -> Iterator[Any]:
    for style in ("inline", "function", "generator", "async_function", "async_generator"):
        for raised in RAISED:
            yield pytest.param(style, raised, id=f"{style}-{type(raised).__name__}")


@pytest.mark.parametrize(("style", "raised"), list(_worst_cases()))
def test_whatever_is_raised_fails_its_own_demand(style: str, raised: BaseException) -> None:
    def throws() -> None:
        raise raised

    def generator() -> Iterator[str]:
        yield "a"
        raise raised

    async def async_function() -> None:
        raise raised

    async def async_generator() -> AsyncIterator[str]:
        yield "a"
        raise raised

    kinds = {"inline": throws, "function": throws, "generator": generator, "async_function": async_function,
             "async_generator": async_generator}  # fmt: skip
    kind = declared(kinds[style], runs="inline" if style == "inline" else None)

    async def check(bench: Bench) -> None:
        with pytest.raises(DemandportError) as caught:
            await bench.demand(kind).result()
        assert caught.value.code == "node_failed" and caught.value.node == kind.__name__
        await bench.idle()
        assert await bench.demand(aside).result() == {"output": "fine"}

    def aside() -> str:
        return "fine"

    on_bench(check, kind, declared(aside))


class Mute:
    def __repr__(self) -> str:
        raise ValueError("no words")


def _nested(depth: int) -> Any:
    found: Any = []
    for _ in range(depth):
        found = [found]
    return found


@pytest.mark.parametrize("value", [object(), {1, 2}, 1j, b"bytes"])
def test_an_output_that_fits_no_port_after_it_is_a_mismatch(value: Any) -> None:
    _expect_mismatch(value)


@pytest.mark.parametrize("value", [{"a": Mute()}, _nested(100_000)], ids=["mute", "deep"])
def test_nor_does_an_output_that_cannot_be_shown_hurt_others(value: Any) -> None:
    _expect_mismatch(value)


def _expect_mismatch(value: Any) -> None:
    def gives() -> Any:
        return value

    def takes(text: str) -> str:
        return text

    async def check(bench: Bench) -> None:
        with pytest.raises(DemandportError) as caught:
            await bench.demand(takes).result()
        assert caught.value.code == "type_mismatch" and caught.value.node == "takes"
        assert "output" in await bench.demand(gives).result()

    edges = [{"id": "e", "source": "gives", "target": "takes"}]
    on_bench(check, declared(gives), declared(takes), edges=edges)


def test_a_text_in_a_json_port_stays_a_text() -> None:
    def gives() -> Any:
        return "12"

    def takes(found: dict[str, Any] | None) -> Any:
        return found

    async def check(bench: Bench) -> None:
        assert await bench.demand(takes).result() == {"output": "12"}

    edges = [{"id": "e", "source": "gives", "target": "takes"}]
    on_bench(check, declared(gives, outputs={"found": "json"}), declared(takes), edges=edges)


# ------------------------------------------------------------------------------------------------ packages

STUDIO = '''
from collections.abc import Iterator
from typing import Any
from demandport import Context, node

@node("shout", runs="inline", category="studio")
def shout(text: str, times: int = 1) -> str:
    """Upper-cases a text."""
    return text.upper() * times

@node("count-down", outputs={"text": "string", "last": "integer"})
def count_down(start: int) -> Iterator[str]:
    """Counts down."""
    for number in range(start, 0, -1):
        yield f"{number} "
    return {"last": number}

@node("stumble")
def stumble(text: str) -> str:
    raise RuntimeError(f"over {text}")

@node("leave")
async def leave(how: str) -> str:
    raise {"exit": SystemExit(3), "interrupt": KeyboardInterrupt()}[how]

@node("odd")
async def odd(ctx: Context, kind: str, way: str) -> Any:
    value = {"set": {1}, "surrogate": "\\ud800", "object": object(), "key": {1: 2}}[kind]
    if way == "returned":
        return value
    await ctx.emit("a", port="output")
    await ctx.emit(value, port="output")
    return "fine" if way == "streamed last" else await ctx.wait_input("way")
'''
MINIMAL = """
from demandport import node

@node("{name}")
def minimal(text: str = "") -> str:
    return text
"""


class Site:
    """A directory of installed packages, as pip leaves them: modules, and metadata with entry points."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.modules: list[str] = []

    def install(self, name: str, code: str, entry_points: str = "[demandport.nodes]\nnodes = {module}\n") -> Site:
        module = f"authored_{name}"
        self.modules.append(module)
        (self.folder / f"{module}.py").write_text(code)
        about = self.folder / f"{module}-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(entry_points.format(module=module))
        return self


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    found = Site(tmp_path / "site")
    monkeypatch.syspath_prepend(str(found.folder))
    yield found
    for module in found.modules:
        sys.modules.pop(module, None)


def _load() -> dict[str, NodeSpec]:
    try:
        return load_specs(BUILT_IN)
    except BaseException as escaped:  # a KeyboardInterrupt would end the tests
        pytest.fail(f"this keeps the service from starting: {escaped!r}")


def test_installed_packages_add_their_nodes(site: Site) -> None:
    site.install("studio", STUDIO).install("other", MINIMAL.format(name="t-other"))
    site.install("elsewhere", MINIMAL.format(name="t-elsewhere"), "[some.other.group]\nnodes = {module}\n")
    added = {"shout", "count-down", "stumble", "leave", "odd", "t-other"}
    assert set(_load()) == BUILT_INS.keys() | added == set(_load())


BROKEN: dict[str, Any] = {
    "raises": "raise RuntimeError('no GPU')",
    "does not parse": "def",
    "misses a module": "import a_module_that_nobody_has",
    "declares wrongly": "from demandport import node\n@node('x')\ndef f(*texts: str): ...",
    "names no module": ("", "[demandport.nodes]\nnodes = not a module!\n"),
    "names a missing module": ("", "[demandport.nodes]\nnodes = a_module_that_nobody_has\n"),
    "names a missing attribute": ("", "[demandport.nodes]\nnodes = {module}:nothing\n"),
    "exits": "import sys\nsys.exit('no licence')",
    "is interrupted": "raise KeyboardInterrupt",
    "raises past Exception": "class Final(BaseException): ...\nraise Final",
    "has torn metadata": ("", "[demandport.nodes]\nno equals sign\n"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_package_is_logged_and_the_others_work(how: str, site: Site, caplog: pytest.LogCaptureFixture) -> None:
    site.install("a", MINIMAL.format(name="t-before")).install("z", MINIMAL.format(name="t-after"))
    code = BROKEN[how]
    site.install("m", *([code] if isinstance(code, str) else code))
    specs = _load()
    assert {"text-input", "t-before", "t-after"} <= specs.keys()
    (record,) = [r for r in caplog.records if r.name == "demandport.engine.registry"]
    assert "could not be loaded" in record.getMessage() and record.exc_info


def test_a_package_that_fails_half_way_is_left_out_whole(site: Site) -> None:
    site.install("half", MINIMAL.format(name="t-half") + "raise RuntimeError('half way')")
    assert "t-half" not in _load()


def test_a_package_cannot_replace_a_built_in_node(site: Site) -> None:
    site.install("thief", MINIMAL.format(name="text-input"))
    assert _load()["text-input"].call.__module__ == "demandport.nodes.inputs"


# ------------------------------------------------------------------------------------------------ the service


ODD = ["set", "surrogate", "object", "key"]


def _error_of(service: ServiceProcess, node: str) -> tuple[str, str]:
    """Code and node of the error that a demand ends with."""
    id = service.new_id()
    service.send(["demand", id, "s", node])
    *streamed, end = service.until(is_terminal(id))
    assert end[0] == "demand_error", end
    assert [message[2] for message in streamed] in ([], ["a"])
    return end[2]["code"], end[2]["node"]


def test_nothing_an_author_does_ends_the_service(site: Site) -> None:
    """The same, once, with a process and a wire: exits, interrupts, and values that cannot travel."""
    site.install("studio", STUDIO).install("broken", "raise RuntimeError")
    leaving = [(how, "leave", {"how": how}) for how in ("exit", "interrupt")]
    odd = [(f"{kind} {way}", "odd", {"kind": kind, "way": way}) for kind in ODD for way in ("returned", "streamed")]
    with ServiceProcess(nodes=site.folder) as service:
        service.open("s", *leaving, *odd, ("fine", "shout", {"text": "owl", "times": 2.0}))
        for name, *_ in leaving:
            assert _error_of(service, name) == ("node_failed", name)
        for name, *_ in odd:
            assert _error_of(service, name) == ("type_mismatch", name)
        assert service.request("demand", "s", "fine")[2] == {"output": "OWLOWL"}


def test_a_last_chunk_that_cannot_travel_is_an_error_too(site: Site) -> None:
    with ServiceProcess(nodes=site.install("studio", STUDIO).folder) as service:
        service.open("s", ("last", "odd", {"kind": "set", "way": "streamed last"}))
        assert _error_of(service, "last") == ("type_mismatch", "last")


# ------------------------------------------------------------------------------------------------ the command line


def demandport(site: Site, *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the command, with the packages of `site` installed."""
    command = [sys.executable, "-m", "demandport", *arguments]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment(site.folder),
        timeout=TIMEOUT_S,
        stdin=subprocess.DEVNULL,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def studio(site: Site) -> Site:
    return site.install("studio", STUDIO)


@pytest.fixture
def graph(tmp_path: Path) -> Callable[..., str]:
    def write(*nodes: tuple[str, str, dict[str, Any]], edges: list[Any] | None = None) -> str:
        path = tmp_path / "graph.json"
        listed = [{"id": id, "node_type": node_type, "data": data} for id, node_type, data in nodes]
        path.write_text(json.dumps({"nodes": listed, "edges": edges or []}))
        return str(path)

    return write


def test_nodes_lists_what_authors_wrote(studio: Site) -> None:
    status, out, err = demandport(studio, "nodes")
    assert (status, err) == (0, "")
    assert "studio     shout: text!, times -> output\n             Upper-cases a text.\n" in out
    assert "custom     count-down: start! -> text, last\n" in out and "input      text-input: text -> text" in out
    studio.install("broken", "raise RuntimeError('no GPU')")
    status, out, err = demandport(studio, "nodes", "--json")
    assert status == 1 and "RuntimeError: no GPU" in err and "could not be loaded" in err
    (shout,) = [about for about in json.loads(out) if about["node_type"] == "shout"]
    assert [(port["name"], port["type"], port["required"], port["default"]) for port in shout["inputs"]] == [
        ("text", "string", True, None),
        ("times", "integer", False, 1),
    ]
    assert shout["runs"] == "inline" and [port["name"] for port in shout["outputs"]] == ["output"]


def test_an_odd_default_does_not_hide_the_other_node_types(site: Site) -> None:
    site.install("odd", "from demandport import node\n@node('odd')\ndef odd(x: object = object()) -> str: ...")
    status, out, _ = demandport(site, "nodes", "--json")
    assert status == 1 and "text-input" in out


def test_run_streams_then_prints_the_other_outputs(studio: Site, graph: Callable[..., str]) -> None:
    path = graph(("c", "count-down", {"start": 3}))
    assert demandport(studio, "run", path, "c") == (0, "3 2 1 \nlast: 1\n", "")
    status, out, err = demandport(studio, "run", path, "c", "--set", "c.start=2", "--events")
    assert status == 0 and out.startswith("2 1 \n") and out.endswith("last: 1\n")
    events = [json.loads(line)["event"] for line in err.splitlines()]
    assert events == ["demand_started", "task_started", "task_completed"]


def test_run_feeds_an_author_s_node(studio: Site, graph: Callable[..., str]) -> None:
    nodes = [("topic", "text-input", {"text": "cats"}), ("loud", "shout", {"times": 2})]
    path = graph(*nodes, edges=[{"source": "topic", "target": "loud"}])
    assert demandport(studio, "run", path, "loud") == (0, "output: CATSCATS\n", "")
    sets = ["--set", "topic.text=owls", "--set", "loud.times=1"]
    assert demandport(studio, "run", path, "loud", *sets) == (0, "output: OWLS\n", "")


FAILURES: list[Any] = [
    (("x", "stumble", {"text": "it"}), ["x"], 1, r"node_failed \(node x\): RuntimeError: over it\n"),
    (("x", "leave", {"how": "exit"}), ["x"], 1, r"node_failed \(node x\): SystemExit: 3\n"),
    (("x", "shout", {}), ["x"], 1, r"missing_input \(node x\): the port 'text' has no value; connect it"),
    (("x", "shout", {"text": "a"}), ["y"], 1, r"unknown_node \(node y\): the graph has no node 'y'\n"),
    (("x", "shout", {"text": "a"}), ["x", "--set", "x.times=1.5"], 1, r"type_mismatch.*'times'.*integer, not 1.5"),
    (("x", "shout", {"text": "a"}), ["x", "--set", "times=1"], 64, r"'times=1' is not NODE.PORT=VALUE"),
]


@pytest.mark.parametrize(("it", "arguments", "status", "says"), FAILURES)
def test_run_says_what_went_wrong(
    studio: Site, graph: Callable[..., str], it: Any, arguments: list[str], status: int, says: str
) -> None:
    found, out, err = demandport(studio, "run", graph(it), *arguments)
    assert (found, out) == (status, "") and re.search(says, err) and "Traceback" not in err, err


def test_graph_checks_and_draws_an_author_s_nodes(studio: Site, graph: Callable[..., str], tmp_path: Path) -> None:
    status, out, err = demandport(studio, "graph", graph(("x", "shout", {"text": "a"})))
    assert (status, err) == (0, "") and "shout" in out
    status, out, err = demandport(studio, "graph", graph(("x", "shout", {}), ("y", "nope", {})))
    assert status == 1 and "missing_input: the port 'text' of 'x' has no value; connect it" in err
    assert "unknown_node_type: nobody runs nodes of the type 'nope'; see node_types" in err
    (tmp_path / "torn.json").write_text("{")
    status, out, err = demandport(studio, "graph", str(tmp_path / "torn.json"))
    assert (status, out) == (64, "") and "torn.json: " in err


def test_a_reader_that_has_seen_enough_is_no_error(site: Site) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "demandport", "nodes"]
    with subprocess.Popen(command, stdout=write_end, stderr=subprocess.PIPE, env=environment(site.folder)) as process:
        os.close(write_end)
        assert process.communicate(timeout=TIMEOUT_S)[1] == b""
    assert process.returncode == 128 + signal.SIGPIPE
