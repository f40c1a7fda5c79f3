"""llama.cpp as a library of this process: started once, its log lines taken to `logging`."""

from __future__ import annotations

import ctypes
import functools
import logging
from typing import Any

import llama_cpp

_LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
_CONTINUATION = 5
_log = logging.getLogger("llama.cpp")


class LogRoute:
    """Takes llama.cpp's log lines to `logging`; the callback must live as long as the library."""

    def __init__(self) -> None:
        self._level = logging.INFO
        self._line = ""
        self.last_error = ""
        #: Lines below this level are dropped.
        self.least = logging.DEBUG
        self.callback = llama_cpp.llama_log_callback(self._accept)

    def _accept(self, level: int, text: bytes, _: Any) -> None:
        if level != _CONTINUATION:
            self._level = _LEVELS.get(level, logging.INFO)
        self._line += text.decode("utf-8", "replace")
        if not self._line.endswith("\n"):
            return
        line, self._line = self._line.rstrip(), ""
        if self._level >= logging.ERROR and line:
            self.last_error = line
        # Lines of one token's work must cost nothing unless somebody listens.
        if line and self._level >= self.least and _log.isEnabledFor(self._level):
            _log.log(self._level, "%s", line)


@functools.cache
def start_library() -> LogRoute:
    """Start llama.cpp if that has not been done; returns where its log goes."""
    route = LogRoute()
    llama_cpp.llama_log_set(route.callback, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return route
