"""Stands before the real llama_cpp in a model worker, and tells the benchmark when it decodes.

The file that DECODES names is shared memory, as bench/faults.py reads it: how many decodes have begun, how many have
ended, and the times when the latest of them ended, in nanoseconds of the machine's monotonic clock.
"""

from __future__ import annotations

import mmap
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.remove(str(Path(__file__).parent))
del sys.modules["llama_cpp"]
import llama_cpp  # noqa: E402 - the real one, which takes this one's place

with open(os.environ["DECODES"], "r+b") as _file:
    _numbers = memoryview(mmap.mmap(_file.fileno(), 0)).cast("Q")
_decode = llama_cpp.llama_decode


def _stamped(*arguments: Any) -> Any:
    _numbers[0] += 1
    try:
        return _decode(*arguments)
    finally:
        ended = _numbers[1]
        _numbers[2 + ended % (len(_numbers) - 2)] = time.monotonic_ns()
        _numbers[1] = ended + 1


llama_cpp.llama_decode = _stamped
