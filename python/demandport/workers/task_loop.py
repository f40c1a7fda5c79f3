"""The child's side of a pool: takes tasks one at a time, in the main thread, and can be called off.

In: ``["setup", value]`` once, ``["run", id, payload]``, ``["cancel", id]``, ``["taken", id, n]``.
Out: ``["ready", info]``, ``["said", id, value]``, ``["done", id, result]``, ``["error", id, error]``, ``["log", level,
logger, text, metadata]``.

A task that is cancelled first only hears of it. SIGINT then raises `Interrupted` in it, wherever it is; but never
between tasks, and never while a frame is written.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from demandport.errors import Cancelled, DemandportError, Internal, TooLarge, TypeMismatch
from demandport.workers.child import Channel, Message

#: So much that a task has said may wait to be taken by the service: this many values, or this many bytes.
WINDOW, WINDOW_BYTES = 16, 1 << 20


class Interrupted(KeyboardInterrupt):
    """The task was asked to stop, went on, and is now ended from outside."""


class Job:
    """The task that runs now, as what performs it sees it."""

    def __init__(self, loop: TaskLoop, id: int) -> None:
        self._loop, self._id = loop, id

    @property
    def cancelled(self) -> bool:
        """Nobody waits for the task any more; it should return soon."""
        return self._loop.cancelled

    def say(self, value: Any) -> None:
        """Tell the service something on the way. From any thread; blocks while it has much that it has not taken.

        Raises:
            Cancelled: nobody waits for the task any more.
            TypeMismatch, TooLarge: the value cannot travel; nothing was sent.
        """
        self._loop.say(self._id, value)

    def shielded(self) -> contextlib.AbstractContextManager[None]:
        """For what must not be left half done: an interrupt waits until its end. What takes too long is killed."""
        return self._loop.shielded()


Perform = Callable[[Job, Any], Any]


class TaskLoop:
    """Performs the tasks that come over a channel. Belongs to the main thread, since signals do.

    Args:
        perform: does one task: gets it and its payload, returns a result that can travel, or raises.
        setup: gets the value that the pool gives each new worker, before the first task.
    """

    def __init__(self, channel: Channel, perform: Perform, setup: Callable[[Any], None]) -> None:
        self._channel, self._perform, self._setup = channel, perform, setup
        self.cancelled = False
        #: The task that was given last. Written by the reader thread: a cancel may come before the task begins.
        self._task = 0
        #: An interrupt may be raised now: the task's own code runs. It is raised once.
        self._exposed = False
        #: An interrupt came while it could not be raised.
        self._due = False
        #: Bytes of each value that was said and is not taken yet.
        self._untaken: deque[int] = deque()
        self._window = threading.Condition()
        channel.on_message = self._urgent

    def run(self) -> NoReturn:
        """Say ``ready`` and perform tasks until the process is ended."""
        self._listen_for_interrupts()
        logging.getLogger().handlers[:] = [_LogToService(self)]
        self._channel.send(["ready", {"os_pid": os.getpid()}])
        while True:
            message = self._channel.receive()
            assert message is not None
            if message[0] == "setup":
                self._setup(message[1])
            elif message[0] == "run":
                self._do(message[1], message[2])

    def say(self, task: int, value: Any) -> None:
        """See `Job.say`."""
        with self.shielded(), self._window:
            while len(self._untaken) >= WINDOW or sum(self._untaken) >= WINDOW_BYTES:
                if self.cancelled or task != self._task:
                    break
                self._window.wait()
            if self.cancelled or task != self._task:
                raise Cancelled("nobody wants this task any more")
            self._untaken.append(self._channel.send_measured(["said", task, value]))

    def log(self, record: logging.LogRecord) -> None:
        """Send a log record, if it can travel."""
        metadata = {str(key): str(value) for key, value in getattr(record, "metadata", {}).items()}
        if record.exc_info:
            metadata["traceback"] = logging.Formatter().formatException(record.exc_info)
        with self.shielded():
            self._channel.send(["log", record.levelname.lower(), record.name, record.getMessage(), metadata])

    @contextlib.contextmanager
    def shielded(self) -> Iterator[None]:
        """No interrupt is raised within; one that comes is raised at its end, if the task's code goes on then."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        exposed, self._exposed = self._exposed, False
        try:
            yield
        finally:
            self._exposed = exposed
            if exposed and self._due:
                self._exposed = self._due = False
                raise Interrupted

    def _urgent(self, message: Message) -> None:
        """On the reader thread: what must reach a task that runs."""
        if message[0] == "run":
            with self._window:
                self._task, self.cancelled = message[1], False
                self._untaken.clear()
                self._window.notify_all()  # whoever still speaks for the task before
        elif message[0] == "cancel" and message[1] == self._task:
            with self._window:
                self.cancelled = True
                self._window.notify_all()
        elif message[0] == "taken" and message[1] == self._task:
            with self._window:
                for _ in range(message[2]):
                    self._untaken.popleft()
                self._window.notify_all()

    # ------------------------------------------------------------------------------------------ tasks

    def _do(self, task: int, payload: Any) -> None:
        self._listen_for_interrupts()
        self._due = False
        try:
            if self.cancelled:
                raise Cancelled("nobody wants this task any more")
            answer = ["done", task, self._exposed_perform(Job(self, task), payload)]
        except Interrupted:
            answer = ["error", task, Cancelled("the task was interrupted, since nobody wants it any more").to_wire()]
        except BaseException as raised:  # also SystemExit: that a task may not end its worker
            answer = ["error", task, _error_of(raised).to_wire()]
        with contextlib.suppress(Exception):  # whatever a task has put there
            sys.stdout.flush()
        self._answer(answer)

    def _answer(self, answer: Message) -> None:
        try:
            self._channel.send(answer)
        except (TypeMismatch, TooLarge) as wrong:
            error = answer[2] | {"details": None} if answer[0] == "error" else wrong.to_wire()
            self._channel.send(["error", answer[1], error])

    def _exposed_perform(self, job: Job, payload: Any) -> Any:
        try:
            self._exposed = True
            if self._due:
                raise Interrupted
            return self._perform(job, payload)
        finally:
            self._exposed = False

    # ------------------------------------------------------------------------------------- interrupts

    def _listen_for_interrupts(self) -> None:
        """Before each task, since the one before may have changed it."""
        signal.signal(signal.SIGINT, self._on_interrupt)
        # One that was held back is raised here, where it does nothing.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def _on_interrupt(self, number: int, frame: Any) -> None:
        if self._exposed:
            self._exposed = False
            raise Interrupted
        self._due = True


class _LogToService(logging.Handler):
    def __init__(self, loop: TaskLoop) -> None:
        super().__init__()
        self._loop = loop

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._loop.log(record)
        except Exception:  # what cannot be formatted or cannot travel must not hurt who logs
            self.handleError(record)


def _error_of(raised: BaseException) -> DemandportError:
    if isinstance(raised, DemandportError):
        return raised
    wrapped = Internal(f"{type(raised).__name__}: {raised}")
    wrapped.traceback = "".join(traceback.format_exception(raised))
    return wrapped
