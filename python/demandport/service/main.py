"""The life of the service process: claim the pipes, build the house, run the loop, take everything down.

However it ends, it ends with `os._exit`: a node that blocks in a thread, or a library's exit handler, must not keep a
process alive whose host is gone.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import anyio

from demandport.engine.cpu import CpuNodes
from demandport.engine.executor import Executor
from demandport.engine.registry import load_specs
from demandport.errors import Internal
from demandport.inference.config import Config
from demandport.inference.gateway import Gateway
from demandport.nodes import BUILT_IN
from demandport.nodes.http import HttpConfig
from demandport.nodes.process import ProcessConfig, Processes
from demandport.pipes import Reader, Writer, drain, watch_end
from demandport.service.router import Service
from demandport.service.watchdog import Watchdog
from demandport.wire.codec import codec_named
from demandport.wire.connection import Connection
from demandport.wire.framing import MAX_FRAME_BYTES, frame
from demandport.wire.outbox import Outbox
from demandport.workers.limits import Limits
from demandport.workers.process import kill_all

log = logging.getLogger(__name__)

#: After the end of input, what is left to do (answering what was read, stopping workers) may take this long.
GRACE_S = 1.0
#: A host that was told goodbye while it still writes hears it only once its write is done: what it writes is read, and
#: dropped, until nothing has come for this long.
QUIET_S = 0.1
#: The thread that sees the end of input even while the loop is held up ends the process after this long.
HARD_END_S = 1.5


@dataclass(frozen=True, slots=True)
class Settings:
    """How the service is run.

    Attributes:
        codec: ``msgpack`` or ``etf``.
        max_frame_bytes: largest frame accepted.
        models: which models there are, and the memory they may take.
        files: directory that file nodes may use; None for none.
        log_level: least level that is sent to the host as `log` messages.
        process: which programs nodes may start; none by default.
        http: which hosts nodes may ask; none by default.
        cpu_workers: processes for nodes that compute; None for one per core.
        cpu_memory_bytes: memory that each of them may take; None for any.
    """

    codec: str = "msgpack"
    max_frame_bytes: int = MAX_FRAME_BYTES
    models: Config = field(default_factory=Config)
    files: str | None = None
    log_level: str = "INFO"
    process: ProcessConfig = field(default_factory=ProcessConfig)
    http: HttpConfig = field(default_factory=HttpConfig)
    cpu_workers: int | None = None
    cpu_memory_bytes: int | None = None


def serve(fd_in: int, fd_out: int, settings: Settings) -> None:
    """Serve the host on two pipes until it goes away; does not return."""
    watch_end(fd_in, _end_for_sure)
    status = 70
    try:
        status = anyio.run(_serve, fd_in, fd_out, settings)
    except BaseException as fatal:
        log.critical("the service ends on a bug", exc_info=fatal)
        _say_goodbye(fd_out, settings, fatal)
        print(f"demandport: internal error: {fatal!r}", file=sys.stderr, flush=True)
    finally:
        kill_all()
        os._exit(status)


def tune_gc() -> None:
    """Set the garbage collector for cells: they come by the thousand and live long, so that the default threshold makes
    collections half of the cost of evaluating them. What start-up made is taken out of its sight altogether."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


async def _serve(fd_in: int, fd_out: int, settings: Settings) -> int:
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[int] = loop.create_future()

    def end(status: int) -> None:
        if not ended.done():
            ended.set_result(status)

    codec = codec_named(settings.codec)
    specs = load_specs(BUILT_IN)
    gateway = Gateway(settings.models, on_log=_log_from_worker)
    resources: Mapping[str, Any] = {
        "gateway": gateway,
        "library": gateway.library,
        "files_root": settings.files,
        "process": Processes(settings.process),
        "http": settings.http,
    }
    cpu = CpuNodes(settings.cpu_workers, limits=Limits(memory_bytes=settings.cpu_memory_bytes))
    async with anyio.create_task_group() as tasks:
        outbox = Outbox(codec)
        writer = Writer(loop, fd_out, lambda: end(0))
        service = Service(
            Connection(codec, settings.max_frame_bytes),
            outbox,
            writer,
            Executor(tasks, resources, cpu=cpu),
            gateway,
            specs,
            tasks,
            {"max_frame_bytes": settings.max_frame_bytes},
            end,
            lambda pause: reader.pause() if pause else reader.start(),
        )
        writer.refill = service.refill
        reader = Reader(loop, fd_in, service.inbox.take, lambda: end(0), then=service.work)
        watchdog = Watchdog(loop, reader, writer, service, outbox, codec_named(settings.codec))
        _end_on_signals(loop, end)
        service.ready(codec.name)
        _log_to(service, loop, settings.log_level)
        tune_gc()
        reader.start()
        watchdog.start()
        status = await ended
        watchdog.stop()
        reader.pause()
        # Deliver first, then take down: nothing below can cost the host an answer.
        writer.flush_blocking(GRACE_S)
        if status:
            drain(fd_in, QUIET_S, GRACE_S)
        kill_all()
        os._exit(status)
    raise AssertionError("the task group ended before the service did")


def _end_on_signals(loop: asyncio.AbstractEventLoop, end: Callable[[int], None]) -> None:
    """End on SIGTERM and SIGINT; a plain handler, which also runs while a node holds up the loop."""

    def handle(number: int, frame: Any) -> None:
        threading.Thread(target=_end_for_sure, name="end-for-sure", daemon=True).start()
        loop.call_soon_threadsafe(end, 0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)


def _end_for_sure() -> None:
    """On the watching thread: the host is gone, so the process will be, whatever the loop is doing."""
    time.sleep(HARD_END_S)
    kill_all()
    os._exit(0)


def _say_goodbye(fd_out: int, settings: Settings, fatal: BaseException) -> None:
    try:
        os.set_blocking(fd_out, False)
        payload = codec_named(settings.codec).encode(
            ["goodbye", Internal(f"{type(fatal).__name__}: {fatal}").to_wire()]
        )
        os.write(fd_out, frame(payload))
    except (OSError, ValueError):
        pass  # the exit status says it too


_LEVELS = ((logging.ERROR, "error"), (logging.WARNING, "warning"), (logging.INFO, "info"), (0, "debug"))


class _WireLog(logging.Handler):
    """Sends log records to the host; from other threads by way of the loop."""

    def __init__(self, service: Service, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._service, self._loop, self._thread = service, loop, threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if threading.get_ident() == self._thread:
            self._send(record)
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._send, record)

    def _send(self, record: logging.LogRecord) -> None:
        try:
            self._send_record(record)
        except Exception:  # what cannot be formatted or cannot travel: it must not hurt whoever logs
            self.handleError(record)

    def _send_record(self, record: logging.LogRecord) -> None:
        level = next(name for least, name in _LEVELS if record.levelno >= least)  # a library may have its own
        metadata = {str(key): str(value) for key, value in getattr(record, "metadata", {}).items()}
        if record.exc_info:
            metadata["traceback"] = logging.Formatter().formatException(record.exc_info)
        if self._service.has_room():  # a log must not fill the memory of a service whose host does not read
            self._service.send(["log", level, record.name, record.getMessage(), metadata])


def _log_to(service: Service, loop: asyncio.AbstractEventLoop, level: str) -> None:
    root = logging.getLogger()
    root.handlers[:] = [_WireLog(service, loop)]
    root.setLevel(level)
    logging.getLogger("asyncio").setLevel(logging.WARNING)


def _log_from_worker(level: str, logger: str, text: str) -> None:
    number = logging.getLevelNamesMapping().get(level.upper(), logging.INFO)
    logging.getLogger(logger).log(number, text)
