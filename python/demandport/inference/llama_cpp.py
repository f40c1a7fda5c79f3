"""The embedded llama.cpp backend: one worker process per loaded model. Nothing of llama_cpp is imported here."""

from __future__ import annotations

import asyncio
import importlib.util
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from demandport.errors import (
    BackendUnavailable,
    Cancelled,
    DeadlineExceeded,
    DemandportError,
    ModelLoadFailed,
    QueueFull,
    WorkerCrash,
    from_wire,
)
from demandport.inference.backend import (
    BackendHealth,
    BackendState,
    Capabilities,
    Event,
    Finished,
    Progress,
    TextChunk,
    Usage,
)
from demandport.inference.config import ModelSpec
from demandport.inference.requests import GenerateRequest
from demandport.workers.process import Message, WorkerProcess

WORKER_MODULE = "demandport.llama.worker"
#: Generations that may run or wait in one backend.
MAX_IN_FLIGHT = 1024
READY_TIMEOUT_S = 60.0
#: What of a `GenerateRequest` the worker honours.
PARAMETERS = frozenset(field.name for field in fields(GenerateRequest)) - {"tools", "tool_choice"}
# The worker keeps the deadline itself; this much later the service stops waiting for one that hangs.
_DEADLINE_GRACE_S = 0.05
# How a process ends that a model file has brought down; any other end says nothing about the file.
_FILE_AT_FAULT = ("SIGABRT", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "exited")

LogSink = Callable[[str, str, str], None]


def require_llama() -> None:
    """Refuse when llama-cpp-python is not installed; looks without importing it.

    Raises:
        BackendUnavailable: it is not.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        raise BackendUnavailable("llama-cpp-python is not installed: pip install demandport[llama]")


class LlamaCppBackend:
    """One model in a worker of its own, started when first needed and again after a crash.

    Belongs to the event loop's thread.

    Args:
        spec: how to load the model.
        path: its file.
        on_log: gets (level, logger, text) of what the worker logs.
        on_refused: called when the model could not be loaded.
    """

    def __init__(
        self,
        spec: ModelSpec,
        path: Path,
        *,
        on_log: LogSink | None = None,
        on_refused: Callable[[LlamaCppBackend], None] = lambda backend: None,
    ) -> None:
        self.spec, self.path = spec, path
        self._on_refused = on_refused
        self.restarts = 0
        self.info: dict[str, Any] = {}
        self._on_log = on_log
        self._worker: WorkerProcess | None = None
        self._loading: asyncio.Future[dict[str, Any]] | None = None
        self._load_id = 0
        self._streams: dict[int, _Stream] = {}
        self._entered = 0
        self._last_id = 0
        self._closed = False

    def capabilities(self) -> Capabilities:
        """What it can do."""
        return Capabilities(frozenset({"generate"}), PARAMETERS)

    def health(self) -> BackendHealth:
        """How it stands now."""
        return BackendHealth(self._state(), self._entered, self._worker.pid if self._worker else None, self.restarts)

    def _state(self) -> BackendState:
        if self._closed:
            return "closed"
        if self._worker is None or self._loading is None:
            return "stopped"
        return "ready" if self._loading.done() else "loading"

    async def load(self) -> dict[str, Any]:
        """Have the model loaded; facts about it. However many ask, it is loaded once, and one that is
        cancelled while waiting does not stop it for the others.

        Raises:
            BackendUnavailable: llama-cpp-python is missing, or the backend is closed.
            ModelNotFound, ModelLoadFailed, OutOfMemory: the worker's answer; a file that brought it down
                counts as such.
            WorkerCrash: the worker was killed meanwhile; asking again starts another.
        """
        if self._closed:
            raise BackendUnavailable(f"model {self.spec.model} has been unloaded")
        if self._loading is None:
            try:
                self._start()
            except BackendUnavailable:
                self._on_refused(self)
                raise
        assert self._loading is not None
        return await asyncio.shield(self._loading)

    def _start(self) -> None:
        require_llama()
        loading: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        loading.add_done_callback(_look_at)

        def on_message(message: Message) -> None:
            self._dispatch(worker, loading, message)

        def on_exit(reason: str) -> None:
            self._exited(worker, loading, reason)

        try:
            worker = WorkerProcess.spawn(
                WORKER_MODULE,
                name=f"model {self.spec.model}",
                on_message=on_message,
                on_exit=on_exit,
                ready_timeout_s=READY_TIMEOUT_S,
            )
        except OSError as failed:
            raise BackendUnavailable(f"no worker can be started: {failed}") from None
        self._worker, self._loading = worker, loading
        spec = self.spec
        self._load_id = self._next_id()
        worker.send(
            [
                "load",
                self._load_id,
                {
                    "path": str(self.path),
                    "context_length": spec.context_length,
                    "gpu_layers": spec.gpu_layers,
                    "threads": spec.threads,
                },
            ]
        )

    async def generate(
        self, request: GenerateRequest, on_text: Callable[[str], None] | None = None
    ) -> AsyncGenerator[Event, None]:
        """Generate; see `Backend.generate`.

        Raises:
            WorkerCrash: the worker died while it ran this; the next request gets a new one.
            DeadlineExceeded: `deadline_ms`, which counts from here and includes loading, has passed.
            QueueFull: too many generations run or wait.
            DemandportError: as the worker answered.
        """
        if self._entered >= MAX_IN_FLIGHT:
            raise QueueFull(f"model {self.spec.model} has {MAX_IN_FLIGHT} generations running or waiting")
        self._entered += 1
        try:
            deadline = _deadline(request)
            try:
                async with asyncio.timeout_at(deadline):
                    await self.load()
            except TimeoutError:
                raise _too_late(request) from None
            worker = self._worker
            if worker is None:
                raise WorkerCrash(f"the worker of model {self.spec.model} has died")
            request_id = self._next_id()
            stream = self._streams[request_id] = _Stream(on_text)
            timer = stream.fail_at(deadline, _too_late(request))
            try:
                worker.send(["generate", request_id, _remaining(request, deadline).to_options()])
                while True:
                    event = await stream.next()
                    yield event
                    if isinstance(event, Finished):
                        return
            finally:
                if timer is not None:
                    timer.cancel()
                del self._streams[request_id]
                if not stream.ended and worker.alive:
                    worker.send(["cancel", request_id])
        finally:
            self._entered -= 1

    async def close(self) -> None:
        """Unload the model and end its worker; what still waits for it ends with `backend_unavailable`."""
        self._closed = True
        self._fail_all(BackendUnavailable(f"model {self.spec.model} has been unloaded"))
        worker, self._worker = self._worker, None
        if worker is not None:
            await worker.stop()

    def _next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def _dispatch(self, worker: WorkerProcess, loading: asyncio.Future[dict[str, Any]], message: Message) -> None:
        kind = message[0]
        if kind == "log":
            if self._on_log is not None:
                self._on_log(message[1], worker.name, message[2])
            return
        if kind == "ready" or worker is not self._worker:
            return
        request_id = message[1]
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.accept(message)
        elif request_id == self._load_id and not loading.done():
            self._loaded(loading, message)

    def _loaded(self, loading: asyncio.Future[dict[str, Any]], message: Message) -> None:
        if message[0] == "ok":
            self.info = message[2]
            loading.set_result(self.info)
        elif message[0] == "error":
            # The worker has no model and is of no use: the next one that asks starts afresh.
            worker, self._worker, self._loading = self._worker, None, None
            loading.set_exception(from_wire(message[2]))
            self._on_refused(self)
            if worker is not None:
                worker.kill()

    def _exited(self, worker: WorkerProcess, loading: asyncio.Future[dict[str, Any]], reason: str) -> None:
        if worker is not self._worker:
            return
        self._worker, self._loading = None, None
        if loading.done():
            self.restarts += 1
            self._fail_all(
                WorkerCrash(f"the worker of model {self.spec.model} has died: {reason}", details={"reason": reason})
            )
            return
        self._on_refused(self)
        if any(sign in reason for sign in _FILE_AT_FAULT):
            loading.set_exception(ModelLoadFailed(f"{self.path} brought its worker down: {reason}"))
        else:
            loading.set_exception(
                WorkerCrash(f"the worker died while loading {self.spec.model}: {reason}", details={"reason": reason})
            )

    def _fail_all(self, failed: DemandportError) -> None:
        loading, self._loading = self._loading, None
        if loading is not None and not loading.done():
            loading.set_exception(failed)
        for stream in self._streams.values():
            stream.fail(failed)


class _Stream:
    """What the worker has said of one generation and its consumer has not read; text is merged."""

    def __init__(self, on_text: Callable[[str], None] | None) -> None:
        self.ended = False
        self._on_text = on_text
        self._text: list[str] = []
        self._progress: Progress | None = None
        self._end: deque[Finished | DemandportError] = deque()
        self._wake: asyncio.Future[None] | None = None

    def accept(self, message: Message) -> None:
        """Take a message of the worker in."""
        kind, body = message[0], message[2]
        if kind == "chunk":
            if self._on_text is not None:
                self._on_text(body)
                return
            self._text.append(body)
        elif kind == "progress":
            self._progress = Progress(body["done"], body["total"], body["unit"])
        elif kind == "done":
            usage = Usage(body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"])
            self._finish(Finished(body["finish_reason"], usage, body["seed"]))
        elif kind == "error":
            self._finish(from_wire(body))
        self._notify()

    def fail(self, failed: DemandportError) -> None:
        """End it with an error, unless it has ended; what came before is still read first."""
        # Each consumer gets an error of its own, since raising one writes its traceback into it.
        self._finish(type(failed)(failed.message, details=failed.details))
        self._notify()

    def fail_at(self, deadline: float | None, failed: DemandportError) -> asyncio.TimerHandle | None:
        """Have it fail on its own a little after `deadline`, in case the worker, which keeps it too, hangs."""
        if deadline is None:
            return None
        return asyncio.get_running_loop().call_at(deadline + _DEADLINE_GRACE_S, self.fail, failed)

    async def next(self) -> Event:
        """The next event; waits for it. After the end: `Cancelled`, since nobody should ask."""
        while True:
            if self._progress is not None:
                progress, self._progress = self._progress, None
                return progress
            if self._text:
                text = self._text[0] if len(self._text) == 1 else "".join(self._text)
                self._text.clear()
                return TextChunk(text)
            if self._end:
                end = self._end.popleft()
                if isinstance(end, Finished):
                    return end
                raise end
            if self.ended:
                raise Cancelled("the generation has ended")
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake

    def _finish(self, end: Finished | DemandportError) -> None:
        if not self.ended:
            self.ended = True
            self._end.append(end)

    def _notify(self) -> None:
        wake, self._wake = self._wake, None
        if wake is not None and not wake.done():
            wake.set_result(None)


def _deadline(request: GenerateRequest) -> float | None:
    return None if request.deadline_ms is None else asyncio.get_running_loop().time() + request.deadline_ms / 1000


def _too_late(request: GenerateRequest) -> DeadlineExceeded:
    return DeadlineExceeded(f"the deadline of {request.deadline_ms} ms has passed")


def _remaining(request: GenerateRequest, deadline: float | None) -> GenerateRequest:
    """The request with what is left of its deadline after loading."""
    if deadline is None:
        return request
    left = int((deadline - asyncio.get_running_loop().time()) * 1000)
    return replace(request, deadline_ms=max(1, left))


def _look_at(loading: asyncio.Future[dict[str, Any]]) -> None:
    """Mark a failure as seen: all who waited may have been cancelled."""
    if not loading.cancelled():
        loading.exception()
