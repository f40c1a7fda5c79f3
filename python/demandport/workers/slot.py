"""One place in a pool: the worker that holds it now, the task in its hands, and who comes after it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any, Literal, Protocol

from demandport.errors import Cancelled, OutOfMemory, WorkerCrash, from_wire
from demandport.workers.limits import Limits
from demandport.workers.policy import Restarts
from demandport.workers.process import Message
from demandport.workers.task import Task

#: ``draining``: it gets nothing more and is replaced, after its task if it has one.
State = Literal["stopped", "starting", "idle", "busy", "draining", "crashed", "quarantined"]
#: How a process ends that somebody else has killed; any other end is its own fault, or its task's.
_KILLED = ("killed by SIGKILL", "killed by SIGTERM")


class Worker(Protocol):
    """What a slot needs of a `WorkerProcess`."""

    pid: int

    def send(self, message: Message) -> None: ...
    def send_frame(self, data: bytes) -> None: ...
    def interrupt(self) -> None: ...
    def kill(self) -> None: ...


class Spawn(Protocol):
    """Starts a worker; raises `OSError` where none can be started."""

    def __call__(
        self, *, name: str, on_message: Callable[[Message], None], on_exit: Callable[[str], None]
    ) -> Worker: ...


class Slot:
    """A place with a name that outlives its workers. Belongs to the event loop's thread; nothing blocks.

    Args:
        setup: gives what each new worker is told before its first task.
        changed: called when it may take a task, or stands otherwise than before.

    Attributes:
        epoch: which worker holds the place, from 1; what an earlier one still says is dropped.
        task: what the worker has in hand. It stays until the worker is free of it, also when nobody waits for it.
        start_failed: the last worker never got ready. reason: how the last worker ended.
    """

    state: State

    def __init__(
        self,
        name: str,
        spawn: Spawn,
        limits: Limits,
        restarts: Restarts,
        setup: Callable[[], Any],
        changed: Callable[[], None],
    ) -> None:
        self.name, self.state = name, "stopped"
        self.epoch = self.completed = self.errored = self.crashed = 0
        self.task: Task | None = None
        self.start_failed, self.reason = False, ""
        self._spawn, self._limits, self._restarts = spawn, limits, restarts
        self._setup, self._changed = setup, changed
        self._worker: Worker | None = None
        #: The worker is being killed by us.
        self._doomed = False
        #: Its task is the last one.
        self._retiring = False
        self._closed = False
        #: Tasks that this worker has done.
        self._done_by_worker = 0
        self._restart: asyncio.TimerHandle | None = None
        self._escalation: asyncio.TimerHandle | None = None
        self._watch: asyncio.TimerHandle | None = None

    # ------------------------------------------------------------------------------------ for the pool

    def start(self) -> None:
        """Have a new worker; it takes tasks once it is ``idle``."""
        assert self._worker is None and not self._closed
        self._stop(self._restart)
        self.epoch += 1
        self.state, self.start_failed = "starting", True
        self._doomed = self._retiring = False
        self._done_by_worker = 0
        exited = functools.partial(self._exited, self.epoch)
        heard = functools.partial(self._heard, self.epoch)
        try:
            self._worker = self._spawn(name=f"worker {self.name}", on_message=heard, on_exit=exited)
        except OSError as failed:
            self._loop.call_soon(exited, f"no process can be started: {failed}")

    def take(self, task: Task) -> None:
        """Have the worker do a task."""
        assert self.state == "idle" and self._worker is not None
        self.state, self.task = "busy", task
        self._worker.send_frame(task.data)
        task.data = b""
        if self._limits.memory_bytes is not None:
            self._watch = self._loop.call_later(self._limits.memory_check_s, self._look_at_memory)

    def taken(self, task: Task, count: int) -> None:
        """So many more things that the worker said of its task have been taken."""
        if self.task is task and self._worker is not None:
            self._worker.send(["taken", task.id, count])

    def call_off(self, task: Task) -> None:
        """Nobody waits for this task any more: ask the worker to end it, interrupt it, kill the worker."""
        if self.task is task and self._worker is not None and not self._doomed:
            self._worker.send(["cancel", task.id])
            self._escalation = self._loop.call_later(self._limits.ask_s, self._interrupt)

    def retire(self) -> None:
        """Have another worker instead, after its task."""
        if self.state == "idle":
            self._replace()
        elif self.state == "busy":
            self.state, self._retiring = "draining", True

    def close(self) -> None:
        """Kill the worker, and have no other."""
        self._closed = True
        self._stop(self._restart)
        if self._worker is None:
            self.state = "stopped"
        else:
            self._replace()

    @property
    def held(self) -> bool:
        """A process holds the place, or what is left of one."""
        return self._worker is not None

    def health(self) -> dict[str, Any]:
        """How it stands, as `health` reports it."""
        return {
            "id": self.name,
            "state": self.state,
            "in_flight": int(self.task is not None),
            "completed": self.completed,
            "errored": self.errored,
            "crashed": self.crashed,
            "restarts": max(0, self.epoch - 1),
            "memory_bytes": self._memory_bytes(),
            "os_pid": self._worker.pid if self._worker else None,
        }

    # ------------------------------------------------------------------------------- what workers say

    def _heard(self, epoch: int, message: Message) -> None:
        kind = message[0]
        if epoch != self.epoch or self._worker is None:
            return
        if kind == "ready":
            self._ready()
        elif kind == "log":
            _log(*message[1:])
        elif self.task is not None and message[1] == self.task.id:
            if kind == "said":
                self.task.accept(message[2])
            else:
                self._task_done(self.task, kind, message[2])

    def _ready(self) -> None:
        assert self._worker is not None
        self.start_failed = False
        if not self._doomed:
            self._worker.send(["setup", self._setup()])
            self.state = "idle"
        self._changed()

    def _task_done(self, task: Task, kind: str, outcome: Any) -> None:
        if kind == "done":
            self.completed += 1
            task.finish(outcome)
        else:
            self.errored += outcome["code"] != Cancelled.code
            task.fail(from_wire(outcome))
        self.task = None
        self._done_by_worker += 1
        self._restarts.succeeded()
        self._stop(self._escalation, self._watch)
        if self._doomed:
            return
        if self._retiring or self._is_used_up():
            self._replace()
        else:
            self.state = "idle"
        self._changed()

    def _is_used_up(self) -> bool:
        limits = self._limits
        if limits.recycle_tasks is not None and self._done_by_worker >= limits.recycle_tasks:
            return True
        return limits.recycle_bytes is not None and (self._memory_bytes() or 0) >= limits.recycle_bytes

    # --------------------------------------------------------------------------------- ends of workers

    def _interrupt(self) -> None:
        if self._worker is not None:
            self._worker.interrupt()
            self._escalation = self._loop.call_later(self._limits.interrupt_s, self._replace)

    def _look_at_memory(self) -> None:
        used, most = self._memory_bytes() or 0, self._limits.memory_bytes
        assert most is not None
        if self.task is None:
            return
        if used <= most:
            self._watch = self._loop.call_later(self._limits.memory_check_s, self._look_at_memory)
            return
        self.task.fail(
            OutOfMemory(
                f"the task took {used >> 20} MiB of memory, and a worker may take {most >> 20} MiB; it was ended",
                details={"worker": self.name, "used_bytes": used, "limit_bytes": most},
            )
        )
        self._replace()

    def _replace(self) -> None:
        """End the worker now. It holds nothing that anybody wants, so it may as well be killed; the next one comes when
        it is gone."""
        self._doomed = True
        self.state = "draining"
        if self._worker is not None:
            self._worker.kill()

    def _exited(self, epoch: int, reason: str) -> None:
        assert epoch == self.epoch
        pid = self._worker.pid if self._worker else None
        task, self.task, self._worker = self.task, None, None
        self._stop(self._escalation, self._watch)
        self.reason = reason
        if task is not None:
            task.fail(
                WorkerCrash(
                    f"the worker {self.name} died while it ran this ({reason}); it is not run again by itself",
                    details={"worker": self.name, "os_pid": pid, "reason": reason},
                )
            )
        if not self._doomed:
            self.crashed += 1
            if self.start_failed or not reason.startswith(_KILLED):
                self._restarts.died(self._loop.time())
        self._come_again()
        self._changed()

    def _come_again(self) -> None:
        if self._closed:
            self.state = "stopped"
            return
        pause = 0.0 if self._doomed else self._restarts.wait_s(self._loop.time())
        if not pause:
            self.start()
        elif self._restarts.quarantined:
            self.state = "quarantined"
            self._restart = self._loop.call_later(pause, self._released)
        else:
            self.state = "crashed"
            self._restart = self._loop.call_later(pause, self.start)

    def _released(self) -> None:
        """Quarantine is over: the next task that needs it starts a worker."""
        self.state = "stopped"
        self._changed()

    # ------------------------------------------------------------------------------------------ helpers

    @property
    def _loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    def _memory_bytes(self) -> int | None:
        import psutil

        if self._worker is None:
            return None
        with contextlib.suppress(psutil.Error):
            return int(psutil.Process(self._worker.pid).memory_info().rss)
        return None

    def _stop(self, *timers: asyncio.TimerHandle | None) -> None:
        for timer in timers:
            if timer is not None:
                timer.cancel()


def _log(level: str, logger: str, text: str, metadata: dict[str, str]) -> None:
    number = logging.getLevelNamesMapping().get(level.upper(), logging.INFO)
    logging.getLogger(logger).log(number, text, extra={"metadata": metadata})
