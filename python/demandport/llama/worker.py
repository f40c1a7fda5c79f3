"""The program of a model worker: ``python -m demandport.llama.worker PARENT_PID``.

In: ``["load", id, spec]``, ``["generate", id, request]``, ``["cancel", id]``.
Out: ``["ready", info]``, ``["ok", id, result]``, ``["error", id, error]``, ``["progress", id, {done, total,
unit}]``, ``["chunk", id, text]``, ``["done", id, {finish_reason, usage, seed}]``, ``["log", level, text]``.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demandport.errors import BackendUnavailable, DemandportError, Internal
from demandport.workers.child import Channel, Message

if TYPE_CHECKING:
    from demandport.llama.scheduler import Scheduler

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


class Worker:
    """Carries messages between the channel and the scheduler of the one model it loads."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._scheduler: Scheduler | None = None
        channel.on_message = self._urgent

    def run(self) -> None:
        """Work until the process is ended; messages first, then one step of the model."""
        busy = False
        while True:
            message = self._channel.receive(block=not busy)
            if message is not None:
                self._handle(message)
                busy = self._scheduler is not None and self._scheduler.busy
            elif self._scheduler is not None:
                busy = self._scheduler.step()

    def _urgent(self, message: Message) -> None:
        """On the reader thread: a cancel takes effect at the next token, whatever stands before it in the
        queue."""
        scheduler = self._scheduler
        if message[0] == "cancel" and scheduler is not None:
            scheduler.cancel(message[1])

    def _handle(self, message: Message) -> None:
        if message[0] == "load":
            self._answer(message[1], lambda: self._load(message[1], message[2]))
        elif message[0] == "generate":
            self._submit(message[1], message[2])
        elif message[0] == "cancel" and self._scheduler is not None:
            self._scheduler.settle_cancel(message[1])

    def _answer(self, request_id: int, work: Callable[[], dict[str, Any]]) -> None:
        try:
            self._channel.send(["ok", request_id, work()])
        except DemandportError as failed:
            self._channel.send(["error", request_id, failed.to_wire()])
        except Exception as failed:
            wrapped = Internal(f"{type(failed).__name__}: {failed}")
            wrapped.traceback = traceback.format_exc()
            self._channel.send(["error", request_id, wrapped.to_wire()])

    def _load(self, request_id: int, spec: dict[str, Any]) -> dict[str, Any]:
        if self._scheduler is not None:
            raise Internal("this worker has a model already")
        try:
            from demandport.llama.model import Model
            from demandport.llama.scheduler import Scheduler
        except ImportError as failed:
            raise BackendUnavailable(f"pip install demandport[llama] ({failed})") from None
        reported = -1

        def progress(share: float) -> None:
            nonlocal reported
            step = int(share * _PROGRESS_STEPS)
            if step > reported:
                reported = step
                facts = {"done": step, "total": _PROGRESS_STEPS, "unit": "load_steps"}
                self._channel.send(["progress", request_id, facts])

        model = Model(
            Path(spec["path"]),
            context_length=spec.get("context_length"),
            gpu_layers=spec.get("gpu_layers") or 0,
            threads=spec.get("threads"),
            sequences=SEQUENCES,
            progress=progress,
        )
        try:
            self._scheduler = Scheduler(model, self._channel.send)
        except BaseException:
            model.close()
            raise
        # A collection would walk all that was imported, and drive the weights out of the caches.
        gc.freeze()
        return model.info()

    def _submit(self, request_id: int, options: dict[str, Any]) -> None:
        from demandport.inference.requests import GenerateRequest

        try:
            if self._scheduler is None:
                raise Internal("no model is loaded")
            self._scheduler.submit(request_id, GenerateRequest.from_options(options))
        except DemandportError as failed:
            self._channel.send(["error", request_id, failed.to_wire()])


def main() -> None:
    """Run the worker; never returns."""
    channel = Channel(int(sys.argv[1]))
    logging.basicConfig(level=logging.WARNING, handlers=[_LogToChannel(channel)], force=True)
    channel.send(["ready", {"os_pid": os.getpid()}])
    Worker(channel).run()


if __name__ == "__main__":
    main()
