"""Becomes another program that cannot outlive the service: ``exec.py PARENT_PID REPORT_FD -- program arguments…``.

It runs for each start of such a program, and is imported as the service starts, so it imports next to nothing.
"""

from __future__ import annotations

import os
import signal
import sys

#: Exit status when the program cannot be run, as a shell's.
EXIT_NOT_RUN = 127
_PR_SET_PDEATHSIG = 1


def die_with(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent dies (Linux), and end now if the parent is gone already. It
    holds across exec."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(0)


def main(arguments: list[str]) -> None:
    """Become the program; does not return.

    Python ignores some signals, and what a process ignores the next program ignores too: each gets its default. Why the
    program cannot be run is written to the report's descriptor, which the program does not have unless it is stderr.
    """
    parent_pid, report, separator, *command = arguments
    assert separator == "--" and command
    fd_report = int(report)
    os.set_inheritable(fd_report, fd_report == 2)
    die_with(int(parent_pid))
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    try:
        os.execv(command[0], command)
    except OSError as failed:
        os.write(fd_report, f"error: {command[0]} cannot be run: {failed.strerror}\n".encode())
        os._exit(EXIT_NOT_RUN)


if __name__ == "__main__":
    main(sys.argv[1:])
