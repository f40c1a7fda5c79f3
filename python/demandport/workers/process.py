"""The service's side of a worker process: start it, speak frames with it, end it for certain.

Each worker leads a process group of its own, so that one signal reaches whatever it has started, and
inherits no descriptor of the protocol, so that no grandchild keeps the host waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from demandport.errors import DemandportError, Internal
from demandport.pipes import Reader, Writer
from demandport.wire.codec import MsgpackCodec
from demandport.wire.framing import MAX_FRAME_BYTES, FrameDecoder, frame

Message = list[Any]

#: How long a killed process may take until it is reaped; the kernel needs far less.
REAP_TIMEOUT_S = 5.0
_READ_BYTES = 1 << 18
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])

_live: set[WorkerProcess] = set()


class WorkerProcess:
    """One worker. Made by `spawn`; all methods except `kill` belong to the event loop's thread.

    Attributes:
        name: what messages call it.
        pid: its process id, which is also its group's.
        ready: it has said ``ready``.
        exit_reason: None while it runs, then e.g. ``killed by SIGKILL`` or ``exited with status 1``.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        name: str,
        on_message: Callable[[Message], None],
        on_exit: Callable[[str], None],
        ready_timeout_s: float,
        max_frame_bytes: int,
    ) -> None:
        self.name = name
        self.ready = False
        self.exit_reason: str | None = None
        self._on_message, self._on_exit = on_message, on_exit
        self._loop = asyncio.get_running_loop()
        self._codec = MsgpackCodec()
        self._decoder = FrameDecoder(max_frame_bytes)
        self._fault: str | None = None
        self._reaped = False
        self._signalling = threading.Lock()
        self._gone = asyncio.Event()
        self._process, self._fd_out, fd_in = _start(command)
        self.pid = self._process.pid
        _live.add(self)
        self._writer = Writer(self._loop, fd_in, on_broken=lambda: None)
        self._reader = Reader(self._loop, self._fd_out, self._feed, on_end=lambda: None)
        self._reader.start()
        self._ready_timer = self._loop.call_later(
            ready_timeout_s, self._condemn, f"not ready within {ready_timeout_s:g} s"
        )
        threading.Thread(target=self._reap, name=f"reap-{name}", daemon=True).start()

    @classmethod
    def spawn(
        cls,
        module: str,
        args: Sequence[str] = (),
        *,
        name: str,
        on_message: Callable[[Message], None],
        on_exit: Callable[[str], None],
        ready_timeout_s: float = 60.0,
        max_frame_bytes: int = MAX_FRAME_BYTES,
    ) -> WorkerProcess:
        """Start ``python -m module PARENT_PID args…``; returns at once, the worker says ``ready`` later.

        Call it on the event loop's thread, which must be one that lives as long as the service: Linux kills
        the worker when the thread that started it ends.

        Args:
            on_message: gets each message of the worker, on the loop, in order.
            on_exit: called exactly once, on the loop, with the reason, after the worker's last message.
            ready_timeout_s: a worker that has not said ``ready`` by then is killed.
            max_frame_bytes: a worker that sends a longer frame is killed, as is one that sends no message.

        Raises:
            OSError: no process can be started.
        """
        command = [sys.executable, "-P", "-m", module, str(os.getpid()), *args]
        return cls(
            command,
            name=name,
            on_message=on_message,
            on_exit=on_exit,
            ready_timeout_s=ready_timeout_s,
            max_frame_bytes=max_frame_bytes,
        )

    @property
    def alive(self) -> bool:
        """It has not been found dead yet, and has not been condemned."""
        return self.exit_reason is None and self._fault is None

    @property
    def pending_bytes(self) -> int:
        """Bytes queued for the worker that the pipe has not taken yet."""
        return self._writer.pending_bytes

    def send(self, message: Message) -> None:
        """Queue `message`; never blocks. A worker that is gone gets nothing: `on_exit` tells.

        Raises:
            TypeMismatch: the message holds a value that cannot travel.
        """
        self._writer.write(frame(self._codec.encode(message)))

    def kill(self) -> None:
        """Kill the worker and all it has started, with SIGKILL. From any thread; harmless when it is gone."""
        self._signal(signal.SIGKILL)

    async def stop(self, grace_s: float = 1.0) -> None:
        """End the worker and return once it is reaped: end of input and SIGTERM, after `grace_s` SIGKILL.

        A cancelled caller leaves a worker that is killed.

        Raises:
            Internal: the process cannot be reaped even so.
        """
        self._writer.close()
        self._signal(signal.SIGTERM)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self._gone.wait()
        finally:
            self.kill()
        try:
            async with asyncio.timeout(REAP_TIMEOUT_S):
                await self._gone.wait()
        except TimeoutError:
            raise Internal(f"worker {self.name} (pid {self.pid}) does not end after SIGKILL") from None

    def _feed(self, data: bytes) -> None:
        if self._fault is not None:
            return
        try:
            for payload in self._decoder.feed(data):
                self._dispatch(self._codec.decode(payload))
        except DemandportError as failed:
            self._condemn(f"sent what is no message: {failed.message}")

    def _dispatch(self, message: Message) -> None:
        if message[0] == "ready" and not self.ready:
            self.ready = True
            self._ready_timer.cancel()
        self._on_message(message)

    def _condemn(self, fault: str) -> None:
        if self._fault is None and self.exit_reason is None:
            self._fault = fault
            self.kill()

    def _signal(self, number: int) -> None:
        # The lock keeps the id from being reaped, and so from being another process's, between look and signal.
        with self._signalling:
            if not self._reaped:
                _signal_group(self.pid, number)

    def _reap(self) -> None:
        """Wait for the end on a thread of its own; the rest of the group goes before the id is given free."""
        if hasattr(os, "waitid"):
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        else:  # pragma: no cover - no waitid on macOS before Python 3.13
            self._process.wait()
        with self._signalling:
            _signal_group(self.pid, signal.SIGKILL)
            status = self._process.wait()
            self._reaped = True
        _live.discard(self)
        # The loop may have ended before its workers: then nobody waits for the news.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._exited, _reason(status))

    def _exited(self, reason: str) -> None:
        self._drain()
        self._ready_timer.cancel()
        self._reader.close()
        self._writer.close()
        self.exit_reason = f"{self._fault} ({reason})" if self._fault else reason
        self._gone.set()
        self._on_exit(self.exit_reason)

    def _drain(self) -> None:
        """Hand over what the worker managed to write before its end; a grandchild's open end is not waited
        for."""
        with contextlib.suppress(OSError):
            while data := os.read(self._fd_out, _READ_BYTES):
                self._feed(data)


def kill_all() -> None:
    """Kill every worker with its group, and whatever else this process has started, at once. From any thread; the last
    thing before an exit."""
    for worker in list(_live):
        worker.kill()
    import psutil

    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()


def live_workers() -> list[WorkerProcess]:
    """The workers that are not reaped yet."""
    return list(_live)


def _start(command: Sequence[str]) -> tuple[subprocess.Popen[bytes], int, int]:
    """Start `command` with pipes as its stdin and stdout; returns it with our (read, write) ends."""
    child_in, our_out = os.pipe()
    our_in, child_out = os.pipe()
    # The worker finds this package wherever the service found it, and nothing that lies in the host's directory.
    inherited = os.environ.get("PYTHONPATH")
    path = f"{_PACKAGE_ROOT}{os.pathsep}{inherited}" if inherited else _PACKAGE_ROOT
    try:
        process = subprocess.Popen(
            command,
            stdin=child_in,
            stdout=child_out,
            close_fds=True,
            process_group=0,
            env={**os.environ, "PYTHONPATH": path},
        )
    except BaseException:
        os.close(our_in)
        os.close(our_out)
        raise
    finally:
        os.close(child_in)
        os.close(child_out)
    return process, our_in, our_out


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS answers EPERM for a zombie's group
        os.killpg(group, number)


def _reason(status: int) -> str:
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"
