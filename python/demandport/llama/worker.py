"""The program of a model worker: ``python -m demandport.llama.worker PARENT_PID``.

In: ``["load", id, spec]``, then ``["generate", id, request]``, ``["save", id, {request, path}]``, ``["embed",
id, request]`` or ``["rerank", id, request]``, by what it was loaded for; ``["cancel", id]`` and ``["ping", id]``.
Out: ``["ready", info]``, ``["ok", id, result]``, ``["error", id, error]``, ``["progress", id, {done, total,
unit}]``, ``["chunk", id, text]``, ``["done", id, result]``, ``["pong", id]``, ``["log", level, text]``.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from demandport.errors import BackendUnavailable, DemandportError, Internal
from demandport.workers.child import Channel, Message

if TYPE_CHECKING:
    from demandport.inference.backend import Operation
    from demandport.llama.model import Model

_PROGRESS_STEPS = 20
#: Generations in one decode.
SEQUENCES = 16


class _LogToChannel(logging.Handler):
    """Log records as messages to the service."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(logging.WARNING)
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        self._channel.send(["log", record.levelname.lower(), f"{record.name}: {record.getMessage()}"])


class Runner(Protocol):
    """What works through requests, one step after the other: the `Scheduler` or the `Embedder`."""

    @property
    def busy(self) -> bool: ...
    def cancel(self, request_id: int) -> None: ...
    def settle_cancel(self, request_id: int) -> None: ...
    def step(self) -> bool: ...


class Worker:
    """Carries messages between the channel and what runs the one model it loads."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._runner: Runner | None = None
        #: How each kind of request is handed to the runner.
        self._submit: Mapping[str, Callable[[int, dict[str, Any]], None]] = {}
        channel.on_message = self._urgent

    def run(self) -> None:
        """Work until the process is ended; messages first, then one step of the model."""
        busy = False
        while True:
            message = self._channel.receive(block=not busy)
            if message is not None:
                self._handle(message)
                busy = self._runner is not None and self._runner.busy
            elif self._runner is not None:
                busy = self._runner.step()

    def _urgent(self, message: Message) -> None:
        """On the reader thread: a cancel takes effect at the next token, whatever stands before it in the
        queue."""
        runner = self._runner
        if message[0] == "cancel" and runner is not None:
            runner.cancel(message[1])

    def _handle(self, message: Message) -> None:
        kind, request_id = message[0], message[1]
        if kind == "cancel":
            if self._runner is not None:
                self._runner.settle_cancel(request_id)
            return
        if kind == "ping":  # answered between two steps: that shows that they end
            self._channel.send(["pong", request_id])
            return
        try:
            if kind == "load":
                self._channel.send(["ok", request_id, self._load(request_id, message[2])])
            elif kind in self._submit:
                self._submit[kind](request_id, message[2])
            else:
                raise Internal(f"a model that was loaded to {' or '.join(self._submit) or 'nothing'} cannot {kind}")
        except DemandportError as failed:
            self._channel.send(["error", request_id, failed.to_wire()])
        except Exception as failed:
            wrapped = Internal(f"{type(failed).__name__}: {failed}")
            wrapped.traceback = traceback.format_exc()
            self._channel.send(["error", request_id, wrapped.to_wire()])

    def _load(self, request_id: int, spec: dict[str, Any]) -> dict[str, Any]:
        purpose: Operation = spec.get("purpose") or "generate"
        if self._runner is not None:
            raise Internal("this worker has a model already")
        if purpose not in ("generate", "embed", "rerank"):
            raise Internal(f"a model is loaded to generate, embed or rerank, not to {purpose}")
        try:
            from demandport.llama.model import Model
        except ImportError as failed:
            raise BackendUnavailable(
                f"llama-cpp-python cannot be had: pip install llama-cpp-python ({failed})"
            ) from None
        model = Model(
            Path(spec["path"]),
            context_length=spec.get("context_length"),
            gpu_layers=spec.get("gpu_layers") or 0,
            threads=spec.get("threads"),
            sequences=SEQUENCES,
            purpose=purpose,
            progress=self._reporter(request_id, spec["size_bytes"]),
        )
        try:
            self._start(model, purpose)
        except BaseException:
            model.close()
            raise
        # A collection would walk all that was imported, and drive the weights out of the caches.
        gc.freeze()
        return model.info()

    def _reporter(self, request_id: int, total: int) -> Callable[[float], None]:
        reported = -1

        def progress(share: float) -> None:
            nonlocal reported
            step = int(share * _PROGRESS_STEPS)
            if step > reported:
                reported = step
                facts = {"done": int(share * total), "total": total, "unit": "load_bytes"}
                self._channel.send(["progress", request_id, facts])

        return progress

    def _start(self, model: Model, purpose: str) -> None:
        from demandport.inference.requests import EmbedRequest, GenerateRequest, RerankRequest

        if purpose == "generate":
            from demandport.llama.scheduler import Scheduler

            scheduler = self._runner = Scheduler(model, self._channel.send)
            self._submit = {
                "generate": lambda id, body: scheduler.submit(id, GenerateRequest.from_options(body)),
                "save": lambda id, body: scheduler.submit(
                    id,
                    GenerateRequest.from_options({"prompt": "", "raw": True, "max_tokens": 1} | body["request"]),
                    save=Path(body["path"]),
                ),
            }
            return
        from demandport.llama.embedder import Embedder

        embedder = self._runner = Embedder(model, self._channel.send)
        kinds: dict[str, type[EmbedRequest] | type[RerankRequest]] = {"embed": EmbedRequest, "rerank": RerankRequest}
        self._submit = {purpose: lambda id, body: embedder.submit(id, kinds[purpose].from_options(body))}


def main() -> None:
    """Run the worker; never returns."""
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # an abort would start a debugger where one is installed
    channel = Channel(int(sys.argv[1]))
    logging.basicConfig(level=logging.WARNING, handlers=[_LogToChannel(channel)], force=True)
    channel.send(["ready", {"os_pid": os.getpid()}])
    Worker(channel).run()


if __name__ == "__main__":
    main()
