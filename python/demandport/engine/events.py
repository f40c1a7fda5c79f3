"""What happened in a session, numbered, the last of it kept: who comes back reads on where it was."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

#: These are told whatever kinds of events are asked for: who waits for a demand must learn its end, and why.
ALWAYS = frozenset(("task_failed", "demand_started", "demand_completed", "demand_failed"))


class EventLog:
    """The last events of one session.

    Args:
        keep: how many are kept.

    Attributes:
        next: the number of the event that comes next; they count from 0.
        on_event: told when there is a new one.
    """

    def __init__(self, keep: int) -> None:
        self._kept: deque[dict[str, Any]] = deque(maxlen=keep)
        self.next = 0
        self.on_event: Callable[[], None] | None = None

    def add(self, event: str, node: str | None, fields: dict[str, Any] | None = None) -> None:
        """Something happened; its number and time, in microseconds since 1970, are given here, and never go back."""
        now = time.time_ns() // 1000
        if self._kept:
            now = max(now, self._kept[-1]["time_us"])
        self._kept.append({**(fields or {}), "event": event, "node": node, "seq": self.next, "time_us": now})
        self.next += 1
        if self.on_event is not None:
            self.on_event()

    @property
    def first(self) -> int:
        """The number of the oldest event that is kept."""
        return self.next - len(self._kept)

    def get(self, seq: int) -> dict[str, Any]:
        """The event of that number, which must be kept."""
        return self._kept[seq - self.first]


def wanted(event: dict[str, Any], kinds: frozenset[str] | None) -> bool:
    """Whether who asked for `kinds` (None: all) is told of the event."""
    return kinds is None or event["event"] in kinds or event["event"] in ALWAYS
