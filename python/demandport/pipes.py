"""File descriptors: who owns them, how bytes are read in batches, and how they are written without ever waiting.

Nothing here knows what the bytes mean. O_NONBLOCK belongs to the open file and not to the descriptor, so it is set only
on pipes that the peer gave to this process alone; fd 2 is never touched.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import select
import stat
import threading
import time
from asyncio import AbstractEventLoop
from collections.abc import Callable, Iterator

# What a pipe holds by default.
READ_BYTES = 1 << 16
# One write call takes at most this much: a pipe holds 64 KiB to 1 MiB, and joining more only copies it in vain.
WRITE_BYTES = 1 << 18


class NotAPipe(Exception):
    """A descriptor that should carry frames is a file, a terminal, a socket or a device."""


def protect_stdio() -> tuple[int, int]:
    """Take fds 0 and 1 away from everything else in this process and give them back as private descriptors.

    Afterwards fd 1 is what fd 2 is and fd 0 is /dev/null, so a print from Python, from C or from a child can only reach
    stderr. Must be the first thing a process does.

    Returns:
        (input fd, output fd), close-on-exec.
    """
    private_in = fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, 10)
    private_out = fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, 10)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return private_in, private_out


def claim(fd_in: int, fd_out: int) -> tuple[int, int]:
    """Protect stdio and return the private (input, output) descriptors that carry frames.

    Args:
        fd_in, fd_out: 0 and 1, or the two that ``--fd`` named (3 and 4 for Erlang's ``nouse_stdio``).

    Raises:
        NotAPipe: one of them is no pipe.
    """
    for fd, role in ((fd_in, "input"), (fd_out, "output")):
        _require_pipe(fd, role)
    stdin, stdout = protect_stdio()
    if (fd_in, fd_out) == (0, 1):
        fd_in, fd_out = stdin, stdout
    else:
        os.close(stdin)
        os.close(stdout)
        os.set_inheritable(fd_in, False)
        os.set_inheritable(fd_out, False)
    # A node may fork: its child must not keep the host from seeing the end of this process.
    os.register_at_fork(after_in_child=functools.partial(_close, fd_in, fd_out))
    return fd_in, fd_out


def _close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)


def _require_pipe(fd: int, role: str) -> None:
    try:
        mode = os.fstat(fd).st_mode
    except OSError:
        raise NotAPipe(f"fd {fd} ({role}) is not open") from None
    if not stat.S_ISFIFO(mode):
        raise NotAPipe(f"fd {fd} ({role}) is not a pipe; open this program as an Erlang port or with pipes")


def watch_end(fd: int, on_end: Callable[[], None]) -> None:
    """Call `on_end` on a thread of its own once every writer of the pipe `fd` is gone.

    It needs no event loop, so it works while the loop is held up and while unread bytes stand in the pipe.
    """

    def wait() -> None:
        poller = select.poll()
        poller.register(fd, 0)  # POLLHUP and POLLERR are always reported
        while not any(event & (select.POLLHUP | select.POLLERR) for _, event in poller.poll()):
            pass
        on_end()

    threading.Thread(target=wait, name="watch-end", daemon=True).start()


def drain(fd: int, quiet_s: float, limit_s: float) -> None:
    """Read and drop what comes on `fd` until its end, or nothing has come for `quiet_s`, or for `limit_s`; blocks."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    end = time.monotonic() + limit_s
    while time.monotonic() < end and poller.poll(quiet_s * 1000):
        try:
            if not os.read(fd, READ_BYTES):
                return
        except OSError:
            return


def _ready(fd: int, event: int, timeout_s: float) -> bool:
    poller = select.poll()
    poller.register(fd, event)
    return bool(poller.poll(timeout_s * 1000))


class _Lent:
    """Work of the loop's thread that another may borrow, but not in the middle of it.

    The loop only sets `_inside` around its work and looks at `_borrowed`: it does so for every batch, and a lock would
    cost it ten times as much. Each side says first what it is about to do and then looks at the other. The lock of the
    interpreter orders these steps, so that never both go on.
    """

    def __init__(self) -> None:
        self._inside = False
        self._borrowed = False
        self._borrowing = threading.Lock()

    def _enter(self) -> None:
        """On the loop, which is inside: wait until nobody has borrowed the work."""
        while self._borrowed:
            self._inside = False
            with self._borrowing:
                pass
            self._inside = True

    @contextlib.contextmanager
    def _borrow(self) -> Iterator[bool]:
        """On another thread: have the work to itself, if it gets True; the loop waits at its next batch."""
        with self._borrowing:
            self._borrowed = True
            try:
                yield not self._inside
            finally:
                self._borrowed = False


class Reader(_Lent):
    """Hands over what a pipe holds, as much as there is at each wake-up of the loop.

    Args:
        on_data: gets each batch of bytes; called on the loop. No other thread can `take` before it returns.
        on_end: called once, at end of input or when the pipe breaks.
        then: called on the loop after each `on_data`, when other threads may take again.
    """

    def __init__(
        self,
        loop: AbstractEventLoop,
        fd: int,
        on_data: Callable[[bytes], None],
        on_end: Callable[[], None],
        then: Callable[[], None] | None = None,
    ) -> None:
        super().__init__()
        self._loop, self._fd, self._on_data, self._on_end, self._then = loop, fd, on_data, on_end, then
        os.set_blocking(fd, False)
        # Read into one buffer: a new one for each read may cost the allocator a system call or more.
        self._buffer = memoryview(bytearray(READ_BYTES))
        self._reading = False
        self._closed = False

    def start(self) -> None:
        """Begin, or go on after `pause`."""
        if not self._reading and not self._closed:
            self._reading = True
            self._loop.add_reader(self._fd, self._readable)

    def pause(self) -> None:
        """Leave what comes in the pipe until `start`."""
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._fd)

    def close(self) -> None:
        """Stop for good and close the descriptor."""
        self.pause()
        if not self._closed:
            self._closed = True
            os.close(self._fd)

    def wait(self, timeout_s: float) -> bool:
        """Block until there is something to read, or the end of input; from any thread. False when the time is over."""
        return _ready(self._fd, select.POLLIN, timeout_s)

    def take(self, on_data: Callable[[bytes], None]) -> bool | None:
        """Read once and hand it to `on_data`, for a loop that cannot; from another thread, never waits.

        What is read here and what the loop reads come in the order of the pipe, since each is handed over before the
        next is read. A loop that comes back meanwhile waits for `on_data`.

        Returns:
            True when something came; None when there was nothing, or the loop is at it itself; False when nothing will
            come any more, which the loop finds out for itself.
        """
        with self._borrow() as mine:
            if not mine:
                return None
            data = b"" if self._closed else self._read()
            if data:
                on_data(data)
        return None if data is None else bool(data)

    def _readable(self) -> None:
        self._inside = True
        try:
            if self._borrowed:
                self._enter()
            data = self._read()
            if data:
                self._on_data(data)
        finally:
            self._inside = False
        if data:
            if self._then is not None:
                self._then()
        elif data is not None:
            self.pause()
            self._on_end()

    def _read(self) -> bytes | None:
        """What is there; None for nothing yet, no bytes at the end."""
        try:
            return bytes(self._buffer[: os.readv(self._fd, (self._buffer,))])
        except (BlockingIOError, InterruptedError):
            return None
        except OSError:
            return b""


class Writer(_Lent):
    """Writes what is queued in the order given, in one call per wake-up of the loop; `write` never waits.

    The queue itself is not bounded here: who writes looks at `pending_bytes` and slows its producers down.

    All but `push` and `wait` belongs to the loop's thread.

    Args:
        on_broken: called once when the other side has closed the pipe; what is queued is dropped.
        refill: asked for more frames when the pipe takes more than is queued; returns none when there are none. May be
            set later, as the attribute of that name.
    """

    def __init__(
        self,
        loop: AbstractEventLoop,
        fd: int,
        on_broken: Callable[[], None],
        refill: Callable[[], list[bytes]] | None = None,
    ) -> None:
        super().__init__()
        self._loop, self._fd, self._on_broken, self.refill = loop, fd, on_broken, refill
        os.set_blocking(fd, False)
        self._queue: list[bytes] = []
        self._rest = memoryview(b"")
        self._scheduled = False
        self._waiting = False
        self._corked = False
        self._closed = False
        #: What `push` queued less what it wrote, and how much of that `pending_bytes` knows: each is set by one thread.
        self._pushed_bytes = self._known_bytes = 0
        self.pending_bytes = 0

    def write(self, data: bytes) -> None:
        """Queue `data`; it leaves at the end of this turn of the loop."""
        if self._closed:
            return
        self._queue.append(data)
        self.pending_bytes += len(data)
        self.wake()

    def wake(self) -> None:
        """Have the pipe written to at the end of this turn of the loop, e.g. since `refill` has something now."""
        if not self._scheduled and not self._waiting and not self._closed:
            self._scheduled = True
            if not self._corked:
                self._loop.call_soon(self._flush)

    def take_over(self) -> None:
        """Go on where another thread has stopped to `push`."""
        pushed = self._pushed_bytes
        self.pending_bytes += pushed - self._known_bytes
        self._known_bytes = pushed
        self.wake()

    def cork(self) -> None:
        """Hold back until `uncork`: who is about to write many times saves the loop a turn."""
        self._corked = True

    def uncork(self) -> None:
        """Write what was held back, now."""
        self._corked = False
        if self._scheduled:
            self._flush()

    def wait(self, timeout_s: float) -> bool:
        """Block until the pipe takes something, or is broken; from any thread. False when the time is over."""
        return _ready(self._fd, select.POLLOUT, timeout_s)

    def push(self, data: bytes = b"") -> bool:
        """Queue `data` and write all that is queued, for a loop that cannot; from any thread, never waits.

        Nothing is refilled. What the pipe does not take stays, in order, for the next `push`, or for the loop, which
        must be told to `take_over`.

        Returns:
            False when something is left: the pipe is full, or the loop is at it itself.

        Raises:
            OSError: the pipe is closed, on this side or the other; the loop finds out for itself.
        """
        if data:
            self._queue.append(data)
            self._pushed_bytes += len(data)
        with self._borrow() as mine:
            return mine and self._push()

    def _push(self) -> bool:
        if self._closed:
            raise BrokenPipeError("the pipe is closed")
        while self._next_batch(None):
            try:
                written = os.write(self._fd, self._rest)
            except (BlockingIOError, InterruptedError):
                return False
            self._pushed_bytes -= written
            self._rest = self._rest[written:]
        return True

    def close(self) -> None:
        """Drop what is queued and close the descriptor."""
        self._inside = True
        self._enter()
        self._close()
        self._inside = False

    def flush_blocking(self, timeout_s: float) -> None:
        """Write what is queued before the process ends, waiting at most `timeout_s` for a slow reader."""
        poller = select.poll()
        poller.register(self._fd, select.POLLOUT)
        self._inside = True
        self._enter()
        while not self._closed and self._next_batch(self.refill) and poller.poll(timeout_s * 1000):
            if not self._write_some():
                break
        self._inside = False

    def _close(self) -> None:
        if not self._closed:
            self._closed = True
            self._stop_waiting()
            self._queue.clear()
            self._rest = memoryview(b"")
            self.pending_bytes = 0
            os.close(self._fd)

    def _flush(self) -> None:
        self._scheduled = False
        self._inside = True
        try:
            if self._borrowed:
                self._enter()
            while not self._closed and self._next_batch(self.refill):
                if not self._write_some():
                    return
        finally:
            self._inside = False
        if self._waiting:
            self._stop_waiting()

    def _next_batch(self, refill: Callable[[], list[bytes]] | None) -> bool:
        """Have `_rest` hold something to write, if there is anything."""
        if self._rest:
            return True
        if not self._queue and refill is not None:
            for data in refill():
                self._queue.append(data)
                self.pending_bytes += len(data)
        if not self._queue:
            return False
        taken, size = 0, 0
        for data in self._queue:
            taken, size = taken + 1, size + len(data)
            if size >= WRITE_BYTES:
                break
        batch = self._queue[0] if taken == 1 else b"".join(self._queue[:taken])
        del self._queue[:taken]
        self._rest = memoryview(batch)
        return True

    def _write_some(self) -> bool:
        """One write call. False when the pipe is full (then the loop wakes us) or broken."""
        try:
            written = os.write(self._fd, self._rest)
        except (BlockingIOError, InterruptedError):
            written = 0
        except OSError:
            self._close()
            self._on_broken()
            return False
        self.pending_bytes -= written
        self._rest = self._rest[written:]
        if self._rest:
            self._start_waiting()
            return False
        return True

    def _start_waiting(self) -> None:
        if not self._waiting:
            self._waiting = True
            self._loop.add_writer(self._fd, self._flush)

    def _stop_waiting(self) -> None:
        if self._waiting:
            self._waiting = False
            self._loop.remove_writer(self._fd)
