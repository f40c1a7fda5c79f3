"""The service's side of a worker process: start it, speak frames with it, end it for certain.

A worker inherits no descriptor of the protocol, so that no grandchild keeps the host waiting.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from demandport.errors import DemandportError
from demandport.pipes import Writer
from demandport.wire.codec import MsgpackCodec
from demandport.wire.framing import MAX_FRAME_BYTES, FrameDecoder, frame
from demandport.workers.group import ChildProcess, live_children

Message = list[Any]

_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])


class WorkerProcess(ChildProcess):
    """One worker. Made by `spawn`; all methods except `kill` belong to the event loop's thread.

    Attributes:
        ready: it has said ``ready``.
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
        self.ready = False
        self._on_message = on_message
        self._codec = MsgpackCodec()
        self._decoder = FrameDecoder(max_frame_bytes)
        process, fd_out, fd_in = _start(command)
        super().__init__(process, fd_out, name=name, on_exit=on_exit)
        self._writer = Writer(self._loop, fd_in, on_broken=lambda: None)
        self._ready_timer = self._loop.call_later(
            ready_timeout_s, self.condemn, f"not ready within {ready_timeout_s:g} s"
        )

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
    def pending_bytes(self) -> int:
        """Bytes queued for the worker that the pipe has not taken yet."""
        return self._writer.pending_bytes

    def send(self, message: Message) -> None:
        """Queue `message`; never blocks. A worker that is gone gets nothing: `on_exit` tells.

        Raises:
            TypeMismatch: the message holds a value that cannot travel.
        """
        self.send_frame(frame(self._codec.encode(message)))

    def send_frame(self, data: bytes) -> None:
        """`send` for a message that is a frame already."""
        self._writer.write(data)

    async def stop(self, grace_s: float = 1.0) -> None:
        """End the worker as `ChildProcess.stop` does, beginning with the end of its input."""
        self._writer.close()
        await super().stop(grace_s)

    def _feed(self, data: bytes) -> None:
        if self._fault is not None:
            return
        try:
            for payload in self._decoder.feed(data):
                self._dispatch(self._codec.decode(payload))
        except DemandportError as failed:
            self.condemn(f"sent what is no message: {failed.message}")

    def _dispatch(self, message: Message) -> None:
        if message[0] == "ready" and not self.ready:
            self.ready = True
            self._ready_timer.cancel()
        self._on_message(message)

    def _ended(self) -> None:
        self._ready_timer.cancel()
        self._writer.close()


def kill_all() -> None:
    """Kill every child with its group, and whatever else this process has started, at once. From any thread; the last
    thing before an exit."""
    for child in live_children():
        child.kill()
    import psutil

    for left in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            left.kill()


def live_workers() -> list[ChildProcess]:
    """The workers, and the programs that serve as such, that are not reaped yet."""
    return live_children()


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
