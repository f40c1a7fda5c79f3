"""The ways of generating that bench/inference.py compares: each takes the same jobs, and says when what came."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import beam
import jobs
import psutil
from jobs import Job, Stream

CORES = len(os.sched_getaffinity(0))
JOB_TIMEOUT_S, START_TIMEOUT_S, END_TIMEOUT_S = 300, 60, 10
DIRECT, PORT, COMPLETION, COMPLETION_ALL, PYTHON_SERVER, LLAMA_SERVER = (
    "scheduler, direct",
    "scheduler, GenServer",
    "create_completion",
    "create_completion, all cores",
    "llama_cpp.server",
    "llama-server",
)
NAMES = (DIRECT, PORT, COMPLETION, COMPLETION_ALL, PYTHON_SERVER, LLAMA_SERVER)


@dataclass(frozen=True)
class Setting:
    """What the ways run: a model, how much context one sequence may have, threads for one token at a time."""

    path: Path
    context: int
    threads: int
    folder: Path
    elixir: list[str]


class Way(Protocol):
    """A running way."""

    process: subprocess.Popen[bytes]

    def run(self, job: Job) -> list[Stream]:
        """Do the job; blocks."""
        ...


def memory(way: Way) -> int:
    """Bytes that its processes take, shared ones by their part."""
    root, total = psutil.Process(way.process.pid), 0
    for process in (root, *root.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            total += process.memory_full_info().pss
    return total


# ----------------------------------------------------------------------------- programs that take jobs as lines


class Lines:
    """A program that reads a job a line and answers with a line."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def run(self, job: Job) -> list[Stream]:
        assert self.process.stdin and self.process.stdout
        guard = threading.Timer(JOB_TIMEOUT_S, _kill, [self.process])
        guard.start()
        try:
            self.process.stdin.write(jobs.to_line(job))
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        finally:
            guard.cancel()
        if not line:
            raise RuntimeError(f"{self.process.args} has ended")
        return jobs.streams(line)


@contextmanager
def _lines(command: list[str], **more: str) -> Iterator[Way]:
    environment = {**beam.environment(), **more}
    with _started(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield Lines(process)


@contextmanager
def _started(command: list[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """The process, in a group of its own, ended at the end of the block."""
    process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        yield process
    finally:
        if process.stdin:
            with suppress(BrokenPipeError):
                process.stdin.close()
        else:
            process.terminate()
        try:
            process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            _kill(process)
            process.wait()


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


# ------------------------------------------------------------------------------------------------ HTTP servers


class Completions:
    """The OpenAI API of llama_cpp.server."""

    health, path = "/v1/models", "/v1/completions"

    @staticmethod
    def body(request: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in request.items() if name != "raw"} | {"repeat_penalty": 1.0}

    @staticmethod
    def read(event: dict[str, Any], request: dict[str, Any], stream: Stream) -> bool:
        choice = event["choices"][0]
        # It does not say how many there were, but what ended it, and there is an event for each.
        came = stream.tokens + bool(choice["text"])
        stream.tokens = request["max_tokens"] if choice["finish_reason"] == "length" else came
        return bool(choice["text"])


class Native:
    """The API of llama-server. Its samplers are named, so that it has no more than the others."""

    health, path = "/health", "/completion"

    @staticmethod
    def body(request: dict[str, Any]) -> dict[str, Any]:
        same = {name: value for name, value in request.items() if name not in ("raw", "max_tokens")}
        samplers = ["top_k", "top_p", "min_p", "temperature"]
        return {**same, "n_predict": request["max_tokens"], "ignore_eos": True, "samplers": samplers}

    @staticmethod
    def read(event: dict[str, Any], request: dict[str, Any], stream: Stream) -> bool:
        if event["stop"]:
            stream.tokens, stream.prompt_tokens = event["tokens_predicted"], event["tokens_evaluated"]
        return not event["stop"]


class Server:
    """An HTTP server, with a client in a thread for each stream, on a connection of its own."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, api: type[Completions] | type[Native]) -> None:
        self.process, self._port, self._api = process, port, api

    def run(self, job: Job) -> list[Stream]:
        late, go = job["late"], threading.Event()
        with ThreadPoolExecutor(len(job["streams"]) + 1) as pool:
            first, *others = job["streams"]
            running = [pool.submit(self._stream, first, go, job["after"])]
            running += [pool.submit(self._stream, request) for request in others]
            if late:
                go.wait(JOB_TIMEOUT_S)
                running.append(pool.submit(self._stream, late))
            return [stream.result() for stream in running]

    def _stream(self, request: dict[str, Any], go: threading.Event | None = None, after: int = 0) -> Stream:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=JOB_TIMEOUT_S)
            body, stream = json.dumps({**self._api.body(request), "stream": True}), Stream(time.perf_counter())
            connection.request("POST", self._api.path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise RuntimeError(f"{self._api.path} answers {response.status}: {response.read()!r}")
            for line in response:
                if line.startswith(b"data: {"):
                    if self._api.read(json.loads(line[6:]), request, stream):
                        stream.times.append(time.perf_counter())
                    if go and len(stream.times) >= after:
                        go.set()
            stream.end = time.perf_counter()
            connection.close()
            return stream
        finally:
            if go:
                go.set()


@contextmanager
def _server(setting: Setting, command: list[Any], api: type[Completions] | type[Native]) -> Iterator[Way]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*map(str, command), "--host", "127.0.0.1", "--port", str(port)]
    log = setting.folder / "server.log"
    with log.open("wb") as out, _started(command, stdout=out, stderr=subprocess.STDOUT) as process:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _healthy(port, api.health):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command} does not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)
        yield Server(process, port, api)


def _healthy(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_TIMEOUT_S)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


# -------------------------------------------------------------------------------------------------- every way


def direct(setting: Setting) -> Any:
    """The scheduler, called in a process that does nothing else. It chooses context and threads itself."""
    return _lines([sys.executable, str(beam.BENCH / "in_process.py"), "scheduler", str(setting.path), "0", "0"])


def port(setting: Setting) -> Any:
    """The service on a port, with a GenServer for each stream."""
    return _lines([*setting.elixir, "streams"], MODEL=str(setting.path))


def completion(setting: Setting, threads: int = 0) -> Any:
    """llama-cpp-python's high-level call, as it comes: it takes half of the cores for one token at a time."""
    numbers = [str(setting.context), str(threads)]
    return _lines([sys.executable, str(beam.BENCH / "in_process.py"), "completion", str(setting.path), *numbers])


def completion_on_all_cores(setting: Setting) -> Any:
    """The same with as many threads as the others have."""
    return completion(setting, setting.threads)


def python_server(setting: Setting) -> Any:
    """llama-cpp-python's server. Left alone it would end a running stream when another comes."""
    command = [sys.executable, "-m", "llama_cpp.server", "--model", setting.path, "--n_ctx", setting.context]
    return _server(setting, [*command, "--interrupt_requests", "false", "--verbose", "false"], Completions)


def llama_server(setting: Setting, streams: int, cells: int, *, unified: bool = False) -> Any:
    """llama.cpp's server. Prompts that leave a slot are not copied elsewhere: nobody comes back to them here."""
    command = [os.environ["LLAMA_SERVER"], "-m", setting.path, "-t", setting.threads, "-tb", CORES]
    command += ["--parallel", streams, "-c", cells, "--cache-ram", 0]
    return _server(setting, [*command, "--kv-unified"] if unified else command, Native)


STARTERS = {
    DIRECT: direct,
    PORT: port,
    COMPLETION: completion,
    COMPLETION_ALL: completion_on_all_cores,
    PYTHON_SERVER: python_server,
}


@contextmanager
def all_but_llama_server(setting: Setting) -> Iterator[dict[str, Way]]:
    """Those that serve any number of streams, running, by name."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(start(setting)) for name, start in STARTERS.items()}


@contextmanager
def and_llama_server(
    ways: dict[str, Way], setting: Setting, streams: int, cells: int, *, unified: bool = False
) -> Iterator[dict[str, Way]]:
    """With llama-server, made for so many streams, where the environment names one."""
    if not os.environ.get("LLAMA_SERVER"):
        yield ways
        return
    with llama_server(setting, streams, cells, unified=unified) as server:
        yield {**ways, LLAMA_SERVER: server}
