"""Knows the models: which are loaded, which backend runs which. Loads each once however many ask."""

from __future__ import annotations

import asyncio
import functools
import importlib.resources
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from demandport.errors import BackendUnavailable, ModelLoadFailed, ModelNotFound
from demandport.inference.backend import Event
from demandport.inference.config import TINY, ModelSpec
from demandport.inference.llama_cpp import LlamaCppBackend, LogSink
from demandport.inference.requests import GenerateRequest


@dataclass(frozen=True, slots=True)
class ModelKey:
    """What makes a loaded model a different one: the very file, and how it is loaded.

    Attributes:
        file: device, inode, size and time of change in nanoseconds.
    """

    file: tuple[int, int, int, int]
    context_length: int | None
    gpu_layers: int
    threads: int | None


class Gateway:
    """The models of one service. Make it on the event loop, `close` it before the loop ends.

    A request for one model is never answered by another.

    Args:
        default_model: what a request without a model gets: a name, or the path of a GGUF file.
        on_log: gets (level, logger, text) of what the workers log; called on the loop.
    """

    def __init__(self, *, default_model: str = TINY, on_log: LogSink | None = None) -> None:
        self.default_model = default_model
        self._on_log = on_log
        self._backends: dict[ModelKey, LlamaCppBackend] = {}
        self._closed = False

    async def generate(
        self,
        request: GenerateRequest,
        model: ModelSpec | str | None = None,
        *,
        on_text: Callable[[str], None] | None = None,
    ) -> AsyncGenerator[Event, None]:
        """Find the model's backend and start; returns the events. The model is loaded when the first is asked for.

        Close the generator (``contextlib.aclosing``) when you leave early: that stops the model.

        Args:
            model: None: `default_model`.
            on_text: as `Backend.generate`.

        Raises:
            ModelNotFound, ModelLoadFailed, BackendUnavailable: here, or when the first event is asked for.
        """
        backend = await self._backend(self._spec(model))
        return backend.generate(request, on_text)

    async def load_model(self, spec: ModelSpec) -> dict[str, Any]:
        """Load a model and return its description once it is ready; as `models` lists it.

        Raises:
            ModelNotFound, ModelLoadFailed, OutOfMemory, BackendUnavailable: it cannot be loaded.
            WorkerCrash: its worker was killed meanwhile; it can be tried again.
        """
        backend = await self._backend(spec)
        await backend.load()
        return _describe(backend)

    async def unload_model(self, model: str) -> bool:
        """Unload a model, however it was loaded; False when it is not loaded. What it runs ends with
        `backend_unavailable`."""
        found = [key for key, backend in self._backends.items() if model in (backend.spec.model, str(backend.path))]
        backends = [self._backends.pop(key) for key in found]
        for backend in backends:
            await backend.close()
        return bool(backends)

    def models(self) -> list[dict[str, Any]]:
        """The models that are loaded or loading, as plain data; does not block."""
        return [_describe(backend) for backend in self._backends.values()]

    async def close(self) -> None:
        """Unload everything; returns when every worker is reaped."""
        self._closed = True
        backends = list(self._backends.values())
        self._backends.clear()
        results = await asyncio.gather(*(backend.close() for backend in backends), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    def _spec(self, model: ModelSpec | str | None) -> ModelSpec:
        if isinstance(model, ModelSpec):
            return model
        return ModelSpec(model or self.default_model)

    async def _backend(self, spec: ModelSpec) -> LlamaCppBackend:
        path = _path(spec.model)
        # A file may lie on a network: even looking at it can take long.
        identity = await asyncio.to_thread(_identify, path)
        if self._closed:
            raise BackendUnavailable("the gateway is closed")
        key = ModelKey(identity, spec.context_length, spec.gpu_layers, spec.threads)
        backend = self._backends.get(key)
        if backend is None:
            backend = self._backends[key] = LlamaCppBackend(
                replace(spec), path, on_log=self._on_log, on_refused=self._forget
            )
        return backend

    def _forget(self, backend: LlamaCppBackend) -> None:
        """A model that could not be loaded is not kept, unless it was loaded once and can be again."""
        if not backend.restarts:
            for key in [key for key, one in self._backends.items() if one is backend]:
                del self._backends[key]


def _path(model: str) -> Path:
    if model == TINY:
        return _tiny_path()
    return Path(model).expanduser()


@functools.cache
def _tiny_path() -> Path:
    return Path(str(importlib.resources.files("demandport") / "data" / "tiny.gguf"))


def _identify(path: Path) -> tuple[int, int, int, int]:
    try:
        found = path.stat()
    except OSError as failed:
        if isinstance(failed, PermissionError):
            raise ModelLoadFailed(f"{path} cannot be read: {failed.strerror}") from None
        raise ModelNotFound(f"there is no model {path}; give 'tiny' or the path of a GGUF file") from None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _describe(backend: LlamaCppBackend) -> dict[str, Any]:
    health = backend.health()
    return {
        "model": backend.spec.model,
        "path": str(backend.path),
        "state": health.state,
        "backend": "llama.cpp",
        "in_flight": health.in_flight,
        "os_pid": health.os_pid,
        "restarts": health.restarts,
        **{name: backend.info[name] for name in ("context_length", "size_bytes", "parameters") if name in backend.info},
    }
