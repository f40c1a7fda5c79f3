"""Decisions about workers, as plain data with a clock given from outside: when one may be started again."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(slots=True)
class Restarts:
    """When a worker that dies may be started again.

    After one that was ready the next starts at once. After one that died before it was ready it waits, twice as long
    each time; after `quarantine_after` of them in a row it is quarantined: not started at all for `quarantine_s`.

    Attributes:
        first_s, most_s: shortest and longest wait. jitter: share of the wait that is drawn at random, so that many do
            not start at once.
    """

    first_s: float = 0.25
    most_s: float = 30.0
    jitter: float = 0.25
    quarantine_after: int = 3
    quarantine_s: float = 60.0
    draw: Callable[[], float] = field(default=random.random, repr=False)
    #: Deaths in a row before it was ready.
    failures: int = 0
    _not_before: float = 0.0

    def ready(self) -> None:
        """It is ready: what was before is forgotten."""
        self.failures, self._not_before = 0, 0.0

    def died(self, now: float) -> None:
        """It died before it was ready."""
        self.failures += 1
        if self.quarantined:
            wait = self.quarantine_s
        else:
            wait = min(self.first_s * 2 ** (self.failures - 1), self.most_s)
            wait *= 1 + self.jitter * self.draw()
        self._not_before = now + wait

    @property
    def quarantined(self) -> bool:
        """It died so often that it is kept from starting for long."""
        return self.failures >= self.quarantine_after

    def wait_s(self, now: float) -> float:
        """How long to wait, in seconds, before it may be started; 0 for now."""
        return max(0.0, self._not_before - now)
