"""Knows the models: which there are, which are loaded, and which backend runs which. Keeps them within the memory."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

from demandport.errors import BackendUnavailable, ModelLoadFailed, OutOfMemory
from demandport.inference import caches, memory
from demandport.inference.backend import Backend, Embeddings, Event, Finished, LogSink, Operation
from demandport.inference.config import FILES, TINY, Config, ModelSpec
from demandport.inference.library import Library, tiny_path
from demandport.inference.llama_cpp import LlamaCppBackend
from demandport.inference.replicas import Replicas
from demandport.inference.requests import EmbedRequest, GenerateRequest, RerankRequest
from demandport.workers.policy import Restarts

WhenBusy = Literal["refuse", "wait", "stop"]
WHEN_BUSY: tuple[WhenBusy, ...] = ("refuse", "wait", "stop")
#: What a worker holds besides the model: the interpreter, llama.cpp, buffers. A guess for before it is measured.
WORKER_BYTES = 64 * 1024 * 1024

ModelKey = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class _Found:
    """A model's files.

    Attributes:
        identity: device, inode, size and time of change in nanoseconds of the first.
    """

    path: Path
    identity: tuple[int, int, int, int]
    size_bytes: int
    mmproj: Path | None = None


@dataclass(eq=False, slots=True)
class _Entry:
    """One model that is loaded, or will be when it is first used."""

    id: str
    spec: ModelSpec
    path: Path | None
    file: tuple[int, int, int, int] | None
    size_bytes: int
    backend: Backend
    in_flight: int = 0
    used_at: float = 0.0
    idle: asyncio.Event = field(default_factory=asyncio.Event)


class Gateway:
    """The models of one service. Make it on the event loop, `close` it before the loop ends.

    A request for one model is never answered by another: a model is its file (or its server and name) and the settings
    it is loaded with.

    Args:
        config: the models there are, and the memory they may take.
        on_log: gets (level, logger, text) of what the workers log; called on the loop.
    """

    def __init__(self, config: Config | None = None, *, on_log: LogSink | None = None) -> None:
        self.config = config or Config()
        self.library = Library(self.config.model_directories)
        self._on_log = on_log
        self._entries: dict[ModelKey, _Entry] = {}
        #: Models by the names they were asked for: the library need not be searched each time.
        self._known: dict[str, _Found] = {}
        self._admitting = asyncio.Lock()
        #: The ends of backends whose model could not be loaded.
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False

    # ------------------------------------------------------------------------------------------ requests

    async def generate(
        self,
        request: GenerateRequest,
        model: ModelSpec | str | None = None,
        *,
        on_text: Callable[[str], None] | None = None,
    ) -> AsyncGenerator[Event, None]:
        """Generate with a model, which is loaded if need be; see `Backend.generate`.

        Close the generator (``contextlib.aclosing``) when you leave early: that stops the model.

        Args:
            model: a name of the configuration or the library, or a path; None: the configured default.

        Raises:
            ModelNotFound, ModelLoadFailed, OutOfMemory, BackendUnavailable: it cannot be had.
            DemandportError: what else failed.
        """
        async with (
            self._using(self._spec(model), "generate") as entry,
            aclosing(entry.backend.generate(request, on_text)) as events,
        ):
            async for event in events:
                yield replace(event, model_ref=_reference(entry)) if isinstance(event, Finished) else event

    async def embed(self, request: EmbedRequest, model: ModelSpec | str | None = None) -> Embeddings:
        """The vectors of some texts; see `Backend.embed`. Raises as `generate`."""
        async with self._using(self._spec(model), "embed") as entry:
            return await entry.backend.embed(request)

    async def rerank(self, request: RerankRequest, model: ModelSpec | str | None = None) -> list[float]:
        """A score per document; see `Backend.rerank`. Raises as `generate`."""
        async with self._using(self._spec(model), "rerank") as entry:
            return await entry.backend.rerank(request)

    async def save_cache(self, value: Mapping[str, Any], name: str) -> tuple[dict[str, Any], int]:
        """Save a KV cache, as `Finished.kv_cache` has it, under a name.

        Returns:
            the cache with its name, and the size of its file in bytes.

        Raises:
            TypeMismatch: it is none. Forbidden: no directory is configured, or the name is none. Others as `generate`.
        """
        cache = caches.KvCache.from_plain(value)
        async with self._using(self._spec(ModelSpec.from_options(cache.model)), "generate") as entry:
            backend = _each(entry)[0]
            if not isinstance(backend, LlamaCppBackend):
                raise BackendUnavailable(f"the backend {backend.kind} saves no KV caches")
            saved, size = await backend.save_cache(cache, name)
        return saved.to_plain(), size

    async def load_cache(self, name: str) -> dict[str, Any]:
        """A KV cache that was saved, as `Finished.kv_cache` has it. Raises as `caches.read`."""
        path = caches.file_of(self.config.cache_directory, name)
        return (await asyncio.to_thread(caches.read, path)).to_plain()

    # -------------------------------------------------------------------------------------------- models

    async def load_model(self, spec: ModelSpec, purpose: Operation = "generate") -> dict[str, Any]:
        """Load a model and return its description once it is ready; as `models` lists it.

        Raises:
            ModelNotFound, ModelLoadFailed, OutOfMemory, BackendUnavailable: it cannot be loaded.
            WorkerCrash: its worker was killed meanwhile; it can be tried again.
        """
        async with self._using(self._spec(spec), purpose) as entry:
            await entry.backend.load()
        return _describe(entry)

    async def unload_model(self, model: str | Mapping[str, Any], when_busy: WhenBusy = "stop") -> bool:
        """Unload a model; False when it is not loaded.

        Args:
            model: a name: that model however it was loaded; or a `model_ref`: the very one, and no other (of the
                library, which loads none: the file however it was loaded).
            when_busy: ``refuse``; ``wait`` until it has nothing to do; ``stop``: what it runs ends with
                `backend_unavailable`.

        Raises:
            BackendUnavailable: it is busy and that is to be refused.
        """
        entries = [entry for entry in self._entries.values() if self._meant(entry, model)]
        busy = sum(entry.in_flight for entry in entries)
        if busy and when_busy == "refuse":
            raise BackendUnavailable(
                f"model {entries[0].spec.model} is in use by {busy}: say when_busy wait or stop",
                details={"in_flight": busy},
            )
        for entry in entries:
            while entry.in_flight and when_busy == "wait":
                entry.idle.clear()
                await entry.idle.wait()
            await self._unload(entry)
        return bool(entries)

    def models(self) -> list[dict[str, Any]]:
        """The models that are loaded, loading or quarantined, as plain data; does not block."""
        return [_describe(entry) for entry in self._entries.values()]

    async def close(self) -> None:
        """Unload everything; returns when every worker is reaped."""
        self._closed = True
        entries = list(self._entries.values())
        self._entries.clear()
        closing = [*self._closing, *(entry.backend.close() for entry in entries)]
        results = await asyncio.gather(*closing, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    # -------------------------------------------------------------------------------------------- finding

    def ollama(self, model: str) -> ModelSpec:
        """A model of Ollama: the configuration's entry of that name, or else what the configured server calls so."""
        configured = self.config.models.get(model)
        if configured is not None and configured.backend == "ollama":
            return configured
        return ModelSpec(model, backend="ollama", url=self.config.ollama_url)

    def _spec(self, model: ModelSpec | str | None) -> ModelSpec:
        """What a request means: an entry of the configuration, or else a file."""
        spec = model if isinstance(model, ModelSpec) else ModelSpec(model or self.config.default_model)
        configured = self.config.models.get(spec.model)
        return configured if configured is not None and spec == ModelSpec(spec.model) else spec

    @asynccontextmanager
    async def _using(self, spec: ModelSpec, purpose: Operation) -> AsyncIterator[_Entry]:
        """The model's entry, with room for it in the memory; it is not evicted in the block."""
        entry = await self._entry(spec, purpose)
        entry.in_flight += 1
        try:
            await self._admit(entry)
            yield entry
        finally:
            entry.in_flight -= 1
            entry.used_at = time.monotonic()
            if not entry.in_flight:
                entry.idle.set()

    async def _entry(self, spec: ModelSpec, purpose: Operation) -> _Entry:
        # A file may lie on a network: even looking at it can take long.
        found = await asyncio.to_thread(self._find, spec) if spec.backend in FILES else None
        if self._closed:
            raise BackendUnavailable("the gateway is closed")
        if found is None:
            key: ModelKey = (spec,)
        else:
            key = (found.identity, purpose, repr(spec.settings))
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = self._new_entry(key, spec, found, purpose)
        return entry

    async def _drop_replaced(self, entry: _Entry) -> None:
        """Unload what was loaded from a file that is another one now: nobody can ask for it any more."""
        for other in list(self._entries.values()):
            if other.path is not None and other.path == entry.path and other.file != entry.file and not other.in_flight:
                await self._unload(other)

    def _meant(self, entry: _Entry, model: str | Mapping[str, Any]) -> bool:
        if not isinstance(model, str):
            return model.get("id") in (entry.id, str(entry.path))
        known = self._known.get(self._spec(model).model)
        names = (entry.id, entry.spec.model, str(entry.path))
        same_file = known is not None and known.identity == entry.file
        return model in names or same_file or entry.spec == self.config.models.get(model)

    def _find(self, spec: ModelSpec) -> _Found:
        """Where the model lies. Blocks."""
        if spec.model == TINY:  # asked for most often
            path = tiny_path()
            identity = _identity(path)
            return _Found(path, identity, identity[2])
        known = self._known.get(spec.model)
        if known is None or not known.path.exists() or _identity(known.path) != known.identity:
            path = Path(spec.model).expanduser()
            entry = self.library.resolve(str(path.absolute()) if path.is_file() else spec.model)
            known = _Found(entry.path, _identity(entry.path), entry.size_bytes, entry.mmproj)
            self._known[spec.model] = known
        return known

    def _new_entry(self, key: ModelKey, spec: ModelSpec, found: _Found | None, purpose: Operation) -> _Entry:
        make = {"openai": _openai, "ollama": _ollama}.get(spec.backend)
        backend: Backend
        path, size = None, 0
        if make is not None:
            backend = make(spec)
        else:
            assert found is not None
            restarts = Restarts()
            each = [self._local(key, spec, found, purpose, restarts) for _ in range(spec.replicas)]
            backend = each[0] if len(each) == 1 else Replicas(each, spec.balance)
            path, size = found.path, found.size_bytes + WORKER_BYTES * spec.replicas
        id = hashlib.sha256(repr(key).encode()).hexdigest()[:12]
        return _Entry(id, spec, path, None if found is None else found.identity, size, backend)

    def _local(self, key: ModelKey, spec: ModelSpec, found: _Found, purpose: Operation, restarts: Restarts) -> Backend:
        """A backend whose process is ours."""
        if spec.backend == "llama-server":
            from demandport.inference.llama_server import LlamaServerBackend

            mmproj = Path(spec.mmproj) if spec.mmproj else found.mmproj
            return LlamaServerBackend(
                spec,
                found.path,
                mmproj,
                purpose=purpose,
                size_bytes=found.size_bytes,
                restarts=restarts,
                on_log=self._on_log,
            )
        return LlamaCppBackend(
            spec,
            found.path,
            purpose=purpose,
            size_bytes=found.size_bytes,
            cache_directory=self.config.cache_directory,
            on_log=self._on_log,
            on_refused=lambda: self._refused(key),
            restarts=restarts,
        )

    def _refused(self, key: ModelKey) -> None:
        """A model that could not be loaded is not kept, unless it was loaded once and can be again."""
        entry = self._entries.get(key)
        if entry is not None and not entry.backend.health().restarts:
            del self._entries[key]
            closing = asyncio.get_running_loop().create_task(entry.backend.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    # --------------------------------------------------------------------------------------------- memory

    async def _admit(self, entry: _Entry) -> None:
        """Make room for a model before it is loaded: the idle ones that were not used for longest go.

        Raises:
            OutOfMemory: those that are in use leave none.
        """
        if _present(entry):
            return
        async with self._admitting:
            await self._drop_replaced(entry)
            limit = self.config.memory_limit_bytes or memory.default_limit_bytes()
            held = {} if _present(entry) else await self._held_bytes()
            while not _present(entry) and sum(held.values()) + entry.size_bytes > limit:
                idle = [one for one in self._entries.values() if held.get(one) and not one.in_flight]
                in_use = sum(held.values()) - sum(held[one] for one in idle)
                if in_use + entry.size_bytes > limit:
                    self._refuse(entry, in_use, limit)
                await self._unload(min(idle, key=lambda one: one.used_at))
                held = await self._held_bytes()

    def _refuse(self, entry: _Entry, in_use: int, limit: int) -> NoReturn:
        if entry.in_flight == 1:  # nobody else waits for it
            self._entries = {key: one for key, one in self._entries.items() if one is not entry}
        raise OutOfMemory(
            f"model {entry.spec.model} needs about {entry.size_bytes >> 20} MiB; models in use hold "
            f"{in_use >> 20} of the {limit >> 20} MiB they may",
            details={"needed_bytes": entry.size_bytes, "used_bytes": in_use, "limit_bytes": limit},
        )

    async def _held_bytes(self) -> dict[_Entry, int]:
        """What the models hold that are loaded, and what those will that are being loaded."""
        entries = [one for one in self._entries.values() if one.size_bytes and _present(one)]
        measured = await asyncio.to_thread(memory.held_bytes, {one.id: _pids(one) for one in entries})
        loading = {one for one in entries if one.backend.health().state == "loading"}
        return {one: max(measured[one.id], one.size_bytes if one in loading else 0) for one in entries}

    async def _unload(self, entry: _Entry) -> None:
        for key in [key for key, one in self._entries.items() if one is entry]:
            del self._entries[key]
        await entry.backend.close()


def _openai(spec: ModelSpec) -> Backend:
    from demandport.inference.openai import OpenAIBackend

    return OpenAIBackend(spec)


def _ollama(spec: ModelSpec) -> Backend:
    from demandport.inference.ollama import OllamaBackend

    return OllamaBackend(spec)


def _identity(path: Path) -> tuple[int, int, int, int]:
    try:
        found = path.stat()
    except OSError as failed:
        raise ModelLoadFailed(f"{path} cannot be read: {failed.strerror}") from None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _each(entry: _Entry) -> Sequence[Backend]:
    return entry.backend.backends if isinstance(entry.backend, Replicas) else [entry.backend]


def _present(entry: _Entry) -> bool:
    """It is loaded, or being loaded, or takes no memory of this machine that we know of."""
    return not entry.size_bytes or all(one.health().state in ("loading", "ready") for one in _each(entry))


def _pids(entry: _Entry) -> list[int]:
    return [pid for backend in _each(entry) if (pid := backend.health().os_pid) is not None]


def _reference(entry: _Entry) -> dict[str, Any]:
    """What names the loaded model: a `model_ref`."""
    return {"id": entry.id, "model": entry.spec.model, "backend": entry.backend.kind}


def _describe(entry: _Entry) -> dict[str, Any]:
    health, info = entry.backend.health(), entry.backend.info
    described = _reference(entry) | {
        "path": None if entry.path is None else str(entry.path),
        "state": health.state,
        "in_flight": health.in_flight,
        "os_pid": health.os_pid,
        "restarts": health.restarts,
    }
    if isinstance(entry.backend, Replicas):
        described["replicas"] = [
            {"state": one.state, "in_flight": one.in_flight, "os_pid": one.os_pid, "restarts": one.restarts}
            for one in entry.backend.healths()
        ]
    known = ("context_length", "size_bytes", "parameters", "dimensions")
    return described | {name: info[name] for name in known if name in info}
