"""Many jobs at once, and what is made of their outcomes: the modes `all`, `try` and `race`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from demandport.errors import BadMessage, DemandportError

Mode = Literal["all", "try", "race"]
MODES: tuple[Mode, ...] = ("all", "try", "race")


@dataclass(slots=True)
class FanOut:
    """What came of jobs, by their numbers.

    Attributes:
        done: the results. failed: the errors, in the order in which they happened.
        decided: number of the job that decided: in `race` the first that succeeded, in `try` the first that failed.
    """

    count: int
    mode: Mode
    done: dict[int, Any] = field(default_factory=dict)
    failed: dict[int, DemandportError] = field(default_factory=dict)
    decided: int | None = None

    @property
    def lost(self) -> DemandportError | None:
        """A race that nobody won: its first failure."""
        if self.mode == "race" and self.decided is None:
            return next(iter(self.failed.values()), None)
        return None

    def settle(self, number: int, outcome: Any) -> None:
        """Take in an outcome."""
        success = not isinstance(outcome, DemandportError)
        (self.done if success else self.failed)[number] = outcome
        if self.mode != "all" and success == (self.mode == "race"):
            self.decided = number

    def prefix(self) -> list[Any]:
        """The results of the first jobs, up to the first that has none."""
        results: list[Any] = []
        while len(results) in self.done:
            results.append(self.done[len(results)])
        return results


async def fan_out(
    count: int, job: Callable[[int], Awaitable[Any]], *, mode: Mode = "all", limit: int | None = None
) -> FanOut:
    """Run `job(0)` to `job(count - 1)`, at most `limit` at once (None: all), and return what came of them.

    ``all`` runs every job. ``try`` launches none after the first failure and cancels what still runs. ``race`` cancels
    the others at the first success.
    Cancelled, it cancels the jobs and returns once they have ended.

    Raises:
        BadMessage: the mode is not one of these, or the limit is not at least 1.
    """
    if mode not in MODES:
        raise BadMessage(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    if limit is not None and limit < 1:
        raise BadMessage(f"limit must be at least 1, not {limit}; leave it out for no limit")
    outcome, following = FanOut(count, mode), iter(range(count))
    running: dict[asyncio.Task[Any], int] = {}
    ended: list[asyncio.Task[Any]] = []
    news = asyncio.Event()

    def over(task: asyncio.Task[Any]) -> None:
        ended.append(task)
        news.set()

    def launch() -> None:
        while limit is None or len(running) < limit:
            number = next(following, None)
            if number is None:
                return
            task = asyncio.ensure_future(_outcome(job(number)))
            running[task] = number
            task.add_done_callback(over)

    try:
        launch()
        while running and outcome.decided is None:
            await news.wait()
            news.clear()
            for task in ended:
                number = running.pop(task)
                if outcome.decided is None:
                    outcome.settle(number, task.result())
            ended.clear()
            if outcome.decided is None:
                launch()
    finally:
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)
    return outcome


async def _outcome(job: Awaitable[Any]) -> Any:
    """What a job returns, or the error it raises."""
    try:
        return await job
    except DemandportError as failed:
        return failed
