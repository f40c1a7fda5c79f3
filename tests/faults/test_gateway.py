"""The gateway with real workers of the tiny model: what is loaded, what must go, and what a crash takes along."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from demandport import errors
from demandport.inference.backend import TextChunk
from demandport.inference.config import ModelSpec
from demandport.inference.gateway import Gateway
from demandport.inference.library import tiny_path
from demandport.inference.requests import EmbedRequest, GenerateRequest
from demandport.workers.policy import Restarts
from demandport.workers.process import WorkerProcess, live_workers
from gateways import LONG, Answer, ask, demand, described, library_path, node, templated, until, with_gateway
from support import LIBRARY, Gate, count

pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.skipif(not tiny_path().exists(), reason="the tiny model has not been made")
#: Two models that are told apart by how long their prompts become.
CATS, DOGS = "{{ 'cats' }}", "{{ 'dogs and rain and bread and light and house' }}"


def other(number: int) -> ModelSpec:
    """The tiny model loaded in another way for each number."""
    return ModelSpec("tiny", context_length=64 + number)


def signalled(pid: int, number: signal.Signals) -> None:
    """Send a signal; a stop has taken effect when this returns."""
    os.kill(pid, number)
    if number is signal.SIGSTOP:
        while psutil.Process(pid).status() != psutil.STATUS_STOPPED:
            pass


async def in_flight(gateway: Gateway, wanted: int) -> None:
    await until(lambda: sum(model["in_flight"] for model in gateway.models()) == wanted)


@pytest.fixture
def spawned(monkeypatch: pytest.MonkeyPatch) -> list[WorkerProcess]:
    """Every worker process that is started."""
    found: list[WorkerProcess] = []
    spawn = WorkerProcess.spawn

    def record(*args: Any, **options: Any) -> WorkerProcess:
        found.append(spawn(*args, **options))
        return found[-1]

    monkeypatch.setattr(WorkerProcess, "spawn", record)
    return found


# ------------------------------------------------------------------------------------------------ loading


def test_many_that_ask_at_once_share_one_load_and_who_leaves_stops_nothing(spawned: list[WorkerProcess]) -> None:
    async def body(gateway: Gateway) -> None:
        asking = [asyncio.ensure_future(ask(gateway, temperature=0, max_tokens=4)) for _ in range(count(10, 200))]
        loading = [asyncio.ensure_future(gateway.load_model(ModelSpec("tiny"))) for _ in range(5)]
        await until(lambda: spawned)
        signalled(spawned[0].pid, signal.SIGSTOP)
        await in_flight(gateway, len(asking) + len(loading))
        left = [asking[0], asking[3], loading[0]]
        for one in left:
            one.cancel()
        await in_flight(gateway, len(asking) + len(loading) - len(left))
        signalled(spawned[0].pid, signal.SIGCONT)
        answers = await asyncio.gather(*asking, *loading, return_exceptions=True)
        assert [isinstance(one, asyncio.CancelledError) for one in answers].count(True) == len(left)
        assert len({one.text for one in answers if isinstance(one, Answer)}) == 1
        assert {one["os_pid"] for one in answers if isinstance(one, dict)} == {spawned[0].pid}
        assert len(spawned) == 1 and gateway.models()[0]["in_flight"] == 0

    with_gateway(body)


def test_the_progress_of_loading_reaches_all_that_wait_and_ends_at_the_total(spawned: list[WorkerProcess]) -> None:
    async def body(gateway: Gateway) -> None:
        asking = [asyncio.ensure_future(ask(gateway, max_tokens=1)) for _ in range(5)]
        await until(lambda: spawned)
        total = tiny_path().stat().st_size
        for answer in await asyncio.gather(*asking):
            steps = [one for one in answer.progress if one.unit == "load_bytes"]
            done = [one.done for one in steps]
            assert {one.total for one in steps} == {total}
            assert done == sorted(done) and done[-1] == total
        assert (await ask(gateway, max_tokens=1)).progress == []  # it is loaded, and a short prompt is read at once

    with_gateway(body)


def test_the_progress_of_a_long_prompt_is_told_in_tokens() -> None:
    async def body(gateway: Gateway) -> None:
        await gateway.load_model(ModelSpec("tiny"))
        answer = await ask(gateway, prompt="cats " * 350, max_tokens=1)
        done = [one.done for one in answer.progress]
        assert {(one.unit, one.total) for one in answer.progress} == {
            ("prompt_tokens", answer.finished.usage and answer.finished.usage.prompt_tokens)
        }
        assert done == sorted(done) and done[-1] == answer.progress[0].total

    with_gateway(body)


def test_one_model_never_answers_for_another(tmp_path: Path) -> None:
    async def body(gateway: Gateway) -> None:
        first, second = templated(tmp_path / "a.gguf", CATS), templated(tmp_path / "b.gguf", DOGS)

        async def tokens(path: Path) -> int:
            answer = await ask(gateway, str(path), max_tokens=2)
            assert answer.finished.model == str(path)
            assert answer.finished.model_ref and answer.finished.model_ref["model"] == str(path)
            assert answer.finished.usage
            return answer.finished.usage.prompt_tokens

        short = await tokens(first)  # now it is ready, and the other one is not
        found = await asyncio.gather(*(tokens(path) for path in (second, first, second, first)))
        assert found == [found[0], short, found[0], short] and found[0] > short
        second.write_bytes(b"GGUF damaged")
        with pytest.raises(errors.ModelLoadFailed):
            await tokens(second)

    with_gateway(body)


def test_one_file_is_one_model_by_whatever_name(tmp_path: Path, spawned: list[WorkerProcess]) -> None:
    async def body(gateway: Gateway) -> None:
        path = tmp_path / "models" / "pet.gguf"
        (tmp_path / "soft.gguf").symlink_to(path)
        os.link(path, tmp_path / "hard.gguf")
        names = [str(path), str(tmp_path / "soft.gguf"), str(tmp_path / "hard.gguf"), "pet", "named"]
        names.append(f"{tmp_path}/models/../models/pet.gguf")
        answers = await asyncio.gather(*(ask(gateway, name, max_tokens=1) for name in names))
        assert len({answer.finished.model_ref["id"] for answer in answers if answer.finished.model_ref}) == 1
        assert len(spawned) == 1
        await ask(gateway, ModelSpec("pet", context_length=128), max_tokens=1)
        await gateway.embed(EmbedRequest(("cats",)), "pet")
        assert len(spawned) == 3 and len({model["id"] for model in gateway.models()}) == 3

    (tmp_path / "models").mkdir()
    templated(tmp_path / "models" / "pet.gguf", CATS)
    named = {"named": ModelSpec(str(tmp_path / "models" / "pet.gguf"))}
    with_gateway(body, model_directories=(tmp_path / "models",), models=named)


@pytest.mark.parametrize("how", ["replaced", "written over", "touched"])
def test_a_file_that_changed_is_another_model(tmp_path: Path, how: str) -> None:
    async def body(gateway: Gateway) -> None:
        path, newer = templated(tmp_path / "m.gguf", CATS), templated(tmp_path / "n.gguf", DOGS)
        before = (await ask(gateway, str(path), max_tokens=1)).finished
        if how == "replaced":
            newer.replace(path)
        elif how == "written over":
            path.unlink()  # the old worker maps the old file
            path.write_bytes(newer.read_bytes())
        else:
            os.utime(path, (1, 1))
        after = (await ask(gateway, str(path), max_tokens=1)).finished
        assert before.model_ref and after.model_ref and before.usage and after.usage
        assert before.model_ref["id"] != after.model_ref["id"]
        assert (before.usage.prompt_tokens < after.usage.prompt_tokens) is (how != "touched")

    with_gateway(body)


# ------------------------------------------------------------------------------------------------ memory


@pytest.fixture(scope="module")
def two_fit() -> int:
    """A limit that two workers of the tiny model keep and three do not, by what they really hold."""
    found: list[int] = []

    def held(model: dict[str, Any]) -> int:
        memory = psutil.Process(model["os_pid"]).memory_full_info()
        return int(getattr(memory, "pss", 0) or memory.uss)

    async def needed(gateway: Gateway) -> None:
        with pytest.raises(errors.OutOfMemory) as caught:
            await gateway.load_model(other(0))
        found.append((caught.value.details or {})["needed_bytes"])

    async def measured(gateway: Gateway) -> None:
        alone = held(await gateway.load_model(other(0)))
        await gateway.load_model(other(1))
        both = sum(map(held, gateway.models()))
        assert both > alone
        found.append((alone + both) // 2)

    with_gateway(needed, memory_limit_bytes=1 << 20)
    with_gateway(measured)
    return sum(found)


def loaded(gateway: Gateway) -> set[int]:
    """The numbers of the `other` models that have a worker."""
    return {model["context_length"] - 64 for model in gateway.models() if model["os_pid"] is not None}


def test_the_model_that_was_not_used_for_longest_goes_and_comes_back_when_it_is_asked(two_fit: int) -> None:
    async def body(gateway: Gateway) -> None:
        for number in (0, 1, 0, 2):  # when the third comes, the second was not used for longest
            await ask(gateway, other(number), max_tokens=1)
        assert loaded(gateway) == {0, 2} and len(live_workers()) == 2
        assert (await ask(gateway, other(1), max_tokens=1)).finished
        assert loaded(gateway) == {1, 2}

    with_gateway(body, memory_limit_bytes=two_fit)


def test_a_model_in_use_never_goes_and_who_finds_no_room_is_told_the_numbers(two_fit: int) -> None:
    async def body(gateway: Gateway) -> None:
        models = [await gateway.load_model(other(number)) for number in (0, 1)]
        for model in models:
            signalled(model["os_pid"], signal.SIGSTOP)
        using = [asyncio.ensure_future(ask(gateway, other(number), max_tokens=1)) for number in (0, 1)]
        await in_flight(gateway, 2)
        with pytest.raises(errors.OutOfMemory, match="tiny") as caught:
            await ask(gateway, other(2), max_tokens=1)
        told = caught.value.details or {}
        assert caught.value.retryable and told["limit_bytes"] == two_fit
        assert told["used_bytes"] + told["needed_bytes"] > two_fit and min(told.values()) > 0
        assert loaded(gateway) == {0, 1}
        signalled(models[0]["os_pid"], signal.SIGCONT)
        await using[0]
        assert (await ask(gateway, other(2), max_tokens=1)).finished  # what was said to be worth trying
        assert loaded(gateway) == {1, 2}
        signalled(models[1]["os_pid"], signal.SIGCONT)
        await using[1]

    with_gateway(body, memory_limit_bytes=two_fit)


def test_a_model_that_found_no_room_is_not_listed() -> None:
    async def body(gateway: Gateway) -> None:
        for number in range(3):
            with pytest.raises(errors.OutOfMemory):
                await gateway.load_model(other(number))
        assert gateway.models() == []

    with_gateway(body, memory_limit_bytes=1 << 20)


def test_loads_at_once_do_not_overshoot(two_fit: int) -> None:
    async def body(gateway: Gateway) -> None:
        most = 0

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, len(live_workers()))
                await asyncio.sleep(0)

        watching = asyncio.ensure_future(watch())
        numbers = range(count(6, 60))
        outcomes = await asyncio.gather(
            *(ask(gateway, other(number), max_tokens=1) for number in numbers), return_exceptions=True
        )
        watching.cancel()
        assert most <= 2
        assert {type(one) for one in outcomes} <= {Answer, errors.OutOfMemory}
        assert any(isinstance(one, Answer) for one in outcomes)
        assert (await ask(gateway, other(0), max_tokens=1)).finished

    with_gateway(body, memory_limit_bytes=two_fit)


def test_a_model_that_was_away_is_admitted_anew(two_fit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, quarantine_after=1, quarantine_s=1000.0)

    async def body(gateway: Gateway) -> None:
        first = await gateway.load_model(other(0))
        await gateway.load_model(other(1))
        os.kill(first["os_pid"], signal.SIGABRT)
        await until(lambda: len(live_workers()) == 1)
        await gateway.load_model(other(2))  # takes the room
        clock.ahead = 2000.0
        await ask(gateway, other(0), max_tokens=1)
        assert len(live_workers()) == 2

    with_gateway(body, memory_limit_bytes=two_fit)


def test_a_model_that_can_never_fit_drives_no_other_out(two_fit: int, tmp_path: Path) -> None:
    async def body(gateway: Gateway) -> None:
        await gateway.load_model(other(0))
        large = tmp_path / "large.gguf"
        large.write_bytes(tiny_path().read_bytes())
        os.truncate(large, 2 * two_fit)  # sparse; what follows the tensors means nothing
        with pytest.raises(errors.OutOfMemory):
            await ask(gateway, str(large))
        assert loaded(gateway) == {0}

    with_gateway(body, memory_limit_bytes=two_fit)


# ------------------------------------------------------------------------------------------------ crashes


async def fails_once(asking: asyncio.Future[Any], how: type[Exception] = errors.WorkerCrash) -> Any:
    with pytest.raises(how) as caught:
        await asking
    assert caught.value.__class__ is how
    return caught.value


async def works_again(gateway: Gateway, restarts: int = 1) -> None:
    """The next request succeeds, and nothing is counted that is not there."""
    assert (await ask(gateway, max_tokens=2)).finished
    model = described(gateway, "tiny")
    assert (model["state"], model["in_flight"], model["restarts"]) == ("ready", 0, restarts)


def test_a_worker_killed_while_idle_is_replaced() -> None:
    async def body(gateway: Gateway) -> None:
        for restarts in range(1, count(4, 100)):
            pid = (await gateway.load_model(ModelSpec("tiny")))["os_pid"]
            os.kill(pid, signal.SIGKILL)
            await until(lambda: gateway.models()[0]["restarts"] == restarts)  # noqa: B023
            await works_again(gateway, restarts)
            assert described(gateway, "tiny")["os_pid"] != pid

    with_gateway(body)


@pytest.mark.parametrize("where", ["prompt", "stream"])
@pytest.mark.parametrize("stopped", [False, True])
def test_a_kill_fails_what_that_worker_had_and_nothing_else(
    where: str, stopped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(gateway: Gateway) -> None:
        await gateway.load_model(other(0))
        gate = Gate(tmp_path)
        for name, value in gate.at("llama_decode:1" if where == "prompt" else "llama_decode:9").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("PYTHONPATH", library_path(LIBRARY))
        pid = (await gateway.load_model(ModelSpec("tiny")))["os_pid"]
        monkeypatch.undo()
        began = asyncio.Event()
        asking = [asyncio.ensure_future(ask(gateway, grammar=LONG, began=began)) for _ in range(3)]
        await asyncio.to_thread(gate.wait)
        assert began.is_set() is (where == "stream")
        if stopped:
            signalled(pid, signal.SIGSTOP)
        bystander = asyncio.ensure_future(ask(gateway, other(0), max_tokens=4))
        os.kill(pid, signal.SIGKILL)
        for one in asking:
            assert "SIGKILL" in (await fails_once(one)).message
        assert (await bystander).finished
        assert all(model["in_flight"] == 0 for model in gateway.models())
        assert [model["restarts"] for model in gateway.models()] == [0, 1]
        assert (await ask(gateway, max_tokens=2)).finished

    with_gateway(body)


def test_an_abort_in_decode_is_a_crash_and_the_next_request_works(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(gateway: Gateway) -> None:
        monkeypatch.setenv("PYTHONPATH", library_path(LIBRARY))
        monkeypatch.setenv("ABORT", "llama_decode:9")
        await gateway.load_model(ModelSpec("tiny"))
        monkeypatch.undo()
        began = asyncio.Event()
        asking = [asyncio.ensure_future(ask(gateway, grammar=LONG, began=began)) for _ in range(3)]
        found = [await fails_once(one) for one in asking]
        assert began.is_set() and all("SIGABRT" in one.message and one.retryable for one in found)
        assert len(set(map(id, found))) == 3
        await works_again(gateway)

    with_gateway(body)


def test_an_error_ends_a_generation_once() -> None:
    async def body(gateway: Gateway) -> None:
        pid = (await gateway.load_model(ModelSpec("tiny")))["os_pid"]
        events = gateway.generate(GenerateRequest(prompt="cats", grammar=LONG))
        assert isinstance(await anext(events), TextChunk)
        signalled(pid, signal.SIGSTOP)
        os.kill(pid, signal.SIGKILL)
        heard = 0
        with pytest.raises(errors.WorkerCrash):
            async for event in events:
                assert isinstance(event, TextChunk)
        async for _ in events:
            heard += 1
        assert heard == 0
        await works_again(gateway)

    with_gateway(body)


# ------------------------------------------------------------------------------------------------ quarantine


class Clock:
    """Lets the policy of restarts believe that time has passed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **policy: Any) -> None:
        self.ahead = 0.0
        clock = self

        class Ahead(Restarts):
            def died(self, now: float) -> None:
                super().died(now + clock.ahead)

            def wait_s(self, now: float) -> float:
                return super().wait_s(now + clock.ahead)

        monkeypatch.setattr("demandport.inference.gateway.Restarts", lambda: Ahead(**policy))


@pytest.fixture
def dies_at_load(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Workers that are started die while they load; until the function is called."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", library_path(LIBRARY))
        patch.setenv("ABORT", "llama_model_load_from_file:1")
        yield patch.undo


def test_a_model_that_dies_at_load_is_tried_later_and_later_and_then_quarantined(
    monkeypatch: pytest.MonkeyPatch, spawned: list[WorkerProcess], dies_at_load: Callable[[], None], tmp_path: Path
) -> None:
    clock = Clock(monkeypatch, first_s=0.05, quarantine_s=1000.0)

    async def body(gateway: Gateway) -> None:
        path = templated(tmp_path / "poison.gguf", CATS)

        async def dies() -> Any:
            return await fails_once(asyncio.ensure_future(ask(gateway, str(path))), errors.ModelLoadFailed)

        assert "brought its worker down" in (await dies()).message
        assert described(gateway, str(path))["state"] == "stopped"
        await dies()  # at once
        waiting = asyncio.ensure_future(dies())
        await in_flight(gateway, 1)
        assert (len(spawned), described(gateway, str(path))["os_pid"]) == (2, None)  # it waits before it starts
        assert described(gateway, str(path))["state"] == "loading"
        await waiting
        assert len(spawned) == 3 and described(gateway, str(path))["state"] == "quarantined"
        told = await dies()
        assert 900_000 < told.details["retry_after_ms"] <= 1_000_000 and str(path) in told.message
        assert len(spawned) == 3 and described(gateway, str(path))["in_flight"] == 0
        clock.ahead = 999.0
        assert (await dies()).details["retry_after_ms"] <= 1000 and len(spawned) == 3
        clock.ahead = 1001.0
        assert described(gateway, str(path))["state"] != "quarantined"
        await dies()
        assert len(spawned) == 4 and described(gateway, str(path))["state"] == "quarantined"
        clock.ahead = 5000.0
        dies_at_load()
        assert (await ask(gateway, str(path), max_tokens=1)).finished
        assert described(gateway, str(path))["state"] == "ready"

    with_gateway(body)


def test_quarantine_is_of_that_file_and_ends_when_the_file_changes(
    monkeypatch: pytest.MonkeyPatch, spawned: list[WorkerProcess], dies_at_load: Callable[[], None], tmp_path: Path
) -> None:
    Clock(monkeypatch, quarantine_after=1, quarantine_s=1000.0)

    async def body(gateway: Gateway) -> None:
        path = templated(tmp_path / "poison.gguf", CATS)
        with pytest.raises(errors.ModelLoadFailed):
            await ask(gateway, str(path))
        assert described(gateway, str(path))["state"] == "quarantined"
        dies_at_load()
        assert (await ask(gateway, max_tokens=1)).finished
        with pytest.raises(errors.ModelLoadFailed, match="tried again in"):
            await ask(gateway, str(path))
        assert len(spawned) == 2
        os.utime(path, (1, 1))
        assert (await ask(gateway, str(path), max_tokens=1)).finished
        assert [one["state"] for one in gateway.models()].count("ready") == 2

    with_gateway(body)


def test_a_quarantine_that_nobody_can_meet_any_more_is_not_listed(
    monkeypatch: pytest.MonkeyPatch, dies_at_load: Callable[[], None], tmp_path: Path
) -> None:
    Clock(monkeypatch, quarantine_after=1, quarantine_s=1000.0)

    async def body(gateway: Gateway) -> None:
        path = templated(tmp_path / "poison.gguf", CATS)
        for time in range(1, 4):
            with pytest.raises(errors.ModelLoadFailed):
                await ask(gateway, str(path))
            os.utime(path, (time, time))
        assert len(gateway.models()) == 1

    with_gateway(body)


def test_unloading_forgets_a_quarantine(
    monkeypatch: pytest.MonkeyPatch, dies_at_load: Callable[[], None], tmp_path: Path
) -> None:
    Clock(monkeypatch, quarantine_after=1, quarantine_s=1000.0)

    async def body(gateway: Gateway) -> None:
        path = templated(tmp_path / "poison.gguf", CATS)
        with pytest.raises(errors.ModelLoadFailed):
            await ask(gateway, str(path))
        dies_at_load()
        assert await gateway.unload_model(str(path)) is True
        assert gateway.models() == []
        assert (await ask(gateway, str(path), max_tokens=1)).finished

    with_gateway(body)


# ------------------------------------------------------------------------------------------------ replicas


@pytest.mark.parametrize("balance", ["least_loaded", "round_robin"])
@pytest.mark.parametrize("replicas", [2, 3])
def test_replicas_share_the_work_and_say_the_same(replicas: int, balance: str, spawned: list[WorkerProcess]) -> None:
    async def body(gateway: Gateway) -> None:
        spec = ModelSpec("tiny", replicas=replicas, balance=balance, threads=1)
        model = await gateway.load_model(spec)
        assert len({one["os_pid"] for one in model["replicas"]}) == replicas == len(spawned)
        for one in model["replicas"]:
            signalled(one["os_pid"], signal.SIGSTOP)
        asking = [asyncio.ensure_future(ask(gateway, spec, temperature=0, max_tokens=9)) for _ in range(2 * replicas)]
        await in_flight(gateway, 2 * replicas)
        assert [one["in_flight"] for one in gateway.models()[0]["replicas"]] == [2] * replicas
        for one in model["replicas"]:
            signalled(one["os_pid"], signal.SIGCONT)
        assert len({answer.text for answer in await asyncio.gather(*asking)}) == 1
        assert gateway.models()[0]["in_flight"] == 0

    with_gateway(body)


def test_one_of_three_killed_under_load_fails_its_own_streams_alone_and_comes_back() -> None:
    async def body(gateway: Gateway) -> None:
        spec = ModelSpec("tiny", replicas=3, threads=1)
        pids = [one["os_pid"] for one in (await gateway.load_model(spec))["replicas"]]
        for pid in pids:
            signalled(pid, signal.SIGSTOP)
        asking = [asyncio.ensure_future(ask(gateway, spec, grammar=LONG)) for _ in range(6)]
        await in_flight(gateway, 6)
        for pid in (pids[0], pids[2]):
            signalled(pid, signal.SIGCONT)
        os.kill(pids[1], signal.SIGKILL)
        outcomes = await asyncio.gather(*asking, return_exceptions=True)
        assert [type(one) for one in outcomes].count(errors.WorkerCrash) == 2
        assert [len(one.text) for one in outcomes if isinstance(one, Answer)] == [450] * 4
        model = gateway.models()[0]
        assert (model["state"], model["in_flight"], model["restarts"]) == ("ready", 0, 1)
        while {one["state"] for one in gateway.models()[0]["replicas"]} != {"ready"}:
            answers = await asyncio.gather(*(ask(gateway, spec, max_tokens=1) for _ in range(3)))
            assert all(answer.finished for answer in answers)

    with_gateway(body)


# ------------------------------------------------------------------------------------------------ unloading


def test_a_name_unloads_a_model_however_it_was_loaded_and_a_reference_that_one_alone() -> None:
    async def body(gateway: Gateway) -> None:
        models = [await gateway.load_model(other(number)) for number in range(3)]
        references = [(await ask(gateway, other(number), max_tokens=1)).finished.model_ref for number in range(3)]
        assert [one and one["id"] for one in references] == [model["id"] for model in models]
        assert await gateway.unload_model(references[1] or {}) is True
        assert loaded(gateway) == {0, 2} and not psutil.pid_exists(models[1]["os_pid"])
        assert await gateway.unload_model(references[1] or {}) is False
        assert await gateway.unload_model({"id": "elsewhere"}) is False
        assert await gateway.unload_model("elsewhere") is False
        assert await gateway.unload_model("tiny") is True
        assert gateway.models() == [] and live_workers() == []

    with_gateway(body)


@pytest.mark.parametrize("name", ["path", "soft link", "library", "configuration"])
def test_every_name_that_loads_a_model_unloads_it(name: str, tmp_path: Path) -> None:
    path = templated(tmp_path / "pet.gguf", CATS)
    (tmp_path / "elsewhere").mkdir()
    soft = tmp_path / "elsewhere" / "soft.gguf"
    soft.symlink_to(path)
    names = {"path": str(path), "soft link": str(soft), "library": "pet", "configuration": "named"}

    async def body(gateway: Gateway) -> None:
        first = "path" if name != "path" else "library"
        await ask(gateway, names[first], max_tokens=1)
        await ask(gateway, names[name], max_tokens=1)
        assert len(gateway.models()) == 1
        assert await gateway.unload_model(names[name]) is True
        assert gateway.models() == []

    with_gateway(body, model_directories=(tmp_path,), models={"named": ModelSpec(str(path))})


@pytest.fixture
def busy() -> Callable[..., Awaitable[tuple[dict[str, Any], asyncio.Future[Answer]]]]:
    """A model with one request that runs until its worker is told to go on."""

    async def begin(gateway: Gateway, spec: ModelSpec) -> tuple[dict[str, Any], asyncio.Future[Answer]]:
        model = await gateway.load_model(spec)
        signalled(model["os_pid"], signal.SIGSTOP)
        asking = asyncio.ensure_future(ask(gateway, spec, max_tokens=3))
        await in_flight(gateway, 1)
        return model, asking

    return begin


def test_a_busy_model_is_not_unloaded_where_that_is_to_be_refused(busy: Any) -> None:
    async def body(gateway: Gateway) -> None:
        model, asking = await busy(gateway, other(0))
        idle = await gateway.load_model(other(1))
        with pytest.raises(errors.BackendUnavailable, match="in use") as caught:
            await gateway.unload_model({"id": model["id"]}, "refuse")
        assert (caught.value.details or {})["in_flight"] == 1
        assert await gateway.unload_model({"id": idle["id"]}, "refuse") is True  # that one has nothing to do
        signalled(model["os_pid"], signal.SIGCONT)
        assert (await asking).finished
        assert await gateway.unload_model({"id": model["id"]}, "refuse") is True

    with_gateway(body)


def test_unloading_waits_until_a_model_has_nothing_to_do(busy: Any) -> None:
    async def body(gateway: Gateway) -> None:
        model, asking = await busy(gateway, other(0))
        unloading = asyncio.ensure_future(gateway.unload_model("tiny", "wait"))
        left = asyncio.ensure_future(gateway.unload_model("tiny", "wait"))
        for _ in range(5):
            await asyncio.sleep(0)
        left.cancel()
        assert not unloading.done() and not asking.done()
        signalled(model["os_pid"], signal.SIGCONT)
        assert (await asking).finished.finish_reason == "length"
        assert await unloading is True and gateway.models() == []

    with_gateway(body)


def test_unloading_stops_what_runs(busy: Any) -> None:
    async def body(gateway: Gateway) -> None:
        _, asking = await busy(gateway, other(0))
        assert await gateway.unload_model("tiny", "stop") is True
        assert "unloaded" in (await fails_once(asking, errors.BackendUnavailable)).message
        assert gateway.models() == [] and live_workers() == []

    with_gateway(body)


def test_the_node_refuses_by_default_and_stops_where_it_is_told_to(busy: Any) -> None:
    async def body(gateway: Gateway) -> None:
        model, asking = await busy(gateway, other(0))
        reference = {"id": model["id"], "model": "tiny", "backend": "llama.cpp"}
        with pytest.raises(errors.BackendUnavailable, match="when_busy") as caught:
            await demand(gateway, node("it", "unload-model", model_ref=reference))
        assert caught.value.node == "it" and not asking.done()
        stop = node("it", "unload-model", model_ref=reference, when_busy="stop", trigger={"a": 1})
        assert (await demand(gateway, stop)).outputs == {"status": "unloaded", "trigger_passthrough": {"a": 1}}
        await fails_once(asking, errors.BackendUnavailable)

    with_gateway(body)


# ------------------------------------------------------------------------------------------------ json_schema


def _person(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"name", "age"}
        and isinstance(value["name"], str)
        and type(value["age"]) is int
    )


SCHEMAS: dict[str, tuple[dict[str, Any], Callable[[Any], bool]]] = {
    "person": (
        {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
            "required": ["name", "age"],
            "additionalProperties": False,
        },
        _person,
    ),
    "enum": ({"enum": ["red", 2, None, True]}, lambda value: value in ("red", 2, None, True)),
    "list": (
        {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
        lambda value: isinstance(value, list) and 2 <= len(value) <= 4 and all(type(one) is bool for one in value),
    ),
    "choice": (
        {"anyOf": [{"type": "null"}, {"type": "integer"}]},
        lambda value: value is None or type(value) is int,
    ),
    "reference": (
        {"$defs": {"pet": {"enum": ["cat", "dog"]}}, "type": "array", "items": {"$ref": "#/$defs/pet"},
         "minItems": 1, "maxItems": 3},
        lambda value: isinstance(value, list) and 1 <= len(value) <= 3 and set(value) <= {"cat", "dog"},
    ),
}  # fmt: skip


def answered(gateway: Gateway, schema: dict[str, Any], **data: Any) -> Awaitable[Any]:
    data = {"model_path": "tiny", "prompt": "Tell me about cats.", "temperature": 1.5, "max_tokens": 400} | data
    return demand(gateway, node("it", "llamacpp-inference", json_schema=schema, **data))


def test_answers_follow_their_schema() -> None:
    async def body(gateway: Gateway) -> None:
        for name, (schema, follows) in SCHEMAS.items():
            for seed in range(count(5, 200)):
                heard = await answered(gateway, schema, seed=seed)
                assert follows(json.loads(heard.outputs["response"])), (name, seed, heard.outputs["response"])

    with_gateway(body)


def test_what_a_grammar_cannot_say_is_found_by_the_last_look() -> None:
    async def body(gateway: Gateway) -> None:
        odd = {"type": "array", "items": {"type": "null"}, "minItems": 2, "maxItems": 3, "uniqueItems": True}
        with pytest.raises(errors.TypeMismatch, match=r"does not follow json_schema.*unique") as caught:
            await answered(gateway, odd)
        assert (caught.value.details or {})["finish_reason"] == "stop" and caught.value.node == "it"

    with_gateway(body)


def test_an_answer_that_is_cut_off_is_an_error_that_says_so() -> None:
    async def body(gateway: Gateway) -> None:
        schema, _ = SCHEMAS["person"]
        with pytest.raises(errors.TypeMismatch, match="cut off by max_tokens") as caught:
            await answered(gateway, schema, max_tokens=3)
        assert (caught.value.details or {})["text"].startswith("{")

    with_gateway(body)
