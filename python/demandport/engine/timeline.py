"""Who runs now and who waits: the order of one session's demands, and their deadlines, as plain data.

Each function here takes the timeline and the time, changes that data alone, and runs nothing: a session's tick is
these, one after another.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from demandport.errors import QueueFull

#: Deadlines of demands that ended are thrown out once there are more of them than this, and than of those that count.
_SPARE = 64


class Entry(Protocol):
    """What a timeline knows of a demand."""

    priority: int
    deadline: float | None
    ended: bool


@dataclass(eq=False, slots=True)
class Timeline:
    """The demands of one session that have not ended.

    Attributes:
        max_running: demands that run at a time; 1 makes it a strict queue. max_queued: those that may wait for a place.
        running: those that run. queued: those that wait, by priority; each level in the order of arrival.
    """

    max_running: int = 64
    max_queued: int = 10_000
    running: set[Any] = field(default_factory=set)
    queued: dict[int, OrderedDict[Any, None]] = field(default_factory=dict)
    waiting: int = 0
    _deadlines: list[tuple[float, int, Any]] = field(default_factory=list)
    _order: Iterator[int] = field(default_factory=itertools.count)


def admit(timeline: Timeline) -> bool:
    """There is a place for one more: True to run it now, False to have it wait.

    Raises:
        QueueFull: as many wait as may.
    """
    if len(timeline.running) < timeline.max_running:
        return True
    if timeline.waiting >= timeline.max_queued:
        most, queued = timeline.max_running, timeline.max_queued
        raise QueueFull(f"the session has {most} demands running and {queued} queued; try later")
    return False


def enter(timeline: Timeline, demand: Entry, now: bool) -> None:
    """Count it among those that run, or (`now` false) as the last of its priority among those that wait."""
    if demand.deadline is not None:
        heapq.heappush(timeline._deadlines, (demand.deadline, next(timeline._order), demand))
        _forget_ended(timeline)
    if now:
        timeline.running.add(demand)
    else:
        timeline.queued.setdefault(demand.priority, OrderedDict())[demand] = None
        timeline.waiting += 1


def next_to_start(timeline: Timeline) -> Any:
    """Move the first of those that wait among those that run; None when none waits or no place is free."""
    if not timeline.waiting or len(timeline.running) >= timeline.max_running:
        return None
    demand = next(iter(timeline.queued[max(timeline.queued)]))
    leave(timeline, demand)
    timeline.running.add(demand)
    return demand


def leave(timeline: Timeline, demand: Entry) -> None:
    """It is over, or moves on: it has no place any more. Harmless for one that had none."""
    if demand in timeline.running:
        timeline.running.discard(demand)
        return
    level = timeline.queued.get(demand.priority)
    if level is not None and demand in level:
        del level[demand]
        timeline.waiting -= 1
        if not level:
            del timeline.queued[demand.priority]


def next_deadline(timeline: Timeline) -> float | None:
    """When there may be something for `expired`; None for never."""
    return timeline._deadlines[0][0] if timeline._deadlines else None


def expired(timeline: Timeline, now: float) -> list[Any]:
    """Those whose deadline has come, the earliest first, each of them once."""
    late: list[Any] = []
    deadlines = timeline._deadlines
    while deadlines and deadlines[0][0] <= now:
        demand = heapq.heappop(deadlines)[2]
        if not demand.ended:
            late.append(demand)
    return late


def everyone(timeline: Timeline) -> list[Any]:
    """All of them, those that wait first: ending them in this order starts none of them."""
    return [*itertools.chain(*timeline.queued.values()), *timeline.running]


def _forget_ended(timeline: Timeline) -> None:
    count = len(timeline.running) + timeline.waiting
    if len(timeline._deadlines) > 2 * count + _SPARE:
        timeline._deadlines[:] = [entry for entry in timeline._deadlines if not entry[2].ended]
        heapq.heapify(timeline._deadlines)
