"""The parts of a session's tick, each on its own, with the time given by hand."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demandport.engine.slots import Slots
from demandport.engine.timeline import (
    Timeline,
    admit,
    enter,
    everyone,
    expired,
    leave,
    next_deadline,
    next_to_start,
)
from demandport.errors import QueueFull


@dataclass(eq=False)
class Entry:
    name: str = ""
    priority: int = 0
    deadline: float | None = None
    ended: bool = False


def entered(timeline: Timeline, *entries: Entry) -> None:
    for entry in entries:
        enter(timeline, entry, admit(timeline))


def end(timeline: Timeline, entry: Entry) -> None:
    entry.ended = True
    leave(timeline, entry)


def test_one_at_a_time_is_a_strict_queue() -> None:
    timeline, entries = Timeline(max_running=1), [Entry(name) for name in "abc"]
    entered(timeline, *entries)
    assert timeline.running == {entries[0]} and timeline.waiting == 2
    assert next_to_start(timeline) is None, "no place is free"
    end(timeline, entries[0])
    assert next_to_start(timeline) is entries[1]
    end(timeline, entries[1])
    assert next_to_start(timeline) is entries[2]
    end(timeline, entries[2])
    assert next_to_start(timeline) is None and not timeline.queued and timeline.waiting == 0


def test_the_highest_priority_starts_first_and_equal_ones_as_they_came() -> None:
    timeline = Timeline(max_running=1)
    first = Entry("first")
    waiting = [Entry("a", 0), Entry("b", 5), Entry("c", -5), Entry("d", 5)]
    entered(timeline, first, *waiting)
    order, current = [], first
    while True:
        end(timeline, current)
        current = next_to_start(timeline)
        if current is None:
            break
        order.append(current.name)
    assert order == ["b", "d", "a", "c"]


def test_past_the_limit_it_is_refused_at_once_and_nothing_changes() -> None:
    timeline = Timeline(max_running=1, max_queued=1)
    entered(timeline, Entry(), Entry())
    with pytest.raises(QueueFull, match="1 demands running and 1 queued"):
        admit(timeline)
    assert (len(timeline.running), timeline.waiting) == (1, 1)


def test_one_that_waits_can_leave() -> None:
    timeline, entries = Timeline(max_running=1), [Entry(name) for name in "abc"]
    entered(timeline, *entries)
    end(timeline, entries[1])
    end(timeline, entries[1])  # harmless
    end(timeline, entries[0])
    assert next_to_start(timeline) is entries[2]


def test_deadlines_come_in_their_order_each_once_and_not_for_those_that_ended() -> None:
    timeline = Timeline(max_running=2)
    late, soon, done, never = Entry("late", 0, 30.0), Entry("soon", 0, 10.0), Entry("done", 0, 20.0), Entry("never")
    entered(timeline, late, soon, done, never)
    end(timeline, done)
    assert next_deadline(timeline) == 10.0
    assert expired(timeline, 9.9) == []
    assert expired(timeline, 25.0) == [soon]
    assert expired(timeline, 25.0) == []
    assert next_deadline(timeline) == 30.0
    assert expired(timeline, 30.0) == [late]
    assert next_deadline(timeline) is None


def test_deadlines_of_demands_that_ended_are_not_kept() -> None:
    timeline = Timeline()
    for number in range(10_000):
        entry = Entry(deadline=1e9 + number)
        enter(timeline, entry, True)
        end(timeline, entry)
    assert len(timeline._deadlines) < 200


def test_everyone_names_those_that_wait_first() -> None:
    timeline, entries = Timeline(max_running=1), [Entry(name) for name in "abc"]
    entered(timeline, *entries)
    assert [entry.name for entry in everyone(timeline)] == ["b", "c", "a"]


@given(st.lists(st.tuples(st.sampled_from(["enter", "end", "start"]), st.integers(-3, 3)), max_size=60))
def test_nobody_is_lost_and_the_limit_holds(steps: list[tuple[str, int]]) -> None:
    timeline, there = Timeline(max_running=2, max_queued=5), []
    for step, number in steps:
        if step == "enter":
            entry = Entry(priority=number)
            try:
                enter(timeline, entry, admit(timeline))
                there.append(entry)
            except QueueFull:
                assert len(there) >= 7 or timeline.waiting == 5
        elif step == "end" and there:
            end(timeline, there.pop(number % len(there)))
        elif step == "start":
            next_to_start(timeline)
        assert len(timeline.running) <= 2
        assert timeline.waiting == sum(map(len, timeline.queued.values())) <= 5
        assert set(everyone(timeline)) == set(there)


@pytest.mark.anyio
async def test_slots_count_refuse_and_can_be_awaited() -> None:
    import anyio

    slots = Slots("calls", 2)
    await slots.empty()
    slots.take()
    slots.take()
    with pytest.raises(QueueFull, match="2 calls are open"):
        slots.take()
    seen = []
    async with anyio.create_task_group() as tasks:

        async def wait() -> None:
            await slots.empty()
            seen.append(slots.open)

        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        slots.release()
        await anyio.wait_all_tasks_blocked()
        assert not seen
        slots.release()
    assert seen == [0]
    assert slots.report() == {"open": 0, "most": 2, "ended": 2, "limit": 2}
