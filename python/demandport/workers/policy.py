"""Decisions about workers, as plain data with a clock given from outside: which one gets the work, and when one that
died may be started again."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Load:
    """How one of several workers stands.

    Attributes:
        in_flight: what it has to do. available: it has not crashed, or is up again.
    """

    in_flight: int
    available: bool = True


def least_loaded(loads: Sequence[Load]) -> int:
    """Index of the one with least to do; of several the first. One that is not available has nothing in flight either,
    and so is left out, unless all are."""
    return min(range(len(loads)), key=lambda index: (not loads[index].available, loads[index].in_flight))


def round_robin(loads: Sequence[Load], turn: int) -> int:
    """Index of the next one that is available, beginning at `turn`."""
    order = [(turn + step) % len(loads) for step in range(len(loads))]
    return next((index for index in order if loads[index].available), order[0])


@dataclass(slots=True)
class Restarts:
    """When a worker that died may be started again.

    The first time at once; each further time in a row it waits, twice as long as before. After `quarantine_after`
    deaths in a row it is quarantined: not started at all for `quarantine_s`.

    Attributes:
        first_s, most_s: shortest and longest wait. jitter: share of the wait that is drawn at random, so that many do
            not start at once.
        failures: deaths in a row.
    """

    first_s: float = 0.25
    most_s: float = 30.0
    jitter: float = 0.25
    quarantine_after: int = 3
    quarantine_s: float = 60.0
    draw: Callable[[], float] = field(default=random.random, repr=False)
    failures: int = 0
    _not_before: float = 0.0

    def succeeded(self) -> None:
        """It has done something: what was before is forgotten."""
        self.failures, self._not_before = 0, 0.0

    def died(self, now: float) -> None:
        """It died, and that was its own fault."""
        self.failures += 1
        self._not_before = now + self._pause_s()

    @property
    def quarantined(self) -> bool:
        """It died so often that it is kept from starting for long."""
        return self.failures >= self.quarantine_after

    def wait_s(self, now: float) -> float:
        """How long to wait, in seconds, before it may be started; 0 for now."""
        return max(0.0, self._not_before - now)

    def _pause_s(self) -> float:
        if self.quarantined:
            return self.quarantine_s
        if self.failures == 1:
            return 0.0
        wait: float = min(self.first_s * 2 ** (self.failures - 2), self.most_s)
        return wait * (1 + self.jitter * self.draw())
