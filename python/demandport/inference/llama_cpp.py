"""The embedded llama.cpp backend: one worker process per loaded model. Nothing of llama_cpp is imported here."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import fields
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
from demandport.inference import caches
from demandport.inference.backend import (
    BackendHealth,
    BackendState,
    Capabilities,
    Embeddings,
    Event,
    Finished,
    LogSink,
    Operation,
    Progress,
    TextChunk,
    Usage,
)
from demandport.inference.config import ModelSpec
from demandport.inference.requests import EmbedRequest, GenerateRequest, RerankRequest, to_options
from demandport.workers.policy import Restarts
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
_NO_LIFE = "no sign of life"
_OWN_FAULT = ("SIGABRT", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "exited", _NO_LIFE)
#: A worker with something to do answers pings between two steps; one that says nothing for so long is killed.
PING_S, HANG_S, LOAD_HANG_S = 5.0, 30.0, 300.0


def require_llama() -> None:
    """Refuse when llama-cpp-python is not installed; looks without importing it.

    Raises:
        BackendUnavailable: it is not.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        raise BackendUnavailable(
            "llama-cpp-python is not there; mix demand_port.install --extras llama, or pip install llama-cpp-python"
        )


class LlamaCppBackend:
    """One model in a worker of its own, started when first needed and again after a crash.

    Belongs to the event loop's thread.

    Args:
        spec: how to load the model.
        path: its file, the first one of several.
        purpose: the one operation it is loaded for.
        size_bytes: of all its files, to report progress by.
        cache_directory: where KV caches are saved.
        on_log: gets (level, logger, text) of what the worker logs.
        on_refused: called when the model could not be loaded.
        restarts: when the worker may be started again.
    """

    kind = "llama.cpp"

    def __init__(
        self,
        spec: ModelSpec,
        path: Path,
        *,
        purpose: Operation = "generate",
        size_bytes: int = 0,
        cache_directory: Path | None = None,
        on_log: LogSink | None = None,
        on_refused: Callable[[], None] = lambda: None,
        restarts: Restarts | None = None,
    ) -> None:
        self.spec, self.path, self.purpose, self.size_bytes = spec, path, purpose, size_bytes
        self.restarts = 0
        self.info: dict[str, Any] = {}
        self._cache_directory = cache_directory
        self._on_log, self._on_refused = on_log, on_refused
        self._policy = restarts or Restarts()
        self._worker: WorkerProcess | None = None
        #: One whose model could not be loaded, until it is gone.
        self._refused_worker: WorkerProcess | None = None
        self._starting: asyncio.TimerHandle | None = None
        self._load_id = 0
        self._ready = False
        self._crashed = False
        self._heard_at = 0.0
        self._watching: asyncio.TimerHandle | None = None
        self._streams: dict[int, _Stream] = {}
        self._last_id = 0
        self._closed = False

    def capabilities(self) -> Capabilities:
        """What it can do."""
        return Capabilities(frozenset({self.purpose}), PARAMETERS if self.purpose == "generate" else frozenset())

    def health(self) -> BackendHealth:
        """How it stands now."""
        pid = self._worker.pid if self._worker else None
        return BackendHealth(self._state(), len(self._streams), pid, self.restarts, self._crashed)

    def _state(self) -> BackendState:
        if self._closed:
            return "closed"
        if self._ready:
            return "ready"
        if self._worker is not None or self._starting is not None:
            return "loading"
        return "quarantined" if self._policy.quarantined and self._pause_s() else "stopped"

    # ----------------------------------------------------------------------------------------- requests

    async def load(self) -> dict[str, Any]:
        """Have the model loaded; facts about it. However many ask, it is loaded once, and one that is
        cancelled while waiting does not stop it for the others.

        Raises:
            BackendUnavailable: llama-cpp-python is missing, or the backend is closed.
            ModelNotFound, ModelLoadFailed, OutOfMemory: the worker's answer; a file that brought it down
                counts as such, and so does one that is quarantined for that.
            WorkerCrash: the worker was killed meanwhile; asking again starts another.
        """
        async for _ in self._events(None, {}, None):
            pass
        return self.info

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
        self.capabilities().check(request, f"the backend {self.kind} ({self.purpose})")
        async with aclosing(self._events("generate", self._options(request), request.deadline_ms, on_text)) as events:
            async for event in events:
                yield self._finished(event) if isinstance(event, dict) else event

    async def embed(self, request: EmbedRequest) -> Embeddings:
        """The vectors of some texts; see `Backend.embed`. Raises as `generate`."""
        body = await self._result("embed", to_options(request), request.deadline_ms)
        return Embeddings(body["vectors"], body["dimensions"], Usage(**body["usage"]), self.spec.model)

    async def rerank(self, request: RerankRequest) -> list[float]:
        """A score per document; see `Backend.rerank`. Raises as `generate`."""
        body = await self._result("rerank", to_options(request), request.deadline_ms)
        scores: list[float] = body["scores"]
        return scores

    async def save_cache(self, cache: caches.KvCache, name: str) -> tuple[caches.KvCache, int]:
        """Save a KV cache under a name; what is not in the cells any more is computed again.

        Returns:
            the cache with its name, and the size of its file in bytes.

        Raises:
            Forbidden: no directory is configured, or the name is none. What else, as `generate`.
        """
        path = caches.file_of(self._cache_directory, name)
        request = {
            "kv_cache": cache.to_plain(),
            "adapters": [{"path": path, "scale": scale} for path, scale in cache.adapters],
        }
        body = await self._result("save", {"request": request, "path": str(path)}, None)
        return caches.KvCache.from_plain(body["kv_cache"]), body["bytes"]

    async def close(self) -> None:
        """Unload the model and end its worker; what still waits for it ends with `backend_unavailable`."""
        self._closed = True
        self._fail_all(BackendUnavailable(f"model {self.spec.model} has been unloaded"))
        for worker in (self._let_go(), self._refused_worker):
            if worker is not None:
                await worker.stop()

    def _options(self, request: GenerateRequest) -> dict[str, Any]:
        options = request.to_options()
        if request.kv_cache is not None:
            # Which file that is, only the service says.
            cache = {name: value for name, value in request.kv_cache.items() if name != "file"}
            if cache.get("name") is not None:
                cache["file"] = str(caches.file_of(self._cache_directory, str(cache["name"])))
            options["kv_cache"] = cache
        return options

    def _finished(self, body: dict[str, Any]) -> Finished:
        return Finished(
            body["finish_reason"],
            Usage(**body["usage"]),
            body["seed"],
            logprobs=body.get("logprobs"),
            kv_cache=body["kv_cache"] | {"model": {"model": self.spec.model, **self.spec.settings}},
            model=self.spec.model,
        )

    async def _result(self, kind: str, body: dict[str, Any], deadline_ms: int | None) -> dict[str, Any]:
        result: dict[str, Any] = {}
        async with aclosing(self._events(kind, body, deadline_ms)) as events:
            async for event in events:
                if isinstance(event, dict):
                    result = event
        return result

    async def _events(
        self,
        kind: str | None,
        body: dict[str, Any],
        deadline_ms: int | None,
        on_text: Callable[[str], None] | None = None,
    ) -> AsyncGenerator[TextChunk | Progress | dict[str, Any], None]:
        """One request from start to end: the model is loaded if need be, then it is sent; the last event is the body of
        the worker's `done`. Without a kind it ends when the model is loaded."""
        if len(self._streams) >= MAX_IN_FLIGHT:
            raise QueueFull(f"model {self.spec.model} has {MAX_IN_FLIGHT} requests running or waiting")
        self._last_id += 1
        request_id, loop = self._last_id, asyncio.get_running_loop()
        deadline = None if deadline_ms is None else loop.time() + deadline_ms / 1000
        stream = self._streams[request_id] = _Stream(on_text, kind, body, deadline)
        late = DeadlineExceeded(f"the deadline of {deadline_ms} ms has passed")
        # The worker keeps the deadline itself; this is for loading, and for one that hangs.
        timer = None if deadline is None else loop.call_at(deadline + _DEADLINE_GRACE_S, stream.fail, late)
        try:
            self._start()
            self._watch()
            if self._ready:
                self._send(request_id, stream)
            while True:
                event = await stream.next()
                yield event
                if isinstance(event, dict):
                    return
        finally:
            if timer is not None:
                timer.cancel()
            del self._streams[request_id]
            worker = stream.worker
            if not stream.ended and worker is not None and worker.alive:
                worker.send(["cancel", request_id])

    def _send(self, request_id: int, stream: _Stream) -> None:
        worker = self._worker
        assert worker is not None
        if stream.kind is None:
            stream.accept(["done", request_id, self.info])
            return
        body = stream.body
        if stream.deadline is not None:
            left = stream.deadline - asyncio.get_running_loop().time()
            body = body | {"deadline_ms": max(1, int(left * 1000))}
        worker.send([stream.kind, request_id, body])
        stream.worker = worker

    # ------------------------------------------------------------------------------------- the worker

    def _start(self) -> None:
        """Have a worker that loads the model, or will in a moment."""
        if self._closed:
            raise BackendUnavailable(f"model {self.spec.model} has been unloaded")
        if self._worker is not None or self._starting is not None:
            return
        try:
            require_llama()
        except BackendUnavailable:
            self._on_refused()
            raise
        pause = self._pause_s()
        if pause and self._policy.quarantined:
            raise ModelLoadFailed(
                f"{self.path} has brought its worker down {self._policy.failures} times in a row; "
                f"it is tried again in {pause:.0f} s, or when the file has changed",
                details={"retry_after_ms": int(pause * 1000)},
            )
        if pause:
            self._starting = asyncio.get_running_loop().call_later(pause, self._spawn)
        else:
            self._spawn()

    def _pause_s(self) -> float:
        return self._policy.wait_s(asyncio.get_running_loop().time())

    def _spawn(self) -> None:
        self._starting = None

        def on_message(message: Message) -> None:
            self._dispatch(worker, message)

        def on_exit(reason: str) -> None:
            self._exited(worker, reason)

        try:
            worker = WorkerProcess.spawn(
                WORKER_MODULE,
                name=f"model {self.spec.model}",
                on_message=on_message,
                on_exit=on_exit,
                ready_timeout_s=READY_TIMEOUT_S,
            )
        except OSError as failed:
            self._fail_all(BackendUnavailable(f"no worker can be started: {failed}"))
            return
        self._worker = worker
        self._watch()
        self._last_id += 1
        self._load_id = self._last_id
        spec = self.spec
        load = {
            "path": str(self.path),
            "size_bytes": self.size_bytes,
            "purpose": self.purpose,
            "context_length": spec.context_length,
            "gpu_layers": spec.gpu_layers,
            "threads": spec.threads,
        }
        worker.send(["load", self._load_id, load])

    def _watch(self) -> None:
        """See to it that a worker that hangs is found while anybody waits for it."""
        if self._watching is None:
            loop = asyncio.get_running_loop()
            self._heard_at = loop.time()
            self._watching = loop.call_later(PING_S, self._look)

    def _look(self) -> None:
        self._watching = None
        worker, loop = self._worker, asyncio.get_running_loop()
        if not self._streams or worker is None:
            return
        silent_s, limit_s = loop.time() - self._heard_at, HANG_S if self._ready else LOAD_HANG_S
        if silent_s >= limit_s:
            worker.condemn(f"{_NO_LIFE} for {silent_s:.0f} s")
            return
        worker.send(["ping", 0])
        self._watching = loop.call_later(PING_S, self._look)

    def _let_go(self) -> WorkerProcess | None:
        """Have no worker any more; returns the one there was, which may live on."""
        worker, self._worker, self._ready = self._worker, None, False
        for timer in (self._starting, self._watching):
            if timer is not None:
                timer.cancel()
        self._starting = self._watching = None
        return worker

    def _dispatch(self, worker: WorkerProcess, message: Message) -> None:
        kind = message[0]
        if kind == "log":
            if self._on_log is not None:
                self._on_log(message[1], worker.name, message[2])
            return
        if worker is not self._worker:
            return
        self._heard_at = asyncio.get_running_loop().time()
        if kind in ("ready", "pong"):
            return
        stream = self._streams.get(message[1])
        if stream is not None:
            stream.accept(message)
            if kind == "done" and self._policy.failures:
                self._policy.succeeded()
        elif message[1] == self._load_id:
            self._loading(worker, message)

    def _loading(self, worker: WorkerProcess, message: Message) -> None:
        if message[0] == "progress":
            for stream in self._streams.values():
                stream.accept(message)
        elif message[0] == "ok":
            self.info, self._ready, self._crashed = message[2], True, False
            for request_id, stream in list(self._streams.items()):
                if not stream.ended:
                    try:
                        self._send(request_id, stream)
                    except DemandportError as failed:  # what it asks for cannot travel
                        stream.fail(failed)
        else:
            # The worker has no model and is of no use: the next one that asks starts afresh.
            self._refused_worker = self._let_go()
            self._fail_all(from_wire(message[2]))
            worker.kill()
            self._on_refused()

    def _exited(self, worker: WorkerProcess, reason: str) -> None:
        if worker is not self._worker:
            return
        loaded = self._ready
        self._let_go()
        self._crashed = True
        own_fault = any(sign in reason for sign in _OWN_FAULT)
        if own_fault or not loaded:
            self._policy.died(asyncio.get_running_loop().time())
        facts = {"reason": reason}
        if loaded:
            self.restarts += 1
            self._fail_all(WorkerCrash(f"the worker of model {self.spec.model} has died: {reason}", details=facts))
            with contextlib.suppress(DemandportError):  # one that is quarantined stays away
                self._start()
        elif own_fault:
            self._fail_all(ModelLoadFailed(f"{self.path} brought its worker down: {reason}", details=facts))
        else:
            said = f"the worker died while loading {self.spec.model}: {reason}"
            self._fail_all(WorkerCrash(said, details=facts))

    def _fail_all(self, failed: DemandportError) -> None:
        for stream in self._streams.values():
            stream.fail(failed)


class _Stream:
    """One request: what to send once the model is there, and what the worker has said of it and its consumer has not
    read; text is merged."""

    def __init__(
        self, on_text: Callable[[str], None] | None, kind: str | None, body: dict[str, Any], deadline: float | None
    ) -> None:
        self.kind, self.body, self.deadline = kind, body, deadline
        #: To whom it was sent.
        self.worker: WorkerProcess | None = None
        self.ended = False
        self._on_text = on_text
        self._text: list[str] = []
        self._progress: Progress | None = None
        self._end: deque[dict[str, Any] | DemandportError] = deque()
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
            self._finish(body)
        elif kind == "error":
            self._finish(from_wire(body))
        self._notify()

    def fail(self, failed: DemandportError) -> None:
        """End it with an error, unless it has ended; what came before is still read first."""
        # Each consumer gets an error of its own, since raising one writes its traceback into it.
        self._finish(type(failed)(failed.message, details=failed.details))
        self._notify()

    async def next(self) -> TextChunk | Progress | dict[str, Any]:
        """The next event, the last one the body of `done`; waits for it. After the end: `Cancelled`."""
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
                if isinstance(end, dict):
                    return end
                raise end
            if self.ended:
                raise Cancelled("the request has ended")
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake

    def _finish(self, end: dict[str, Any] | DemandportError) -> None:
        if not self.ended:
            self.ended = True
            self._end.append(end)

    def _notify(self) -> None:
        wake, self._wake = self._wake, None
        if wake is not None and not wake.done():
            wake.set_result(None)
