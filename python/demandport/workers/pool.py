"""A pool of worker processes, crash-isolated, each of which does one task at a time. It knows nothing of the tasks."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable
from typing import Any

from demandport.errors import BackendUnavailable, Draining, QueueFull, TooLarge, WorkerCrash
from demandport.wire.codec import MsgpackCodec
from demandport.wire.framing import MAX_FRAME_BYTES, frame
from demandport.workers.limits import Limits
from demandport.workers.policy import Load, Restarts, least_loaded, round_robin
from demandport.workers.process import WorkerProcess
from demandport.workers.slot import Slot, Spawn
from demandport.workers.task import Take, Task

MAX_QUEUED = 1000
#: A slot whose workers keep dying rests so long, while another can do its work.
_QUARANTINE_S = 10.0


async def _drop(said: Any) -> None:
    """What the worker says on the way is of no interest."""


class WorkerPool:
    """Worker processes with names that stay (``cpu-0``, ``cpu-1``, …), started when there is something to do.

    What waits for a worker stands in one queue, in the order it came. A task is given to one worker, once: when that
    dies, the task fails. All methods belong to the event loop's thread.

    Args:
        name: of the pool. size: number of workers.
        module: the program of a worker, which runs a `TaskLoop`.
        max_queued: tasks that may wait for a worker.
        balance: ``least_loaded`` (of several, the first) or ``round_robin``.
        limits: what a worker may use.
        restarts: makes the rule by which the workers of one slot may be started again.
        setup: gives the value that each new worker gets before its first task.
        spawn: starts a worker, where it is no process of `module`.
    """

    def __init__(
        self,
        name: str,
        size: int,
        module: str = "",
        *,
        max_queued: int = MAX_QUEUED,
        balance: str = "least_loaded",
        limits: Limits | None = None,
        restarts: Callable[[], Restarts] = lambda: Restarts(quarantine_s=_QUARANTINE_S),
        setup: Callable[[], Any] = lambda: None,
        spawn: Spawn | None = None,
    ) -> None:
        self.name, self.size, self.max_queued = name, size, max_queued
        start = spawn or functools.partial(WorkerProcess.spawn, module)
        self._slots = [
            Slot(f"{name}-{number}", start, limits or Limits(), restarts(), setup, self._changed)
            for number in range(size)
        ]
        self._balance, self._turn = balance, 0
        self._queue: dict[int, Task] = {}
        self._last_id = 0
        self._draining = self._closed = False
        self._watchers: set[asyncio.Future[None]] = set()
        self._codec = MsgpackCodec()

    @property
    def in_flight(self) -> int:
        """Tasks that workers have in hand, those included that nobody waits for any more."""
        return sum(slot.task is not None for slot in self._slots)

    async def run(self, payload: Any, take: Take = _drop) -> Any:
        """Have a worker do a task, and return its result.

        A caller that is cancelled returns at once. A task that waited then leaves the queue; one that runs is asked to
        end, interrupted after `Limits.ask_s`, and its worker killed `Limits.interrupt_s` later; until it has ended the
        worker counts as busy.

        Args:
            payload: what the worker gets; it is written down now.
            take: gets what the worker says on the way, one after the other; while it waits, the worker does, too.

        Raises:
            QueueFull: as many wait already as may. Draining: no more is taken.
            TypeMismatch, TooLarge: the payload cannot travel.
            WorkerCrash: the worker died; the task is not run again.
            OutOfMemory: it took more memory than a worker may.
            DemandportError: as the worker answered.
        """
        task = self._enter(payload)
        try:
            return await task.follow(take, functools.partial(self._taken, task))
        finally:
            if not task.ended:
                self._call_off(task)

    async def drain(self, timeout_s: float) -> bool:
        """Take no more tasks, and return once none is left, True, or False after `timeout_s`."""
        self._draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._until(lambda: not self._queue and not self.in_flight)
                return True
        return False

    async def swap(self) -> None:
        """Replace each worker by a fresh one, one after the other, each after its task; tasks go on meanwhile.

        A caller that is cancelled leaves the rest as they are.
        """
        for slot in self._slots:
            before = slot.epoch
            slot.retire()
            if slot.state == "draining":
                await self._until(functools.partial(self._is_fresh, slot, before))

    async def close(self) -> None:
        """Kill all workers and return when they are gone; what waits or runs ends with `backend_unavailable`."""
        self._closed = True
        gone = BackendUnavailable(f"the pool {self.name!r} has been closed")
        queued, self._queue = self._queue, {}
        for task in [*queued.values(), *(slot.task for slot in self._slots if slot.task)]:
            task.fail(gone)
        for slot in self._slots:
            slot.close()
        await self._until(lambda: not any(slot.held for slot in self._slots))

    def health(self) -> dict[str, Any]:
        """Size, load and workers, as `health` reports it. Does not wait for anything."""
        return {
            "size": self.size,
            "in_flight": self.in_flight,
            "queued": len(self._queue),
            "max_queued": self.max_queued,
            "workers": [slot.health() for slot in self._slots],
        }

    # ------------------------------------------------------------------------------------------- tasks

    def _enter(self, payload: Any) -> Task:
        if self._draining or self._closed:
            raise Draining(f"the pool {self.name!r} takes no more tasks")
        self._last_id += 1
        data = self._codec.encode(["run", self._last_id, payload])
        if len(data) > MAX_FRAME_BYTES:
            raise TooLarge(f"a task of {len(data)} bytes cannot be given to a worker; {MAX_FRAME_BYTES} can")
        task = Task(self._last_id, frame(data))
        self._queue[task.id] = task
        self._assign()
        if task.id in self._queue and len(self._queue) > self.max_queued + self._to_come():
            del self._queue[task.id]
            raise QueueFull(
                f"the pool {self.name!r} has {self.in_flight} tasks running and {self.max_queued} waiting; try later"
            )
        self._start_workers()
        return task

    def _to_come(self) -> int:
        """Workers that are on their way: as many tasks wait for one only because it is new."""
        return sum(slot.state in ("stopped", "starting") for slot in self._slots)

    def _call_off(self, task: Task) -> None:
        if self._queue.pop(task.id, None) is not None:
            self._changed()
        for slot in self._slots:
            slot.call_off(task)

    def _taken(self, task: Task, count: int) -> None:
        for slot in self._slots:
            slot.taken(task, count)

    # ------------------------------------------------------------------------------------------ workers

    def _changed(self) -> None:
        """A slot or the queue stands otherwise than before."""
        self._assign()
        self._start_workers()
        for watcher in self._watchers:
            if not watcher.done():
                watcher.set_result(None)

    def _assign(self) -> None:
        """Give what waits to workers that are free; choosing and counting are one step."""
        while self._queue:
            loads = [Load(int(slot.task is not None), slot.state == "idle") for slot in self._slots]
            choice = least_loaded(loads) if self._balance == "least_loaded" else round_robin(loads, self._turn)
            if not loads[choice].available:
                return
            self._turn = choice + 1
            first = next(iter(self._queue))
            self._slots[choice].take(self._queue.pop(first))

    def _start_workers(self) -> None:
        """As many as there are tasks that wait. When all slots are in quarantine, one is tried nevertheless."""
        wanted = len(self._queue) - sum(slot.state == "starting" for slot in self._slots)
        for slot in self._slots:
            if wanted > 0 and slot.state == "stopped" and not self._closed:
                slot.start()
                wanted -= 1
        if self._queue and all(slot.state == "quarantined" for slot in self._slots):
            self._try_one()

    def _try_one(self) -> None:
        """Start a worker of a slot whose workers did get ready, if they did not live; with no such slot, nothing that
        waits will be done."""
        for slot in self._slots:
            if not slot.start_failed:
                slot.start()
                return
        queued, self._queue = self._queue, {}
        for task in queued.values():
            task.fail(WorkerCrash(f"no worker of the pool {self.name!r} gets ready: {self._slots[0].reason}"))

    def _is_fresh(self, slot: Slot, before: int) -> bool:
        return self._closed or (slot.epoch > before and slot.state != "starting")

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            watcher: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._watchers.add(watcher)
            try:
                await watcher
            finally:
                self._watchers.discard(watcher)
