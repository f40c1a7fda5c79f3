"""What a worker of a pool may use, as plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """What one worker may use, and how long one that was called off may go on.

    Attributes:
        recycle_tasks: after so many tasks it is replaced; None for never.
        recycle_bytes: with so much memory it is replaced after its task; None for never.
        memory_bytes: with so much memory it is killed, and its task fails; None for no limit.
        memory_check_s: how often memory is looked at while a task runs.
        ask_s: how long a task that nobody wants may go on until it is interrupted.
        interrupt_s: how long it may go on after that until its worker is killed.
    """

    recycle_tasks: int | None = None
    recycle_bytes: int | None = None
    memory_bytes: int | None = None
    memory_check_s: float = 0.25
    ask_s: float = 1.0
    interrupt_s: float = 1.0
