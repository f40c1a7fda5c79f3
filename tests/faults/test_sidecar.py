"""llama-server as a sidecar, its whole life: a program that takes its flags stands in, so that no binary is needed."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
from contextlib import aclosing
from pathlib import Path

import psutil
import pytest

from demandport import errors
from demandport.inference.backend import Finished, Progress, TextChunk
from demandport.inference.config import ModelSpec
from demandport.inference.llama_server import LlamaServerBackend
from demandport.inference.requests import EmbedRequest, GenerateRequest
from demandport.workers.policy import Restarts
from demandport.workers.process import kill_all, live_workers
from support import ROOT, gone, lives, read

pytest.importorskip("llama_cpp.server.app")
TINY = ROOT / "python" / "demandport" / "data" / "tiny.gguf"
SHIM = ROOT / "tests" / "llama_server_shim.py"
pytestmark = pytest.mark.skipif(not TINY.exists(), reason="the tiny model has not been made")
LIMIT_S = 120.0


@pytest.fixture(scope="module")
def binary(tmp_path_factory):
    """The stand-in as a program that can be executed."""
    path = tmp_path_factory.mktemp("bin") / "llama-server"
    path.write_text(f"#!{sys.executable}\nimport runpy\nrunpy.run_path({str(SHIM)!r}, run_name='__main__')\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def spec_of(binary, **options):
    return ModelSpec("tiny", "llama-server", **{"binary": binary, "context_length": 512, **options})


def with_sidecar(binary, body, path=TINY, spec=None, **options):
    """Run an async test with a backend; it may hang only so long, and leaves no process behind."""

    async def limited():
        async with asyncio.timeout(LIMIT_S):
            backend = LlamaServerBackend(spec or spec_of(binary), path, **options)
            try:
                await body(backend)
            finally:
                await backend.close()

    try:
        asyncio.run(limited())
        assert live_workers() == []
    finally:
        kill_all()


async def collect(backend, **options):
    request = GenerateRequest.from_options({"prompt": "Tell me about cats.", "max_tokens": 8, **options})
    return await read(backend.generate(request))


async def until(condition):
    while not condition():
        await asyncio.sleep(0.005)


@pytest.fixture
def hold(tmp_path, monkeypatch):
    """A file; while it is there, an answer stops after its first text."""
    path = tmp_path / "hold"
    path.touch()
    monkeypatch.setenv("LLAMA_SHIM_HOLD", str(path))
    return path


@pytest.fixture
def gate(tmp_path, monkeypatch):
    """A file without which no model is loaded."""
    path = tmp_path / "gate"
    monkeypatch.setenv("LLAMA_SHIM_GATE", str(path))
    return path


def test_it_is_started_when_needed_and_ended_with_the_backend(binary):
    lines = []

    async def body(backend):
        assert backend.health().state == "stopped"
        text, end = await collect(backend, temperature=0)
        assert "cat" in text.lower()
        assert end.finish_reason == "length"
        health = backend.health()
        assert (health.state, health.in_flight, health.restarts, health.crashed) == ("ready", 0, 0, False)
        process = psutil.Process(health.os_pid)
        again, _ = await collect(backend, temperature=0)
        assert (again, backend.health().os_pid) == (text, health.os_pid)
        await backend.close()
        assert gone([process])
        assert backend.health().state == "closed"
        with pytest.raises(errors.BackendUnavailable, match="unloaded"):
            await collect(backend)

    with_sidecar(binary, body, on_log=lambda *line: lines.append(line))
    assert ("debug", "llama-server of tiny", "shim: starting") in lines


def test_many_that_ask_at_once_start_one(binary):
    async def body(backend):
        results = await asyncio.gather(*(collect(backend, temperature=0) for _ in range(4)), backend.load())
        assert len({text for text, _ in results[:4]}) == 1
        assert len(live_workers()) == 1

    with_sidecar(binary, body)


def test_its_key_is_its_own_and_does_not_show(binary):
    async def body(backend):
        import httpx

        await backend.load()
        process = psutil.Process(backend.health().os_pid)
        key = process.environ()["LLAMA_API_KEY"]
        assert len(key) >= 32
        assert key not in " ".join(process.cmdline())
        [port] = {one.laddr[1] for one in process.net_connections("inet") if one.status == psutil.CONN_LISTEN}
        assert {one.laddr[0] for one in process.net_connections("inet") if one.laddr[1] == port} == {"127.0.0.1"}
        async with httpx.AsyncClient(trust_env=False) as stranger:
            refused = await stranger.get(f"http://127.0.0.1:{port}/v1/models")
            assert refused.status_code == 401
        await backend.close()

    with_sidecar(binary, body)


def test_while_it_loads_it_is_waited_for_and_progress_is_told(binary, gate):
    async def body(backend):
        events = backend.generate(GenerateRequest(prompt="Hi", max_tokens=3))
        first = await anext(events)
        assert isinstance(first, Progress)
        assert (first.unit, first.total) == ("load_bytes", 10**9)
        assert backend.health().state == "loading"
        with pytest.raises(errors.DeadlineExceeded):
            await collect(backend, deadline_ms=50)
        gate.touch()
        found = [event async for event in events]
        assert isinstance(found[-1], Finished)

    with_sidecar(binary, body, size_bytes=10**9)


def test_one_that_leaves_while_it_loads_does_not_stop_it_for_the_others(binary, gate):
    async def body(backend):
        leaving, staying = (asyncio.create_task(collect(backend, temperature=0)) for _ in range(2))
        await until(live_workers)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        gate.touch()
        assert (await staying)[1].finish_reason == "length"
        assert backend.health().restarts == 0

    with_sidecar(binary, body)


def test_closing_while_it_loads_ends_those_who_wait(binary, gate):
    async def body(backend):
        waiting = asyncio.create_task(collect(backend))
        await until(live_workers)
        await backend.close()
        with pytest.raises(errors.BackendUnavailable, match="unloaded"):
            await waiting

    with_sidecar(binary, body)


def test_killed_in_mid_stream_it_fails_what_ran_and_the_next_request_succeeds(binary, hold):
    async def body(backend):
        texts = []
        running = asyncio.create_task(told(backend, texts))
        await until(lambda: texts)
        pid = backend.health().os_pid
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(errors.WorkerCrash, match="killed by SIGKILL") as failed:
            await running
        assert failed.value.retryable
        assert backend.health().crashed
        hold.unlink()
        assert (await collect(backend, temperature=0))[1].finish_reason == "length"
        health = backend.health()
        assert (health.state, health.restarts, health.crashed) == ("ready", 1, False)
        assert health.os_pid != pid

    async def told(backend, texts):
        async with aclosing(backend.generate(GenerateRequest(prompt="Tell me about cats."), texts.append)) as events:
            async for _ in events:
                pass

    with_sidecar(binary, body)


def test_killed_while_idle_the_next_request_gets_another(binary):
    async def body(backend):
        await backend.load()
        os.kill(backend.health().os_pid, signal.SIGKILL)
        await until(lambda: backend.health().crashed)
        assert (await collect(backend))[1] is not None
        assert backend.health().restarts == 1

    with_sidecar(binary, body)


def test_killed_while_it_loads_is_a_crash(binary, gate):
    async def body(backend):
        loading = asyncio.create_task(backend.load())
        await until(live_workers)
        live_workers()[0].kill()
        with pytest.raises(errors.WorkerCrash, match="while loading"):
            await loading
        gate.touch()
        await backend.load()

    with_sidecar(binary, body)


def test_what_it_cannot_load_is_told_and_after_some_times_quarantined(binary, tmp_path):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"nothing")

    async def body(backend):
        for _ in range(2):
            with pytest.raises(errors.ModelLoadFailed, match="error loading model: invalid magic") as failed:
                await backend.load()
            assert failed.value.details["reason"] == "exited with status 1"
        assert backend.health().state == "quarantined"
        with pytest.raises(errors.ModelLoadFailed, match="2 times in a row") as failed:
            await collect(backend)
        assert failed.value.details["retry_after_ms"] > 0
        assert live_workers() == []

    with_sidecar(binary, body, path=bad, restarts=Restarts(first_s=0.0, quarantine_after=2))


def test_a_program_that_is_missing_or_never_listens_is_unavailable(binary, tmp_path):
    async def missing(backend):
        with pytest.raises(errors.BackendUnavailable, match="there is no program"):
            await backend.load()

    async def silent(backend):
        with pytest.raises(errors.BackendUnavailable, match="said nothing"):
            await backend.load()
        await until(lambda: not live_workers())

    with_sidecar(binary, missing, spec=spec_of("no-such-llama-server"))
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 1000\n")
    sleeper.chmod(0o700)
    quick = spec_of(str(sleeper))
    object.__setattr__(quick, "timeout_ms", 100)  # no setting of llama-server's
    with_sidecar(binary, silent, spec=quick)


def test_leaving_early_closes_the_connection_and_not_the_server(binary, hold):
    async def body(backend):
        events = backend.generate(GenerateRequest(prompt="Tell me about cats."))
        assert isinstance(await anext(events), TextChunk)
        await events.aclose()
        hold.unlink()
        assert (await collect(backend))[1] is not None
        assert backend.health().restarts == 0

    with_sidecar(binary, body)


def test_embedding_by_a_server_that_generates_is_a_clear_error(binary):
    async def body(backend):
        with pytest.raises(errors.BackendUnavailable, match="does not embed; it can generate"):
            await backend.embed(EmbedRequest(("a",)))
        assert live_workers() == []

    with_sidecar(binary, body)


def test_arguments_that_would_break_it_are_refused():
    for flag in ("--port", "--host=0.0.0.0", "--api-key", "-m"):
        with pytest.raises(errors.TypeMismatch, match="arguments"):
            LlamaServerBackend(spec_of("x", arguments=(flag, "1")), TINY)


SERVICE = """
import asyncio, sys
from pathlib import Path
from demandport.inference.config import ModelSpec
from demandport.inference.llama_server import LlamaServerBackend

async def main():
    backend = LlamaServerBackend(ModelSpec("tiny", "llama-server", binary=sys.argv[1]), Path(sys.argv[2]))
    await backend.load()
    print(backend.health().os_pid, flush=True)
    await asyncio.sleep(1000)

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's promise is Linux's")
def test_it_does_not_outlive_a_service_that_is_killed(binary):
    command = [sys.executable, "-c", SERVICE, binary, str(TINY)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as service:
        sidecar = psutil.Process(int(service.stdout.readline()))
        assert lives(sidecar)
        os.kill(service.pid, signal.SIGKILL)
        service.wait()
        assert gone([sidecar])


# ---------------------------------------------------------------------------------------- what it is told


class Recorder:
    """A spawner that starts nothing."""

    def spawn(self, command, **options):
        self.command, self.environment = list(command), options["environment"]
        raise FileNotFoundError("recorded")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["--parallel", "4", "--ctx-size", "16384", "--n-gpu-layers", "0"]),
        ({"context_length": 512, "gpu_layers": -1}, ["--ctx-size", "2048", "--n-gpu-layers", "999"]),
        ({"threads": 3, "arguments": ("--parallel", "2")}, ["--parallel", "2", "--ctx-size", "8192", "--threads", "3"]),
        ({"arguments": ("--embeddings",)}, ["--ubatch-size", "4096", "--embeddings"]),
        ({"arguments": ("--reranking", "--jinja")}, ["--ubatch-size", "4096", "--reranking", "--jinja"]),
    ],
)
def test_its_flags_follow_the_settings(settings, expected):
    recorder = Recorder()

    async def main():
        backend = LlamaServerBackend(
            ModelSpec("m", "llama-server", **settings),
            Path("m-00001-of-00002.gguf"),
            Path("eyes.gguf"),
            spawner=recorder,
        )
        assert backend.capabilities().vision
        with pytest.raises(errors.BackendUnavailable, match="recorded"):
            await backend.load()
        await backend.close()

    asyncio.run(main())
    program, *flags = recorder.command
    assert program == "llama-server"
    assert flags[:6] == ["--model", "m-00001-of-00002.gguf", "--host", "127.0.0.1", "--port", "0"]
    assert flags[flags.index("--mmproj") + 1] == "eyes.gguf"
    rest = iter(flags)
    assert all(flag in rest for flag in expected), f"{expected} do not come in this order in {flags}"
    assert len(recorder.environment["LLAMA_API_KEY"]) >= 32
