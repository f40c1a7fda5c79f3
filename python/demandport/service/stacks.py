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
    """The stacks of all threads but the caller's, innermost call last, the thread `first` first.

    What is over `limit_bytes` is cut off. Reads source files.
    """
    frames = sys._current_frames()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    order = [first, *sorted(frames.keys() - {first, threading.get_ident()})]
    text = ""
    for ident in order:
        if ident not in frames or len(text) > limit_bytes:
            continue
        text += f"thread {names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frames[ident]))
    data = text.encode(errors="replace")
    return data.decode() if len(data) <= limit_bytes else data[:limit_bytes].decode(errors="ignore") + "…"


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
