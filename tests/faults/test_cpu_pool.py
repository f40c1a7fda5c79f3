"""Nodes in worker processes: whatever one does to its worker, or somebody else does, hurts only the demand that wanted
it; the places in the pool are free again afterwards, and the next demand is served."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest

import cpu_nodes
from demandport import node
from demandport.engine.cpu import CpuNodes
from demandport.engine.executor import Executor
from demandport.engine.node import DECLARED
from demandport.engine.session import Session
from demandport.errors import DemandportError, Draining
from demandport.workers.limits import Limits
from sink import Sink
from stray import WAYS
from support import (
    ROOT,
    TIMEOUT_S,
    Ended,
    ServiceProcess,
    environment,
    eventually,
    family,
    gone,
    is_terminal,
    run_within,
)

#: A grace that never ends, so that what comes after it does not come.
NEVER_S = 3600.0
AT_ONCE = Limits(ask_s=0.0, interrupt_s=0.0)
SPECS = {name: spec for name, spec in DECLARED.items() if spec.call.__module__ == cpu_nodes.__name__}
for name in SPECS:  # other tests look at all that is declared
    del DECLARED[name]


@pytest.fixture(autouse=True)
def declared() -> Iterator[None]:
    """The nodes of `cpu_nodes` are declared, and what a test declares is forgotten."""
    before = dict(DECLARED)
    DECLARED.update(SPECS)
    yield
    DECLARED.clear()
    DECLARED.update(before)


class Lab:
    """An executor with real workers, and sessions of one node each."""

    def __init__(self, tasks: Any, cpu: CpuNodes) -> None:
        self.executor = Executor(tasks, {}, cpu=cpu)
        self.pool = cpu.pool

    def demand(self, kind: str, data: dict[str, Any] | None = None, **options: Any) -> Sink:
        graph = {"nodes": [{"id": "a", "node_type": kind, "data": data or {}}], "edges": []}
        sink = Sink(options.pop("room", None))
        session = Session(graph, SPECS | {kind: DECLARED[kind]}, self.executor)
        sink.demand = session.demand("a", sink, lambda _: None, **options)
        sink.cancel = lambda: session.cancel(sink.demand)  # type: ignore[attr-defined]
        return sink

    async def value(self, node_type: str, /, **data: Any) -> Any:
        return next(iter((await self.demand(node_type, data).result()).values()))

    async def begun(self, node_type: str, /, **data: Any) -> Sink:
        """A demand whose node runs."""
        sink = self.demand(node_type, data)
        await until(lambda: sink.chunks or sink.failure)
        assert sink.failure is None, sink.failure
        return sink

    def workers(self) -> list[dict[str, Any]]:
        return self.pool.health()["workers"]

    def busy(self) -> list[dict[str, Any]]:
        return [worker for worker in self.workers() if worker["in_flight"]]

    async def is_well(self) -> None:
        """Every place is free again, and the next demands are served."""
        await until(lambda: self.executor.running == self.pool.in_flight == self.pool.health()["queued"] == 0)
        found = [self.demand("c-echo", {"value": number}) for number in range(self.pool.size)]
        assert [await sink.result() for sink in found] == [{"output": number} for number in range(self.pool.size)]
        await until(lambda: self.pool.in_flight == 0)

    async def all_up(self) -> None:
        while any(worker["state"] != "idle" for worker in self.workers()):
            await asyncio.gather(*(self.demand("c-pid").result() for _ in range(self.pool.size)))


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():
            await asyncio.sleep(0.002)


@asynccontextmanager
async def lab(size: int = 1, **options: Any) -> AsyncIterator[Lab]:
    async with anyio.create_task_group() as tasks:
        made = Lab(tasks, CpuNodes(size, **options))
        try:
            yield made
        finally:
            await made.executor.close()
            tasks.cancel_scope.cancel()


def with_lab(check: Callable[[Lab], Awaitable[None]], size: int = 1, **options: Any) -> None:
    async def main() -> None:
        async with lab(size, **options) as made:
            await check(made)

    run_within(TIMEOUT_S, main())


class FileGate:
    """A FIFO that a node reads to its end: what it gets, and when, the test says."""

    def __init__(self, folder: Path, name: str = "held") -> None:
        self.path = str(folder / name)
        os.mkfifo(self.path)

    async def open(self, text: str = "on") -> None:
        await asyncio.to_thread(Path(self.path).write_text, text)


# ------------------------------------------------------------------------------------------- what runs there


@pytest.mark.parametrize(
    "value", [None, True, -1, 1 << 80, 1.5, "é", b"\xff", [1, [2]], {"a": {"b": []}}], ids=lambda v: type(v).__name__
)
def test_values_come_back_as_they_went(value: Any) -> None:
    async def check(lab: Lab) -> None:
        assert await lab.value("c-echo", value=[value]) == [value]

    with_lab(check)


def test_no_process_is_there_before_the_first_node_and_nodes_run_in_another() -> None:
    async def check(lab: Lab) -> None:
        assert [worker["state"] for worker in lab.workers()] == ["stopped"] * 3
        assert not psutil.Process().children()
        assert await lab.value("c-pid") not in (0, os.getpid())
        assert [worker["state"] for worker in lab.workers()] == ["idle", "stopped", "stopped"]

    with_lab(check, 3)


def test_a_context_says_the_same_as_in_the_service(caplog: pytest.LogCaptureFixture) -> None:
    async def check(lab: Lab) -> None:
        with caplog.at_level(logging.INFO):
            sink = lab.demand("c-about", events=True, deadline_ms=3_600_000, priority=7)
            outputs = await sink.result()
        remaining = outputs.pop("remaining")
        assert outputs == {"node": "a", "priority": 7, "type": "c-about"} and 0 < remaining < 3600
        told = [(event["event"], event.get("done"), event.get("fact")) for event in sink.events]
        assert ("task_progress", 1, None) in told and ("own", None, [1, {"a": None}]) in told
        record = next(record for record in caplog.records if record.name == "node.c-about")
        assert record.levelname == "WARNING" and record.metadata == {"node": "a", "fact": "3"}  # type: ignore[attr-defined]
        assert (await lab.demand("c-about").result())["remaining"] is None

    with_lab(check)


def test_generators_stream() -> None:
    async def check(lab: Lab) -> None:
        sink = lab.demand("c-chunks", {"chunks": ["a", "b", "é"]})
        assert await sink.result() == {"text": "abé"} and sink.chunks == [("text", "a"), ("text", "b"), ("text", "é")]
        sink = lab.demand("c-returns", {"count": 100})
        assert await sink.result() == {"items": list(range(100)), "sum": 4950}
        assert sink.chunks == [("items", number) for number in range(100)]
        assert await lab.value("c-chunks", chunks=[]) == ""

    with_lab(check)


def test_a_consumer_without_room_holds_up_the_producer(tmp_path: Path) -> None:
    counter = tmp_path / "counter"

    async def check(lab: Lab) -> None:
        room = anyio.Event()
        sink = lab.demand("c-flood", {"count": 1000, "counter": str(counter)}, room=room)
        await sink.asked_for_room.wait()
        worker = psutil.Process(lab.busy()[0]["os_pid"])
        await until(lambda: worker.status() == psutil.STATUS_SLEEPING and counter.stat().st_size)
        written = counter.stat().st_size
        assert len(sink.chunks) == 1 and written < 32
        room.set()
        assert len((await sink.result())["items"]) == len(sink.chunks) == counter.stat().st_size == 1000

    with_lab(check)


@pytest.mark.parametrize("kind", ["set", "object", "intkey", "surrogate"])
@pytest.mark.parametrize("node_type", ["c-value", "c-chunk"])
def test_what_cannot_travel_is_an_error_of_its_node(node_type: str, kind: str) -> None:
    async def check(lab: Lab) -> None:
        with pytest.raises(DemandportError) as wrong:
            await lab.value(node_type, kind=kind)
        assert (wrong.value.code, wrong.value.node) == ("type_mismatch", "a")
        assert (await lab.value("c-pid")) == lab.workers()[0]["os_pid"] and lab.workers()[0]["restarts"] == 0

    with_lab(check)


def test_inputs_that_cannot_travel_or_are_too_large_start_no_worker() -> None:
    async def check(lab: Lab) -> None:
        for value, code in [({1}, "type_mismatch"), (bytes((64 << 20) + 1), "too_large")]:
            with pytest.raises(DemandportError) as wrong:
                await lab.value("c-echo", value=value)
            assert (wrong.value.code, wrong.value.node) == (code, "a")
        assert lab.workers()[0]["state"] == "stopped"
        with pytest.raises(DemandportError) as wrong:
            await lab.value("c-value", kind="large")
        assert wrong.value.code == "too_large"
        await lab.is_well()

    with_lab(check)


def test_what_a_node_raises_comes_with_its_traceback() -> None:
    async def check(lab: Lab) -> None:
        for what, said in [("ValueError", "ValueError: "), ("exit", "SystemExit: 3")]:
            with pytest.raises(DemandportError) as wrong:
                await lab.value("c-raise", what=what)
            assert (wrong.value.code, wrong.value.node) == ("node_failed", "a") and said in wrong.value.message
            assert "in fail" in (wrong.value.traceback or "") and "cpu_nodes.py" in (wrong.value.traceback or "")
        health = lab.workers()[0]
        assert (health["errored"], health["completed"], health["crashed"], health["restarts"]) == (2, 0, 0, 0)

    with_lab(check)


@pytest.mark.parametrize(("what", "said"), [("resources", "gateway"), ("wait_input", "wait_input"), ("port", "'nope'")])
def test_what_a_worker_does_not_have_is_said(what: str, said: str) -> None:
    async def check(lab: Lab) -> None:
        with pytest.raises(DemandportError, match=said) as wrong:
            await lab.value("c-reach", what=what)
        assert wrong.value.code == "node_failed"

    with_lab(check)


def test_a_module_that_a_worker_cannot_have_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "poison_nodes.py").write_text(
        "import os, sys\nfrom demandport import node\n"
        "if sys.argv[0].endswith('cpu_worker.py'):\n    exec(os.environ['POISON'])\n"
        "@node('c-poison', runs='cpu')\ndef poison() -> str:\n    return 'well'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    poisons = [("raise ImportError('no such library')", "node_failed", "no such library"),
               ("sys.exit(1)", "node_failed", "SystemExit"), ("os._exit(9)", "worker_crash", "status 9"),
               ("import signal; signal.raise_signal(signal.SIGSEGV)", "worker_crash", "SIGSEGV")]  # fmt: skip

    async def check(lab: Lab) -> None:
        __import__("poison_nodes")
        for poison, code, said in poisons:
            os.environ["POISON"] = poison
            await lab.pool.swap()
            with pytest.raises(DemandportError, match=said) as wrong:
                await lab.value("c-poison")
            assert (wrong.value.code, wrong.value.node) == (code, "a")
            await lab.is_well()
        os.environ["POISON"] = "pass"
        await lab.pool.swap()
        assert await lab.value("c-poison") == "well"

    monkeypatch.setenv("POISON", "pass")
    try:
        with_lab(check)
    finally:
        sys.modules.pop("poison_nodes", None)


def test_an_import_is_not_interrupted_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, gate = FileGate(tmp_path, "begun"), FileGate(tmp_path)
    (tmp_path / "slow_nodes.py").write_text(
        "import sys\nfrom demandport import node\n"
        "if sys.argv[0].endswith('cpu_worker.py'):\n"
        "    if hasattr(sys, 'began'):\n        raise ImportError('cannot load module more than once per process')\n"
        f"    sys.began = True\n    open({begun.path!r}, 'w').close()\n    open({gate.path!r}).read()\n"
        "@node('c-slow', runs='cpu')\ndef slow() -> str:\n    return 'well'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    async def check(lab: Lab) -> None:
        __import__("slow_nodes")
        sink = lab.demand("c-slow")
        await asyncio.to_thread(Path(begun.path).read_text)
        await _cancelled(sink)
        await gate.open()
        await until(lambda: lab.pool.in_flight == 0)
        assert await lab.value("c-slow") == "well"
        assert lab.workers()[0]["restarts"] == 0

    try:
        with_lab(check, limits=Limits(ask_s=0.0, interrupt_s=NEVER_S))
    finally:
        sys.modules.pop("slow_nodes", None)


def test_a_node_that_its_module_does_not_declare_at_the_top_is_said() -> None:
    @node("c-local", runs="cpu")
    def local() -> str:
        return ""

    @node("c-main", runs="cpu")
    def main() -> str:
        return ""

    main.__module__ = "__main__"
    local.__module__ = "cpu_nodes"

    async def check(lab: Lab) -> None:
        for kind, said in [("c-local", "at the top of the module"), ("c-main", "main program")]:
            with pytest.raises(DemandportError, match=said) as wrong:
                await lab.value(kind)
            assert wrong.value.code == "node_failed"

    with_lab(check)


def test_a_fork_of_a_worker_is_not_the_worker() -> None:
    async def check(lab: Lab) -> None:
        sink = lab.demand("c-fork")
        assert await sink.result() == {"text": "one"} and sink.chunks == [("text", "one")]
        await lab.is_well()
        assert lab.workers()[0]["restarts"] == 0

    with_lab(check)


# --------------------------------------------------------------------------------------------- ends of workers


def test_one_of_three_is_killed_under_load(tmp_path: Path) -> None:
    gates = [FileGate(tmp_path, name) for name in "abc"]

    async def check(lab: Lab) -> None:
        held = [await lab.begun("c-hold", gate=gate.path) for gate in gates]
        waiting = [lab.demand("c-echo", {"value": number}) for number in range(20)]
        before = lab.workers()
        os.kill(before[1]["os_pid"], signal.SIGKILL)
        with pytest.raises(DemandportError, match=r"cpu-1 died .*SIGKILL") as wrong:
            await held[1].result()
        assert (wrong.value.code, wrong.value.retryable, wrong.value.node) == ("worker_crash", True, "a")
        # The one that was put in its place does all that waits; the others still run theirs.
        assert [(await sink.result())["output"] for sink in waiting] == list(range(20))
        after = lab.workers()
        assert [worker["id"] for worker in after] == ["cpu-0", "cpu-1", "cpu-2"]
        assert [worker["os_pid"] == old["os_pid"] for worker, old in zip(after, before, strict=True)] == [1, 0, 1]
        assert [(worker["crashed"], worker["restarts"]) for worker in after] == [(0, 0), (1, 1), (0, 0)]
        for number in (0, 2):
            await gates[number].open()
            assert await held[number].result() == {"text": "begunon"}
        await lab.is_well()

    with_lab(check, 3)


@pytest.mark.parametrize("how", ["exit", "SIGSEGV", "SIGABRT", "SIGKILL", "SIGTERM"])
def test_a_node_that_ends_its_worker_is_run_once(how: str) -> None:
    async def check(lab: Lab) -> None:
        sink = lab.demand("c-die", {"how": how})
        with pytest.raises(DemandportError, match="cpu-0 died") as wrong:
            await sink.result()
        assert (wrong.value.code, wrong.value.retryable) == ("worker_crash", True)
        assert sink.chunks == [("text", "begun")]
        await lab.is_well()
        health = lab.workers()[0]
        assert (health["crashed"], health["restarts"], health["state"]) == (1, 1, "idle")

    with_lab(check)


def test_a_node_that_ends_every_worker_again_and_again_keeps_no_other_from_running() -> None:
    async def check(lab: Lab) -> None:
        for _ in range(9):
            with pytest.raises(DemandportError, match="died"):
                await lab.value("c-die")
        assert {worker["state"] for worker in lab.workers()} <= {"quarantined", "idle", "starting", "crashed"}
        await lab.is_well()

    with_lab(check, 2)


def test_an_idle_worker_that_dies_comes_back() -> None:
    async def check(lab: Lab) -> None:
        await lab.is_well()
        old = lab.workers()[0]["os_pid"]
        os.kill(old, signal.SIGKILL)
        await until(lambda: lab.workers()[0]["state"] == "idle" and lab.workers()[0]["os_pid"] != old)
        await lab.is_well()

    with_lab(check)


def test_workers_that_never_get_ready_fail_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check(lab: Lab) -> None:
        monkeypatch.setattr(sys, "executable", shutil.which("false"))
        for _ in range(2):
            with pytest.raises(DemandportError, match="gets ready: exited with status 1") as wrong:
                await lab.value("c-echo")
            assert wrong.value.code == "worker_crash"
        assert {worker["state"] for worker in lab.workers()} == {"quarantined"}

    with_lab(check, 2)


def test_memory_over_the_limit_ends_the_task_and_its_worker_alone(tmp_path: Path) -> None:
    gate, never = FileGate(tmp_path), FileGate(tmp_path, "never")
    limits = Limits(memory_bytes=200 << 20, memory_check_s=0.01)

    async def check(lab: Lab) -> None:
        other = await lab.begun("c-hold", gate=gate.path)
        with pytest.raises(DemandportError, match="MiB of memory") as wrong:
            await lab.value("c-eat", count=300 << 20, gate=never.path)
        assert (wrong.value.code, wrong.value.node) == ("out_of_memory", "a")
        await until(lambda: lab.pool.in_flight == 1)
        assert await lab.value("c-eat", count=1 << 20) == 1 << 20
        assert [(worker["restarts"], worker["crashed"]) for worker in lab.workers()] == [(0, 0), (1, 0)]
        await gate.open()
        assert await other.result() == {"text": "begunon"}
        await lab.is_well()

    with_lab(check, 2, limits=limits)


@pytest.mark.parametrize("limits", [Limits(recycle_tasks=3), Limits(recycle_bytes=1)], ids=["tasks", "memory"])
def test_used_up_workers_are_replaced_while_others_run(limits: Limits, tmp_path: Path) -> None:
    gate = FileGate(tmp_path)

    async def check(lab: Lab) -> None:
        held = await lab.begun("c-hold", gate=gate.path)
        pids = [await lab.value("c-pid") for _ in range(7)]
        used = {pid: pids.count(pid) for pid in pids}
        assert list(used.values()) == ([3, 3, 1] if limits.recycle_tasks else [1] * 7)
        await gate.open()
        assert await held.result() == {"text": "begunon"}
        await lab.is_well()
        assert [worker["crashed"] for worker in lab.workers()] == [0, 0]

    with_lab(check, 2, limits=limits)


# --------------------------------------------------------------------------------------------------- cancelling


async def _cancelled(sink: Sink) -> None:
    sink.cancel()  # type: ignore[attr-defined]
    assert sink.failure is not None and sink.failure.code == "cancelled"  # at once


def test_a_node_that_is_asked_to_end_ends(tmp_path: Path) -> None:
    gate = FileGate(tmp_path)

    async def check(lab: Lab) -> None:
        await _cancelled(await lab.begun("c-polite", gate=gate.path))
        await until(lambda: lab.executor.running == 0)
        assert lab.pool.in_flight == 1, "its worker is not free yet"
        await asyncio.to_thread(Path(gate.path).read_text)
        await lab.is_well()
        assert lab.workers()[0]["restarts"] == 0

    with_lab(check, limits=Limits(ask_s=NEVER_S))


@pytest.mark.parametrize("how", ["loop", "sleep", "regex"])
def test_a_node_that_does_not_listen_is_interrupted(how: str) -> None:
    async def check(lab: Lab) -> None:
        await _cancelled(await lab.begun("c-deaf", how=how))
        await lab.is_well()
        health = lab.workers()[0]
        assert (health["restarts"], health["crashed"], health["errored"]) == (0, 0, 0)

    with_lab(check, limits=Limits(ask_s=0.0, interrupt_s=NEVER_S))


@pytest.mark.parametrize("how", ["blocks", "ignores", "in_c", "catches"])
def test_a_node_that_takes_no_interrupt_is_killed_and_nobody_else_is(how: str, tmp_path: Path) -> None:
    gate = FileGate(tmp_path)

    async def check(lab: Lab) -> None:
        neighbour = await lab.begun("c-hold", gate=gate.path)
        old = lab.workers()[0]["os_pid"]
        await _cancelled(await lab.begun("c-stubborn", how=how))
        await until(lambda: lab.pool.in_flight == 1)
        health = lab.workers()
        assert [(one["restarts"], one["crashed"]) for one in health] == [(0, 0), (1, 0)] and health[0]["os_pid"] == old
        await gate.open()
        assert await neighbour.result() == {"text": "begunon"}
        await lab.is_well()

    with_lab(check, 2, limits=AT_ONCE)


def test_a_worker_that_is_stopped_is_replaced_on_cancel() -> None:
    async def check(lab: Lab) -> None:
        sink = await lab.begun("c-deaf")
        os.kill(lab.workers()[0]["os_pid"], signal.SIGSTOP)
        await _cancelled(sink)
        await lab.is_well()
        assert lab.workers()[0]["restarts"] == 1

    with_lab(check, limits=AT_ONCE)


def test_interrupts_between_tasks_and_blocked_ones_hurt_nobody() -> None:
    async def check(lab: Lab) -> None:
        await lab.is_well()
        for _ in range(20):
            os.kill(lab.workers()[0]["os_pid"], signal.SIGINT)
            assert await lab.value("c-blocks-and-returns") == "done"
        sink = await lab.begun("c-deaf")  # and the next one can be interrupted
        await _cancelled(sink)
        await lab.is_well()
        assert lab.workers()[0]["restarts"] == 0

    with_lab(check, limits=Limits(ask_s=0.0, interrupt_s=NEVER_S))


def test_a_storm_of_interrupts_tears_no_frame() -> None:
    """Interrupts at any moment, also while half a frame fills the pipe: a task ends well or as interrupted, and what it
    said are whole frames, in order."""

    async def check(lab: Lab) -> None:
        await lab.is_well()
        worker = lab.workers()[0]["os_pid"]
        ended = 0
        for _ in range(30):
            sink = lab.demand("c-flood", {"count": 20, "padding": 400_000})
            while not sink.done.is_set():
                os.kill(worker, signal.SIGINT)
                await asyncio.sleep(0)
            assert sink.failure is None or sink.failure.code == "cancelled"
            ended += sink.failure is None
            assert [chunk["n"] for _, chunk in sink.chunks] == list(range(len(sink.chunks)))
        await lab.is_well()
        assert (lab.workers()[0]["os_pid"], lab.workers()[0]["restarts"]) == (worker, 0) and ended < 30

    with_lab(check)


def test_one_that_waits_for_a_worker_leaves_the_queue_when_it_is_cancelled(tmp_path: Path) -> None:
    gate = FileGate(tmp_path)

    async def check(lab: Lab) -> None:
        held = await lab.begun("c-hold", gate=gate.path)
        first, second = lab.demand("c-die"), lab.demand("c-pid")
        await until(lambda: lab.pool.health()["queued"] == 2)
        await _cancelled(first)
        await until(lambda: lab.pool.health()["queued"] == 1)
        await gate.open()
        assert (await held.result(), list(await second.result())) == ({"text": "begunon"}, ["output"])
        await lab.is_well()
        assert lab.workers()[0]["restarts"] == 0

    with_lab(check)


def test_a_producer_that_waits_for_its_consumer_can_be_cancelled() -> None:
    async def check(lab: Lab) -> None:
        sink = lab.demand("c-flood", {"count": 1000}, room=anyio.Event())
        await sink.asked_for_room.wait()
        await _cancelled(sink)
        await lab.is_well()
        assert lab.workers()[0]["restarts"] == 0

    with_lab(check, limits=Limits(ask_s=NEVER_S))


def test_a_deadline_ends_the_demand_and_frees_the_worker() -> None:
    async def check(lab: Lab) -> None:
        sink = lab.demand("c-deaf", deadline_ms=20)
        with pytest.raises(DemandportError) as wrong:
            await sink.result()
        assert wrong.value.code == "deadline_exceeded"
        await lab.is_well()

    with_lab(check, limits=Limits(ask_s=0.0, interrupt_s=NEVER_S))


# ------------------------------------------------------------------------------------------- the pool as a whole


def test_a_full_queue_refuses_at_once_and_names_the_pool(tmp_path: Path) -> None:
    gate = FileGate(tmp_path)

    async def check(lab: Lab) -> None:
        held = await lab.begun("c-hold", gate=gate.path)
        waiting = [lab.demand("c-pid") for _ in range(2)]
        await until(lambda: lab.pool.health()["queued"] == 2)
        with pytest.raises(DemandportError, match="the pool 'cpu'") as wrong:
            await lab.demand("c-pid").result()
        assert (wrong.value.code, wrong.value.retryable) == ("queue_full", True)
        health = lab.pool.health()
        assert {name: health[name] for name in ("size", "in_flight", "queued", "max_queued")} == {
            "size": 1, "in_flight": 1, "queued": 2, "max_queued": 2}  # fmt: skip
        assert health["workers"][0]["state"] == "busy" and health["workers"][0]["memory_bytes"] > 1 << 20
        await gate.open()
        await held.result()
        for sink in waiting:
            await sink.result()
        await lab.is_well()

    with_lab(check, max_queued=2)


def test_swap_replaces_every_worker_and_loses_nothing(tmp_path: Path) -> None:
    gate = FileGate(tmp_path)

    async def check(lab: Lab) -> None:
        await lab.all_up()
        before = {worker["os_pid"] for worker in lab.workers()}
        held = await lab.begun("c-hold", gate=gate.path)
        sinks = [lab.demand("c-echo", {"value": number}) for number in range(50)]
        swapping = asyncio.create_task(lab.pool.swap())
        assert [(await sink.result())["output"] for sink in sinks] == list(range(50))
        assert not swapping.done(), "one of them still has a task"
        await gate.open()
        assert await held.result() == {"text": "begunon"}
        await swapping
        after = lab.workers()
        assert not before & {worker["os_pid"] for worker in after}
        assert [(worker["restarts"], worker["crashed"]) for worker in after] == [(1, 0), (1, 0)]
        await lab.is_well()

    with_lab(check, 2)


def test_drain_waits_for_what_is_there_and_takes_no_more(tmp_path: Path) -> None:
    gate = FileGate(tmp_path)

    async def check(lab: Lab) -> None:
        held, waiting = await lab.begun("c-hold", gate=gate.path), lab.demand("c-pid")
        await until(lambda: lab.pool.health()["queued"] == 1)
        assert not await lab.pool.drain(0.0)
        with pytest.raises(Draining):
            await lab.demand("c-pid").result()
        draining = asyncio.create_task(lab.pool.drain(TIMEOUT_S))
        await gate.open()
        assert await draining
        await held.result()
        await waiting.result()

    with_lab(check)


def test_close_ends_what_runs_and_what_waits(tmp_path: Path) -> None:
    gate = FileGate(tmp_path)

    async def check(lab: Lab) -> None:
        held, waiting = await lab.begun("c-hold", gate=gate.path), lab.demand("c-pid")
        await until(lambda: lab.pool.health()["queued"] == 1)
        await lab.executor.close()
        for sink in (held, waiting):
            with pytest.raises(DemandportError, match="closed"):
                await sink.result()

    with_lab(check)


# ------------------------------------------------------------------------------------------- through the service


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installed package that declares the nodes of `cpu_nodes`."""
    folder = tmp_path_factory.mktemp("cpu")
    for name in ("cpu_nodes.py", "stray.py"):
        shutil.copy(ROOT / "tests" / name, folder)
    about = folder / "cpu_nodes-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: cpu-nodes\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[demandport.nodes]\ntests = cpu_nodes\n")
    return folder


@pytest.fixture
def service(package: Path) -> Iterator[ServiceProcess]:
    with ServiceProcess(nodes=package) as process:
        yield process


def cpu_health(service: ServiceProcess) -> dict[str, Any]:
    health: dict[str, Any] = service.request("health")[2]["pools"]["cpu"]
    return health


def comes_to_rest(service: ServiceProcess) -> bool:
    return eventually(lambda: cpu_health(service)["in_flight"] == 0, TIMEOUT_S)


def test_descriptors_say_cpu_and_health_tells_of_the_pool(service: ServiceProcess) -> None:
    assert service.request("node_types", "c-echo")[2][0]["runs"] == "cpu"
    health = cpu_health(service)
    assert health["in_flight"] == health["queued"] == 0 and health["size"] == len(health["workers"])
    assert {worker["state"] for worker in health["workers"]} == {"stopped"}
    service.open("s", ("a", "c-echo", {"value": [1]}))
    assert service.request("demand", "s", "a")[2] == {"output": [1]}
    first = cpu_health(service)["workers"][0]
    assert (first["id"], first["state"], first["completed"]) == ("cpu-0", "idle", 1) and first["memory_bytes"]


def test_a_stream_goes_by_credit(service: ServiceProcess, tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    service.open("s", ("a", "c-flood", {"count": 300, "counter": str(counter)}))
    service.send(["demand", 1, "s", "a", {"credit": 2}])
    found = [service.receive(), service.receive()]
    service.says_nothing_more()
    assert counter.stat().st_size < 64
    service.send(["credit", 1, 10_000])
    found += service.until(is_terminal(1))
    assert [m[2] for m in found[:-1]] == [{"n": number} for number in range(300)] == found[-1][2]["items"]
    assert [m[4] for m in found[:-1]] == list(range(300))
    assert comes_to_rest(service)


def test_cancel_and_deadline_over_the_wire(service: ServiceProcess) -> None:
    service.open("s", ("a", "c-deaf", {}), ("b", "c-deaf", {"how": "sleep"}), ("ok", "c-echo", {"value": 1}))
    service.send(["demand", 1, "s", "a"])
    assert service.receive()[:3] == ["node_stream", "a", "begun"]
    service.send(["cancel", 2, 1])
    found = [service.receive(), service.receive()]
    assert sorted(m[0] for m in found) == ["demand_error", "ok"]
    assert next(m for m in found if m[0] == "demand_error")[2]["code"] == "cancelled"
    service.send(["demand", 3, "s", "b", {"deadline_ms": 50}])
    assert service.until(is_terminal(3))[-1][2]["code"] == "deadline_exceeded"
    assert service.request("demand", "s", "ok")[0] == "demand_complete"
    assert comes_to_rest(service)
    assert sum(worker["crashed"] for worker in cpu_health(service)["workers"]) == 0


def test_a_crash_over_the_wire_is_the_demands_alone(service: ServiceProcess) -> None:
    service.open("s", ("die", "c-die", {"how": "SIGSEGV"}), ("ok", "c-echo", {"value": 1}))
    message = service.request("demand", "s", "die")
    assert message[0] == "demand_error" and message[2]["code"] == "worker_crash" and message[2]["retryable"]
    assert message[2]["node"] == "die"
    assert service.request("demand", "s", "ok")[0] == "demand_complete"
    assert comes_to_rest(service)


def test_size_and_memory_are_settings_of_the_service(package: Path, tmp_path: Path) -> None:
    never = FileGate(tmp_path)
    with ServiceProcess("--cpu-workers", "1", "--cpu-memory-bytes", str(200 << 20), nodes=package) as service:
        assert cpu_health(service)["size"] == 1
        service.open("s", ("a", "c-eat", {"count": 300 << 20, "gate": never.path}), ("ok", "c-pid", {}))
        assert service.request("demand", "s", "a")[2]["code"] == "out_of_memory"
        assert service.request("demand", "s", "ok")[0] == "demand_complete"


def test_a_graph_runs_without_a_host_too(package: Path, tmp_path: Path) -> None:
    graph = tmp_path / "graph.json"
    graph.write_text(json.dumps({"nodes": [{"id": "a", "node_type": "c-chunks", "data": {"chunks": ["x", "y"]}}]}))
    run = [sys.executable, "-m", "demandport", "run", str(graph), "a"]
    done = subprocess.run(run, env=environment(package), capture_output=True, text=True, timeout=TIMEOUT_S)
    assert (done.returncode, done.stdout, done.stderr) == (0, "xy\n", "")


def test_what_a_node_prints_goes_to_stderr(service: ServiceProcess) -> None:
    service.open("s", ("a", "c-print", {}))
    assert service.request("demand", "s", "a")[0] == "demand_complete"
    service.ping()
    service.end()
    with pytest.raises(Ended):
        service.receive()
    assert service.wait() == 0 and service.raw == b""
    printed = service.stderr()
    assert [way for way in WAYS if f"a node by {way}\n" not in printed] == []


def test_workers_end_with_the_service(service: ServiceProcess) -> None:
    service.open("s", ("a", "c-deaf", {}))
    service.send(["demand", 1, "s", "a"])
    assert service.receive()[2] == "begun"
    workers = family(service.pid)[1:]
    service.process.kill()
    assert workers and gone(workers)
