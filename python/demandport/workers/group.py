"""A child process and all it starts: one process group, whose output is read and whose end is never missed.

Each child leads a group of its own, so that one signal reaches whatever it has started.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable

from demandport.errors import Internal
from demandport.pipes import Reader

#: How long a killed process may take until it is reaped; the kernel needs far less.
REAP_TIMEOUT_S = 5.0
_READ_BYTES = 1 << 18
#: No pipe holds more (Linux, by default).
_MOST_IN_PIPE = 1 << 20

_live: set[ChildProcess] = set()


class ChildProcess:
    """A process that leads a group. All methods except `kill` belong to the event loop's thread.

    Who derives from it takes the output in `_feed` and lets go of what it holds in `_ended`.

    Args:
        process: the child, started with `process_group=0`.
        fd_out: our end of the pipe that it writes to.
        name: what messages call it.
        on_exit: called exactly once, on the loop, with the reason, after the last of its output.

    Attributes:
        name: as given.
        pid: its process id, which is also its group's.
        exit_reason: None while it runs, then e.g. ``killed by SIGKILL`` or ``exited with status 1``.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], fd_out: int, *, name: str, on_exit: Callable[[str], None]
    ) -> None:
        self.name = name
        self.pid = process.pid
        self.exit_reason: str | None = None
        self._process, self._fd_out, self._on_exit = process, fd_out, on_exit
        self._loop = asyncio.get_running_loop()
        self._fault: str | None = None
        self._reaped = False
        self._signalling = threading.Lock()
        self._gone = asyncio.Event()
        _live.add(self)
        self._reader = Reader(self._loop, fd_out, self._feed, on_end=lambda: None)
        self._reader.start()
        threading.Thread(target=self._reap, name=f"reap-{name}", daemon=True).start()

    @property
    def alive(self) -> bool:
        """It has not been found dead yet, and has not been condemned."""
        return self.exit_reason is None and self._fault is None

    def kill(self) -> None:
        """Kill it and all it has started, with SIGKILL. From any thread; harmless when it is gone."""
        self._signal(signal.SIGKILL)

    def interrupt(self) -> None:
        """Send SIGINT to it and all it has started, as Ctrl-C does. From any thread; harmless when it is gone."""
        self._signal(signal.SIGINT)

    async def stop(self, grace_s: float = 1.0) -> None:
        """End it and return once it is reaped: SIGTERM, after `grace_s` SIGKILL.

        A cancelled caller leaves a process that is killed.

        Raises:
            Internal: the process cannot be reaped even so.
        """
        self._signal(signal.SIGTERM)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self.wait()
        finally:
            self.kill()
        try:
            async with asyncio.timeout(REAP_TIMEOUT_S):
                await self.wait()
        except TimeoutError:
            raise Internal(f"{self.name} (pid {self.pid}) does not end after SIGKILL") from None

    async def wait(self) -> None:
        """Return once it is reaped and its output read."""
        await self._gone.wait()

    def _feed(self, data: bytes) -> None:
        """Take some of its output."""
        raise NotImplementedError

    def _ended(self) -> None:
        """It is reaped, and this was all of its output."""

    def condemn(self, fault: str) -> None:
        """Kill it for a fault of its own, which `exit_reason` then names; harmless when it is gone."""
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
        # The loop may have ended before its children: then nobody waits for the news.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._exited, _reason(status))

    def _exited(self, reason: str) -> None:
        read_rest(self._fd_out, self._feed)
        self._reader.close()
        self._ended()
        self.exit_reason = f"{self._fault} ({reason})" if self._fault else reason
        self._gone.set()
        self._on_exit(self.exit_reason)


def read_rest(fd: int, feed: Callable[[bytes], None]) -> None:
    """Hand over what stands in the non-blocking pipe `fd` after its writer's end. What else has the pipe open, a
    descendant that left the group, is not waited for, however much it goes on to write."""
    left = _MOST_IN_PIPE
    with contextlib.suppress(OSError):
        while left > 0 and (data := os.read(fd, _READ_BYTES)):
            left -= len(data)
            feed(data)


def live_children() -> list[ChildProcess]:
    """The children that are not reaped yet."""
    return list(_live)


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
