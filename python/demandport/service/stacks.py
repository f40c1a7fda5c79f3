"""What every thread is doing, as text, and which node it does it for."""

from __future__ import annotations

import sys
import threading
import traceback
from types import FrameType

from demandport.engine.executor import Executor
from demandport.engine.run import Run

#: Where nodes are run from: the function, and the local variable of it that knows the node.
_RUNS_NODES = {Executor._run_inline.__code__: "cell", Run.execute.__code__: "self"}


def stacks(first: int, limit_bytes: int) -> str:
    """The stacks of all threads but the caller's, the thread `first` first, innermost call last. Reads source files.

    What makes it longer than `limit_bytes` is left out: of a stack the outermost calls, then whole threads.
    """
    frames = sys._current_frames()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts: list[str] = []
    for thread in [first, *sorted(frames.keys() - {first, threading.get_ident()})]:
        if thread in frames:
            head = f"thread {names.get(thread, thread)}:\n"
            limit_bytes -= len(head.encode())
            calls = _innermost(frames[thread], limit_bytes)
            if not calls:
                break
            limit_bytes -= sum(map(len, calls))
            parts.append(head + b"".join(calls).decode())
    return "".join(parts)


def _innermost(frame: FrameType, limit_bytes: int) -> list[bytes]:
    """As many of the innermost calls, each as text, as have room."""
    calls = [call.encode(errors="replace") for call in traceback.format_stack(frame)]
    while calls and sum(map(len, calls)) > limit_bytes:
        del calls[0]
    return calls


def node_on(thread: int) -> str | None:
    """The id of the inline or async node that runs on `thread` now; None when it is none."""
    frame: FrameType | None = sys._current_frames().get(thread)
    while frame is not None:
        name = _RUNS_NODES.get(frame.f_code)
        if name is not None:
            found = frame.f_locals[name]
            node: str = (found.cell if isinstance(found, Run) else found).node_id
            return node
        frame = frame.f_back
    return None
