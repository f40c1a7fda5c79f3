"""Stands before the real llama_cpp in a model worker, as a library that prints wherever it can, that hangs, or that
ends the process as a failed assertion does.

ABORT and STALL name the call that aborts or hangs, as `function:number`. The one that hangs opens the FIFO that GATE
names, then it sleeps in C with Python's lock held, so that no thread of the worker gets a turn.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
from pathlib import Path
from typing import Any

from stray import print_in_every_way

sys.path.remove(str(Path(__file__).parent))
del sys.modules["llama_cpp"]
import llama_cpp  # noqa: E402 - the real one, which takes this one's place


def _wrap(name: str) -> None:
    function, numbers = getattr(llama_cpp, name), itertools.count(1)

    def call(*arguments: Any) -> Any:
        number = next(numbers)
        if number == 1:
            print_in_every_way("a worker")
        if os.environ.get("ABORT") == f"{name}:{number}":
            os.abort()
        if os.environ.get("STALL") == f"{name}:{number}":
            open(os.environ["GATE"], "w").close()
            ctypes.PyDLL(None).sleep(1000)
        return function(*arguments)

    setattr(llama_cpp, name, call)


print_in_every_way("a worker")
_wrap("llama_model_load_from_file")
_wrap("llama_decode")
