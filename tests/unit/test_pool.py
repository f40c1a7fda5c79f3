"""Which worker of a pool gets what, and when there is another: workers here are scripted, and do what a test says."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demandport.errors import BackendUnavailable, DemandportError, NodeFailed, QueueFull, WorkerCrash
from demandport.wire.codec import MsgpackCodec
from demandport.workers.limits import Limits
from demandport.workers.policy import Restarts
from demandport.workers.pool import WorkerPool

NEVER_S = 3600.0
LIMIT_S = 20.0
AT_ONCE = Limits(ask_s=0.0, interrupt_s=0.0)
#: No restart waits, none is in quarantine.
PATIENT = {"restarts": lambda: Restarts(first_s=0.0, quarantine_after=1000)}


class Scripted:
    """A worker that keeps what it is told."""

    def __init__(self, stage: Stage, name: str, on_message: Callable[[list[Any]], None], on_exit: Any) -> None:
        self.name, self.say, self._on_exit = name.removeprefix("worker "), on_message, on_exit
        self.pid = os.getpid()
        self.told: list[list[Any]] = []
        self.signals: list[str] = []
        self.gone = False
        self._stage = stage

    def send(self, message: list[Any]) -> None:
        self.told.append(message)

    def send_frame(self, data: bytes) -> None:
        message = MsgpackCodec().decode(data[4:])
        self._stage.given.append((self.name, message[2]))
        self.send(message)

    def interrupt(self) -> None:
        self.signals.append("interrupt")

    def kill(self) -> None:
        self.signals.append("kill")
        if not self._stage.cling:
            asyncio.get_running_loop().call_soon(self.exit, "killed by SIGKILL")

    # ------------------------------------------------------------------------------------ what it does

    @property
    def task(self) -> int:
        return next(message[1] for message in reversed(self.told) if message[0] == "run")

    def ready(self) -> Scripted:
        self.say(["ready", {}])
        return self

    def done(self, result: Any = None) -> None:
        self.say(["done", self.task, result])

    def exit(self, reason: str = "exited with status 1") -> None:
        if not self.gone:
            self.gone = True
            self._on_exit(reason)


class Stage:
    """A pool of scripted workers."""

    def __init__(self, size: int, **options: Any) -> None:
        self.workers: list[Scripted] = []
        #: (worker, payload) in the order in which they were given out.
        self.given: list[tuple[str, Any]] = []
        self.cling = False
        self.none_starts = False
        self.runs: list[asyncio.Task[Any]] = []
        self.pool = WorkerPool("p", size, spawn=self._spawn, **options)

    def _spawn(self, *, name: str, on_message: Any, on_exit: Any) -> Scripted:
        if self.none_starts:
            raise OSError("no more processes")
        self.workers.append(Scripted(self, name, on_message, on_exit))
        return self.workers[-1]

    async def run(self, payload: Any = None, take: Any = None) -> asyncio.Task[Any]:
        self.runs.append(asyncio.create_task(self.pool.run(payload, *([take] if take else []))))
        await settled()
        return self.runs[-1]

    async def all_up(self) -> list[Scripted]:
        """Start all workers; each has done a task."""
        runs = [await self.run("up") for _ in range(self.pool.size)]
        for worker in self.workers:
            worker.ready()
        for worker in self.workers:
            worker.done()
        await asyncio.gather(*runs)
        self.given.clear()
        return list(self.workers)

    @property
    def states(self) -> list[str]:
        return [worker["state"] for worker in self.pool.health()["workers"]]

    def counts(self, name: str) -> list[int]:
        return [worker[name] for worker in self.pool.health()["workers"]]


async def settled() -> None:
    """Turns of the loop after which whatever can happen without a timer has happened."""
    for _ in range(20):
        await asyncio.sleep(0)


def on_stage(check: Callable[[Stage], Awaitable[None]], size: int = 1, **options: Any) -> None:
    async def main() -> None:
        async with asyncio.timeout(LIMIT_S):
            stage = Stage(size, **options)
            await check(stage)
            stage.cling = False
            for worker in stage.workers:
                if worker.signals.count("kill"):
                    worker.exit()
            await stage.pool.close()
            await asyncio.gather(*stage.runs, return_exceptions=True)
            assert stage.pool.in_flight == stage.pool.health()["queued"] == 0

    asyncio.run(main())


def failure(run: asyncio.Task[Any]) -> BaseException | None:
    assert run.done()
    return run.exception()


# ------------------------------------------------------------------------------------------------ who gets what


def test_workers_are_started_as_they_are_needed_and_keep_their_names() -> None:
    async def check(stage: Stage) -> None:
        assert stage.workers == [] and stage.states == ["stopped"] * 3
        await stage.run("a")
        assert [worker.name for worker in stage.workers] == ["p-0"] and stage.given == []
        await stage.run("b")
        assert [worker.name for worker in stage.workers] == ["p-0", "p-1"]
        stage.workers[1].ready()
        assert stage.given == [("p-1", "a")], "what came first goes to who is ready first"
        stage.workers[0].ready()
        assert stage.given[1:] == [("p-0", "b")] and stage.states == ["busy", "busy", "stopped"]

    on_stage(check, 3)


def test_a_new_worker_is_set_up_before_its_first_task() -> None:
    async def check(stage: Stage) -> None:
        await stage.run("a")
        assert [message[0] for message in stage.workers[0].ready().told] == ["setup", "run"]
        assert stage.workers[0].told[0] == ["setup", {"path": []}]

    on_stage(check, setup=lambda: {"path": []})


def test_least_loaded_takes_the_first_that_is_free() -> None:
    async def check(stage: Stage) -> None:
        workers = await stage.all_up()
        for payload in "abc":
            await stage.run(payload)
        workers[1].done()
        await stage.run("d")
        for worker in workers:
            worker.done()
        await stage.run("e")
        assert stage.given == [("p-0", "a"), ("p-1", "b"), ("p-2", "c"), ("p-1", "d"), ("p-0", "e")]

    on_stage(check, 3)


def test_round_robin_goes_on_after_the_last_one_and_passes_over_the_busy() -> None:
    async def check(stage: Stage) -> None:
        workers = await stage.all_up()
        await stage.run("a")
        workers[0].done()
        await stage.run("b")
        await stage.run("c")
        await stage.run("d")
        workers[0].done()
        workers[2].done()
        await stage.run("e")  # after p-0 comes p-1, which is busy
        assert stage.given == [("p-0", "a"), ("p-1", "b"), ("p-2", "c"), ("p-0", "d"), ("p-2", "e")]

    on_stage(check, 3, balance="round_robin")


@pytest.mark.parametrize("balance", ["least_loaded", "round_robin"])
def test_one_that_crashed_gets_nothing_until_it_is_ready(balance: str) -> None:
    async def check(stage: Stage) -> None:
        workers = await stage.all_up()
        workers[0].exit()
        assert stage.states == ["starting", "idle"]
        await stage.run("a")
        await stage.run("b")
        assert stage.given == [("p-1", "a")]
        stage.workers[-1].ready()
        assert stage.given[1:] == [("p-0", "b")]

    on_stage(check, 2, balance=balance)


def test_what_waits_goes_in_the_order_it_came() -> None:
    async def check(stage: Stage) -> None:
        runs = [await stage.run(number) for number in range(5)]
        worker = stage.workers[0].ready()
        for number in range(5):
            worker.done(number * 2)
        assert [await run for run in runs] == [0, 2, 4, 6, 8]
        assert [payload for _, payload in stage.given] == list(range(5)) and stage.counts("completed") == [5]

    on_stage(check)


def test_a_full_queue_refuses_and_who_waits_for_a_new_worker_does_not_count() -> None:
    async def check(stage: Stage) -> None:
        runs = [await stage.run(number) for number in range(4)]  # two for the two workers, two that wait
        refused = await stage.run("more")
        assert isinstance(failure(refused), QueueFull) and "'p'" in str(failure(refused))
        for worker in stage.workers:
            worker.ready()
        assert stage.pool.health()["queued"] == 2
        assert isinstance(failure(await stage.run("more")), QueueFull)
        runs[3].cancel()
        await settled()
        last = await stage.run("last")
        assert not last.done() and stage.pool.health()["queued"] == 2

    on_stage(check, 2, max_queued=2)


def test_an_error_of_the_task_is_no_fault_of_the_worker() -> None:
    async def check(stage: Stage) -> None:
        run = await stage.run()
        worker = stage.workers[0].ready()
        worker.say(["error", worker.task, NodeFailed("no", node="a").to_wire()])
        await settled()
        assert isinstance(failure(run), NodeFailed)
        assert (stage.states, stage.counts("errored"), stage.counts("crashed")) == (["idle"], [1], [0])

    on_stage(check)


# ------------------------------------------------------------------------------------------------ on the way


def test_what_a_worker_says_is_taken_in_order_and_acknowledged_when_it_was() -> None:
    async def check(stage: Stage) -> None:
        heard: list[int] = []
        gate = asyncio.Event()

        async def take(said: int) -> None:
            heard.append(said)
            if said == 10:
                await gate.wait()

        run = await stage.run("a", take)
        worker = stage.workers[0].ready()
        for number in range(16):
            worker.say(["said", worker.task, number])
        worker.done("end")
        await settled()
        assert heard == list(range(11)) and not run.done()
        gate.set()
        assert await run == "end" and heard == list(range(16))

    on_stage(check)


def test_as_many_are_acknowledged_as_were_taken() -> None:
    async def check(stage: Stage) -> None:
        async def take(said: int) -> None:
            pass

        await stage.run("a", take)
        worker = stage.workers[0].ready()
        for number in range(21):
            worker.say(["said", worker.task, number])
            if number % 7 == 0:
                await settled()
        await settled()
        taken = [message for message in worker.told if message[0] == "taken"]
        assert sum(message[2] for message in taken) == 21 and {message[1] for message in taken} == {worker.task}

    on_stage(check)


def test_what_an_earlier_worker_says_late_is_dropped() -> None:
    async def check(stage: Stage) -> None:
        first = await stage.run("a")
        old = stage.workers[0].ready()
        old.exit()
        second = await stage.run("b")
        new = stage.workers[1].ready()
        for message in (["ready", {}], ["said", new.task, 1], ["done", new.task, "old"], ["done", old.task, "old"]):
            old.say(message)
        new.say(["done", old.task, "not its own"])
        await settled()
        assert isinstance(failure(first), WorkerCrash) and not second.done() and stage.states == ["busy"]
        new.done("new")
        assert await second == "new"

    on_stage(check)


# ------------------------------------------------------------------------------------------------ ends


def test_a_task_is_given_out_once() -> None:
    async def check(stage: Stage) -> None:
        runs = [await stage.run(number) for number in range(3)]
        for number in range(3):
            stage.workers[-1].ready().exit("killed by SIGSEGV")
            await settled()
            error = failure(runs[number])
            assert isinstance(error, WorkerCrash) and error.retryable and "SIGSEGV" in error.message
            assert error.details and error.details["worker"] == "p-0"
        assert stage.given == [("p-0", 0), ("p-0", 1), ("p-0", 2)] and stage.counts("crashed") == [3]

    on_stage(check, **PATIENT)


def test_a_worker_that_was_called_off_is_charged_until_it_is_free() -> None:
    async def check(stage: Stage) -> None:
        run = await stage.run("a")
        worker = stage.workers[0].ready()
        run.cancel()
        await settled()
        assert run.cancelled() and worker.told[-1] == ["cancel", worker.task] and not worker.signals
        waits = await stage.run("b")
        assert stage.pool.in_flight == 1 and stage.given == [("p-0", "a")]
        worker.done("nobody wants it")
        assert stage.given[1:] == [("p-0", "b")]
        worker.done("b")
        assert await waits == "b"

    on_stage(check, limits=Limits(ask_s=NEVER_S))


@pytest.mark.parametrize(
    ("limits", "signals"),
    [
        (Limits(ask_s=0.0, interrupt_s=NEVER_S), ["interrupt"]),
        (AT_ONCE, ["interrupt", "kill"]),
    ],
)
def test_escalation_goes_step_by_step(limits: Limits, signals: list[str]) -> None:
    async def check(stage: Stage) -> None:
        stage.cling = True
        run = await stage.run("a")
        worker = stage.workers[0].ready()
        waits = await stage.run("b")
        run.cancel()
        while worker.signals != signals:
            await asyncio.sleep(0)
        await settled()
        assert worker.signals == signals and stage.pool.in_flight == 1 and len(stage.workers) == 1
        assert stage.states == ["draining" if "kill" in signals else "busy"]
        if "kill" in signals:
            worker.exit("killed by SIGKILL")
            stage.workers[1].ready()
        else:
            worker.done()
        assert stage.given[-1] == ("p-0", "b") and stage.counts("crashed") == [0] and not waits.done()

    on_stage(check, limits=limits)


def test_a_task_that_ends_in_time_is_not_interrupted() -> None:
    async def check(stage: Stage) -> None:
        run = await stage.run("a")
        worker = stage.workers[0].ready()
        run.cancel()
        await asyncio.sleep(0)
        worker.done()  # in the turn before the one in which the interrupt is due
        await settled()
        assert worker.signals == [] and stage.states == ["idle"]

    on_stage(check, limits=AT_ONCE)


def test_the_outcome_comes_before_the_worker_is_taken_down() -> None:
    async def check(stage: Stage) -> None:
        stage.cling = True
        run = await stage.run("a")
        worker = stage.workers[0].ready()
        worker.done("a")
        assert await run == "a" and worker.signals == ["kill"] and stage.states == ["draining"]
        assert stage.pool.in_flight == 0 and len(stage.workers) == 1
        await stage.run("b")
        assert stage.given == [("p-0", "a")]
        worker.exit("killed by SIGKILL")
        stage.workers[1].ready()
        assert stage.given[1:] == [("p-0", "b")] and stage.counts("crashed") == [0] and stage.counts("restarts") == [1]

    on_stage(check, limits=Limits(recycle_tasks=1))


def test_a_worker_that_keeps_dying_waits_and_then_rests() -> None:
    rules = {"restarts": lambda: Restarts(first_s=NEVER_S, most_s=NEVER_S, quarantine_s=NEVER_S, quarantine_after=3)}

    async def check(stage: Stage) -> None:
        workers = await stage.all_up()
        workers[0].exit()
        stage.workers[-1].ready().exit()
        assert stage.states == ["crashed", "idle"] and len(stage.workers) == 3
        for payload in "ab":
            await stage.run(payload)
        assert stage.given == [("p-1", "a")], "the other one goes on"
        workers[1].done()
        workers[1].done()
        assert stage.given[1:] == [("p-1", "b")]

    on_stage(check, 2, **rules)


@pytest.mark.parametrize("reason", ["killed by SIGKILL", "killed by SIGTERM"])
def test_one_that_somebody_killed_comes_back_at_once(reason: str) -> None:
    async def check(stage: Stage) -> None:
        await stage.all_up()
        for _ in range(5):
            stage.workers[-1].exit(reason)
            assert stage.states == ["starting"]
            stage.workers[-1].ready()
        assert stage.counts("crashed") == [5]

    on_stage(check, restarts=lambda: Restarts(first_s=NEVER_S))


def test_when_all_rest_one_is_tried_for_each_task() -> None:
    rules = {"restarts": lambda: Restarts(quarantine_after=1, quarantine_s=NEVER_S)}

    async def check(stage: Stage) -> None:
        for worker in await stage.all_up():
            worker.exit()
        assert stage.states == ["quarantined"] * 2
        runs = [await stage.run(number) for number in range(3)]
        for number in range(2):
            assert stage.states == ["starting", "quarantined"], "one at a time"
            stage.workers[-1].ready().exit()
            await settled()
            assert isinstance(failure(runs[number]), WorkerCrash)
        stage.workers[-1].ready().done("well")
        assert await runs[2] == "well" and stage.states == ["idle", "quarantined"]

    on_stage(check, 2, **rules)


def test_quarantine_ends_and_the_next_task_starts_a_worker() -> None:
    async def check(stage: Stage) -> None:
        (worker,) = await stage.all_up()
        worker.exit()
        while stage.states != ["stopped"]:
            await asyncio.sleep(0)
        run = await stage.run("a")
        stage.workers[-1].ready().done("a")
        assert await run == "a"

    on_stage(check, restarts=lambda: Restarts(quarantine_after=1, quarantine_s=0.01))


@pytest.mark.parametrize("how", ["exits", "cannot be started"])
def test_what_waits_fails_when_no_worker_gets_ready(how: str) -> None:
    async def check(stage: Stage) -> None:
        stage.none_starts = how != "exits"
        runs = [await stage.run(number) for number in range(3)]
        for _ in range(10):
            for worker in list(stage.workers):
                worker.exit()
            await settled()
        for run in runs:
            error = failure(run)
            assert isinstance(error, WorkerCrash) and "gets ready" in error.message
        assert isinstance(failure(await stage.run("more")), WorkerCrash) and stage.given == []
        assert len(stage.workers) <= 6, "no storm"

    on_stage(check, 2, restarts=lambda: Restarts(first_s=0.0, quarantine_s=NEVER_S))


def test_swap_is_done_when_all_are_fresh_also_when_one_dies_meanwhile() -> None:
    async def check(stage: Stage) -> None:
        workers = await stage.all_up()
        for payload in "ab":
            await stage.run(payload)
        swapping = asyncio.create_task(stage.pool.swap())
        await settled()
        assert stage.states == ["draining", "busy", "idle"], "one after the other"
        workers[1].exit()
        workers[0].done()
        await settled()
        fresh = stage.workers[3:]
        assert [worker.name for worker in fresh] == ["p-1", "p-0"] and not swapping.done()
        fresh[0].ready()
        fresh[1].ready()
        for _ in range(2):
            await settled()
            stage.workers[-1].ready()
        await settled()
        assert swapping.done() and stage.states == ["idle"] * 3
        assert not {*workers} & {worker for worker in stage.workers if not worker.gone}

    on_stage(check, 3)


def test_a_pool_that_is_closed_lets_nobody_wait() -> None:
    async def check(stage: Stage) -> None:
        await stage.all_up()
        running, waiting = await stage.run("a"), await stage.run("b")
        swapping = asyncio.create_task(stage.pool.swap())
        await settled()
        await stage.pool.close()
        await swapping
        assert isinstance(failure(running), BackendUnavailable) and isinstance(failure(waiting), BackendUnavailable)
        assert stage.states == ["stopped"]
        assert isinstance(failure(await stage.run("c")), DemandportError)

    on_stage(check)


# ------------------------------------------------------------------------------------------------ whatever happens


STEPS = st.lists(st.tuples(st.sampled_from(["run", "cancel", "ready", "done", "exit", "swap"]), st.integers(0, 9)))


@given(STEPS, st.sampled_from(["least_loaded", "round_robin"]))
def test_whatever_happens_each_task_is_given_once_and_ends_once(steps: list[tuple[str, int]], balance: str) -> None:
    async def check(stage: Stage) -> None:
        swaps: list[asyncio.Task[None]] = []
        for number, (what, pick) in enumerate(steps):
            live = [worker for worker in stage.workers if not worker.gone]
            worker = live[pick % len(live)] if live else None
            if what == "run":
                await stage.run(number)
            elif what == "cancel" and stage.runs:
                stage.runs[pick % len(stage.runs)].cancel()
            elif what == "swap":
                swaps.append(asyncio.create_task(stage.pool.swap()))
            elif worker and what == "done" and any(message[0] == "run" for message in worker.told):
                worker.done()
            elif worker and what == "ready" and not worker.told:
                worker.ready()
            elif worker and what == "exit":
                worker.exit()
            await settled()
            payloads = [payload for _, payload in stage.given]
            assert payloads == sorted(set(payloads)), "given twice, or out of order"
            health = stage.pool.health()
            assert health["queued"] + health["in_flight"] >= sum(not run.done() for run in stage.runs)
            if health["queued"]:
                assert "idle" not in stage.states and set(stage.states) != {"stopped"}
        for _ in range(40):  # all that is there gets its turn
            for worker in [worker for worker in stage.workers if not worker.gone]:
                if not worker.told:
                    worker.ready()
                elif any(message[0] == "run" for message in worker.told):
                    worker.done()
            await settled()
        assert all(run.done() for run in [*stage.runs, *swaps]) and stage.pool.in_flight == 0

    on_stage(check, 2, limits=Limits(ask_s=NEVER_S, recycle_tasks=3), **PATIENT)
