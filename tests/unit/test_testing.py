"""What the package gives to people who test their nodes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
import pytest

from demandport import Context, node
from demandport.engine.node import DECLARED
from demandport.engine.registry import load_specs
from demandport.errors import (
    Cancelled,
    DeadlineExceeded,
    MissingInput,
    NodeFailed,
    TypeMismatch,
    UnknownNodeType,
    UnknownPort,
)
from demandport.inference.backend import ToolCall
from demandport.nodes import BUILT_IN
from demandport.testing import Bench, Heard, ScriptedBackend, run_graph, run_node
from support import TIMEOUT_S

load_specs(BUILT_IN)


@pytest.fixture(autouse=True)
def nodes() -> Iterator[None]:
    """Node types for these tests, unknown to others."""
    before = dict(DECLARED)

    @node("k-shout", runs="inline")
    def shout(text: str, times: int = 1) -> str:
        return text.upper() * times

    @node("k-words")
    def words(text: str) -> Iterator[str]:
        yield from text.split()

    @node("k-fail")
    def fail(x: int = 0) -> str:
        raise ValueError("odd")

    @node("k-wait", outputs={"text": "string"})
    async def wait(ctx: Context) -> None:
        await ctx.emit("begun")
        await anyio.sleep_forever()

    @node("k-values", outputs={"items": "json"})
    async def values(ctx: Context, count: int) -> AsyncIterator[int]:
        for number in range(count):
            ctx.event("about", number=number)
            yield number

    @node("k-lent")
    def lent(ctx: Context) -> Any:
        return ctx.resources["clock"]

    yield
    DECLARED.clear()
    DECLARED.update(before)


def graph(*nodes: tuple[str, str, dict[str, Any]], edges: list[Any] | None = None) -> dict[str, Any]:
    return {"nodes": [{"id": i, "node_type": t, "data": d} for i, t, d in nodes], "edges": edges or []}


def run(test: Any) -> None:
    async def limited() -> None:
        with anyio.fail_after(TIMEOUT_S):
            await test()

    anyio.run(limited)


# ----------------------------------------------------------------------------------------------------- one node


def test_a_node_by_name_and_by_function() -> None:
    assert run_node("k-shout", {"text": "hi", "times": 2}).outputs == {"output": "HIHI"}
    assert run_node(DECLARED["k-shout"].call, {"text": "hi"}).outputs == {"output": "HI"}
    with pytest.raises(TypeError, match="put @node before it"):
        run_node(len, {})


def test_inputs_keep_the_rules() -> None:
    assert run_node("k-shout", {"times": 2.0}, data={"text": "a"}).outputs == {"output": "AA"}
    with pytest.raises(MissingInput):
        run_node("k-shout")
    with pytest.raises(TypeMismatch):
        run_node("k-shout", {"text": "hi", "times": "two"})
    with pytest.raises(UnknownPort):
        run_node("k-shout", {"texts": "hi"})
    with pytest.raises(UnknownNodeType):
        run_node("k-nobody")


def test_what_streams_and_what_is_told() -> None:
    result = run_node("k-words", {"text": "one two"})
    assert result.chunks == [("node", "output", "one"), ("node", "output", "two")]
    assert result.text == "onetwo" == result.outputs["output"]
    result = run_node("k-values", {"count": 2})
    assert result.outputs == {"items": [0, 1]} and result.text == ""
    assert [event["number"] for event in result.events if event["event"] == "about"] == [0, 1]


def test_a_failure_is_raised_as_the_host_would_be_told() -> None:
    with pytest.raises(NodeFailed, match="odd") as failed:
        run_node("k-fail")
    assert failed.value.node == "node"
    assert "ValueError" in (failed.value.traceback or "")
    with pytest.raises(DeadlineExceeded):
        run_node("k-wait", deadline_ms=20)
    with pytest.raises(TimeoutError):
        run_node("k-wait", timeout_s=0.02)


def test_what_the_test_lends() -> None:
    assert run_node("k-lent", resources={"clock": 12}).outputs == {"output": 12}


# ------------------------------------------------------------------------------------------------------ a graph


def test_a_graph() -> None:
    whole = graph(
        ("in", "text-input", {"text": "cats"}),
        ("it", "k-shout", {"times": 2}),
        edges=[{"source": "in", "target": "it", "target_handle": "text"}],
    )
    assert run_graph(whole, "it").outputs == {"output": "CATSCATS"}
    assert run_graph(whole, "it", {"in": {"text": "owls"}, "it": {"times": 1}}).outputs == {"output": "OWLS"}


def test_a_branch_not_taken_is_skipped() -> None:
    whole = graph(
        ("if", "conditional", {"condition": False, "value": 1}),
        ("out", "text-output", {}),
        edges=[{"source": "if", "source_handle": "true_out", "target": "out"}],
    )
    assert run_graph(whole, "out").skipped


# ------------------------------------------------------------------------------------------------------- models


def test_a_scripted_backend_answers_in_place_of_models() -> None:
    backend = ScriptedBackend("Cats sleep.", "Owls hunt.")
    asked = {"model_path": "no-such-model", "prompt": "cats?"}
    result = run_node("llamacpp-inference", asked, backend=backend)
    assert result.outputs["response"] == result.text == "Cats sleep."
    assert len(result.chunks) == 2
    assert backend.asked[0].prompt == "cats?"
    assert backend.closed
    result = run_node("llm-inference", {"prompt": "owls?"}, backend=backend)
    assert result.outputs["response"] == "Owls hunt."


def test_a_scripted_backend_may_call_tools_and_raise() -> None:
    backend = ScriptedBackend(ToolCall("1", "weather", '{"city": "Rome"}'))
    called = run_node("llm-inference", {"prompt": "?", "model": "any"}, backend=backend).outputs["tool_calls"]
    assert called[0]["name"] == "weather"

    def refuse(request: Any) -> str:
        raise NodeFailed(f"not this: {request.prompt}")

    with pytest.raises(NodeFailed, match="not this: x"):
        run_node("llm-inference", {"prompt": "x"}, backend=ScriptedBackend(refuse))
    with pytest.raises(TypeMismatch, match="seed"):
        run_node("llm-inference", {"prompt": "x", "seed": 1}, backend=ScriptedBackend("y", honours={"max_tokens"}))


def test_a_scripted_backend_embeds() -> None:
    result = run_node("embedding", {"text": "abc"}, backend=ScriptedBackend("-"))
    assert result.outputs["metadata"]["dimensions"] == 2


# ------------------------------------------------------------------------------------------ while a demand runs


def test_a_demand_is_cancelled_and_others_go_on() -> None:
    async def test() -> None:
        async with Bench() as bench:
            session = bench.open(graph(("wait", "k-wait", {}), ("it", "k-shout", {"text": "a"})))
            heard = bench.demand(session, "wait")
            await heard.until(lambda heard: heard.chunks)
            heard.cancel()
            heard.cancel()
            with pytest.raises(Cancelled):
                await heard.result()
            assert (await bench.demand(session, "it").result()).outputs == {"output": "A"}
            with pytest.raises(AssertionError, match="the demand has ended"):
                await heard.until(lambda heard: len(heard.chunks) > 1)

    run(test)


def test_a_consumer_that_takes_nothing_holds_up_values() -> None:
    async def test() -> None:
        async with Bench() as bench:
            session = bench.open(graph(("it", "k-values", {"count": 100})))
            heard = bench.demand(session, "it", hold=True)
            # The first value is on its way already; the node is held up at the second.
            await heard.until(lambda heard: [e for e in heard.events if e["event"] == "about"])
            for _ in range(100):
                await anyio.lowlevel.checkpoint()
            assert len(heard.chunks) <= 1
            heard.release()
            assert (await heard.result()).outputs == {"items": list(range(100))}

    run(test)


def test_an_edit_makes_stale_and_the_cache_answers() -> None:
    async def test() -> None:
        async with Bench() as bench:
            session = bench.open(graph(("it", "k-words", {"text": "a b"})))
            assert (await bench.demand(session, "it").result()).chunks
            assert (await bench.demand(session, "it").result()).chunks == []
            assert session.edit([{"op": "set_input", "node": "it", "port": "text", "value": "c"}]) == ["it"]
            assert (await bench.demand(session, "it").result()).text == "c"

    run(test)


def test_what_a_test_raises_is_what_it_raised_and_nothing_is_left() -> None:
    left: list[Heard] = []

    async def test() -> None:
        async with Bench() as bench:
            left.append(bench.demand(bench.open(graph(("wait", "k-wait", {}))), "wait"))
            raise LookupError("the test's own")

    with pytest.raises(LookupError, match="the test's own"):
        run(test)
    assert isinstance(left[0]._outcome.exception(), Cancelled)
