"""Runs a program for what it writes: its stdout in pieces, as fast as they are taken, and the ends of its stderr."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from demandport.errors import NodeFailed, TooLarge
from demandport.pipes import Reader, Writer
from demandport.workers.group import ChildProcess, read_rest
from demandport.workers.spawner import becoming

#: Of a longer stderr the beginning and the end are kept, this much of each.
STDERR_BYTES = 32 << 10


class Command(ChildProcess):
    """A program that leads a process group of its own, made by `start`. Belongs to the event loop's thread.

    Its stdout waits in the pipe until `read` asks for it; at most one piece is held here. When it ends, what is left of
    its group is killed; a descendant that has left the group and keeps the pipes open is not waited for.
    """

    def __init__(self, process: subprocess.Popen[bytes], report: int, *, name: str, stdin: bytes | None) -> None:
        os.set_blocking(report, False)
        self._report = report
        self._not_run = ""
        self._stdout: list[bytes] = []
        self._fresh = asyncio.Event()
        self._stderr = Ends(STDERR_BYTES)
        super().__init__(process, _taken(process.stdout), name=name, on_exit=lambda reason: None)
        self._fd_err = _taken(process.stderr)
        self._errors = Reader(self._loop, self._fd_err, self._stderr.add, on_end=lambda: None)
        self._errors.start()
        self._input: Writer | None = None
        if stdin is not None:
            # A program need not read its input to the end: that the pipe breaks is no failure.
            self._input = Writer(self._loop, _taken(process.stdin), on_broken=lambda: None, refill=self._close_input)
            self._input.write(stdin)

    @classmethod
    def start(
        cls,
        command: Sequence[str],
        *,
        name: str,
        environment: Mapping[str, str],
        stdin: bytes | None = None,
        directory: Path | None = None,
    ) -> Command:
        """Start a program; returns at once. Call it on a thread that lives as long as the service: Linux kills the
        program when the thread that started it ends.

        Args:
            command: the program's absolute path, and its arguments.
            name: what messages call it.
            environment: all of its variables.
            stdin: what it reads; None: nothing.
            directory: where it runs; None: where the service does.

        Raises:
            TooLarge: its arguments are longer than the system takes.
            NodeFailed: no process can be started.
        """
        report, its_report = os.pipe()
        try:
            process = subprocess.Popen(
                [*becoming(its_report), *command],
                stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                pass_fds=(its_report,),
                process_group=0,
                cwd=directory,
                env=environment,
            )
        except (OSError, ValueError) as failed:  # ValueError: text that the system cannot take
            os.close(report)
            raise _not_started(name, failed) from None
        finally:
            os.close(its_report)
        return cls(process, report, name=name, stdin=stdin)

    async def read(self) -> bytes:
        """The next piece of its stdout; ``b""`` once it has ended and all was read. A cancelled caller loses nothing.

        Raises:
            NodeFailed: it is there, but the system cannot run it.
        """
        while not self._stdout:
            if self._gone.is_set():
                if self._not_run:
                    raise NodeFailed(self._not_run)
                return b""
            self._fresh.clear()
            self._reader.start()
            await self._fresh.wait()
        data = b"".join(self._stdout)
        self._stdout.clear()
        return data

    @property
    def status(self) -> int:
        """Its exit status once it has ended, as a shell and an Erlang port say it: 128 + n when signal n ended it."""
        status: int = self._process.returncode
        return status if status >= 0 else 128 - status

    @property
    def stderr(self) -> str:
        """What it has written to stderr so far: of much the two ends, and between them how much was left out."""
        return self._stderr.text()

    def _feed(self, data: bytes) -> None:
        self._stdout.append(data)
        self._reader.pause()
        self._fresh.set()

    def _ended(self) -> None:
        read_rest(self._fd_err, self._stderr.add)
        self._errors.close()
        self._close_input()
        read_rest(self._report, self._heard)
        os.close(self._report)
        self._fresh.set()

    def _heard(self, report: bytes) -> None:
        self._not_run += report.decode("utf-8", "replace").strip().removeprefix("error: ")

    def _close_input(self) -> list[bytes]:
        """All of it is written, or nobody reads it any more."""
        if self._input is not None:
            self._input.close()
        return []


class Ends:
    """The first and the last bytes of what may be much more.

    Args:
        limit_bytes: of each.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._head = bytearray()
        self._tail: deque[bytes] = deque()
        self._tail_bytes = 0
        self._left_out = 0

    def add(self, data: bytes) -> None:
        """More of it."""
        room = self._limit - len(self._head)
        self._head += data[:room]
        if rest := data[room:]:
            self._tail.append(rest)
            self._tail_bytes += len(rest)
        while self._tail and self._tail_bytes - len(self._tail[0]) >= self._limit:
            dropped = len(self._tail.popleft())
            self._tail_bytes -= dropped
            self._left_out += dropped

    def text(self) -> str:
        """Both, as text; what is no UTF-8 is replaced."""
        tail = b"".join(self._tail)
        over = max(0, len(tail) - self._limit)
        if not over and not self._left_out:
            return (self._head + tail).decode("utf-8", "replace")
        head, tail = self._head.decode("utf-8", "replace"), tail[over:]
        return f"{head}\n… {self._left_out + over} bytes left out …\n{tail.decode('utf-8', 'replace')}"


def _taken(file: IO[bytes] | None) -> int:
    """The descriptor of one of `Popen`'s pipes, as our own to close."""
    assert file is not None
    with file:
        return os.dup(file.fileno())


def _not_started(name: str, failed: Exception) -> TooLarge | NodeFailed:
    if isinstance(failed, OSError) and failed.errno == errno.E2BIG:
        return TooLarge(f"the arguments of {name} are longer than the system takes; give it the long ones as stdin")
    why = failed.strerror if isinstance(failed, OSError) else failed
    return NodeFailed(f"{name} cannot be started: {why}")
