"""Starts foreign programs so that they cannot outlive the service, and tells what they say and when they end."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from demandport.workers import exec as shim
from demandport.workers.group import ChildProcess

#: A longer line of output is cut there.
MAX_LINE_BYTES = 8 << 10


class Program(Protocol):
    """A program that was started."""

    @property
    def pid(self) -> int:
        """Its process id."""
        ...

    @property
    def alive(self) -> bool:
        """It has not been found dead yet."""
        ...

    def kill(self) -> None:
        """Kill it and all it has started, at once; harmless when it is gone."""
        ...

    async def stop(self, grace_s: float = 1.0) -> None:
        """Ask it to end, kill it after `grace_s`, and return once it is reaped."""
        ...

    async def wait(self) -> None:
        """Return once it has ended."""
        ...


class Spawner(Protocol):
    """A way to start programs."""

    def spawn(
        self,
        command: Sequence[str],
        *,
        name: str,
        on_line: Callable[[str], None],
        on_exit: Callable[[str], None],
        environment: Mapping[str, str] | None = None,
    ) -> Program:
        """Start a program; returns at once. Belongs to the event loop's thread, which must live as long as the
        service: Linux kills the program when the thread that started it ends.

        Args:
            command: the program, found on the search path, and its arguments.
            name: what messages call it.
            on_line: gets each line that it writes, without its end; called on the loop.
            on_exit: called exactly once, on the loop, with the reason (``killed by SIGKILL``, ``exited with status
                1``), after its last line.
            environment: variables to set besides those of the service.

        Raises:
            OSError: there is no such program, or no process can be started.
        """
        ...


class LocalSpawner:
    """Starts programs on this machine: each leads a process group, inherits no descriptor, reads nothing, writes its
    stdout and stderr into one pipe, and is killed by the kernel when the service dies. That last holds on Linux;
    elsewhere a service that is itself killed leaves it behind."""

    def spawn(
        self,
        command: Sequence[str],
        *,
        name: str,
        on_line: Callable[[str], None],
        on_exit: Callable[[str], None],
        environment: Mapping[str, str] | None = None,
    ) -> Program:
        """See `Spawner.spawn`."""
        program = shutil.which(command[0])
        if program is None:
            raise FileNotFoundError(f"there is no program {command[0]}")
        our_end, its_end = os.pipe()
        try:
            process = subprocess.Popen(
                [*becoming(), os.path.abspath(program), *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=its_end,
                stderr=its_end,
                close_fds=True,
                process_group=0,
                env={**os.environ, **(environment or {})},
            )
        except BaseException:
            os.close(our_end)
            raise
        finally:
            os.close(its_end)
        return _LocalProgram(process, our_end, name=name, on_line=on_line, on_exit=on_exit)


def becoming(fd_report: int = 2) -> list[str]:
    """What stands before a program's absolute path and arguments in a command, so that it cannot outlive the service.

    Args:
        fd_report: the descriptor that hears why a program cannot be run; the program itself does not inherit it,
            unless it is stderr.
    """
    # By its path and without the site's packages, the shim is up in a third of the time.
    return [sys.executable, "-I", "-S", str(Path(shim.__file__).resolve()), str(os.getpid()), str(fd_report), "--"]


class _LocalProgram(ChildProcess):
    def __init__(
        self,
        process: subprocess.Popen[bytes],
        fd_out: int,
        *,
        name: str,
        on_line: Callable[[str], None],
        on_exit: Callable[[str], None],
    ) -> None:
        self._on_line = on_line
        self._line = b""
        super().__init__(process, fd_out, name=name, on_exit=on_exit)

    def _feed(self, data: bytes) -> None:
        first, *others = data.split(b"\n")
        self._line = (self._line + first)[:MAX_LINE_BYTES]
        for start in others:
            self._tell()
            self._line = start[:MAX_LINE_BYTES]

    def _ended(self) -> None:
        if self._line:
            self._tell()

    def _tell(self) -> None:
        self._on_line(self._line.decode("utf-8", "replace").rstrip("\r"))
