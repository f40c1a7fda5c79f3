"""From token bytes to the text a consumer sees. Pure: no model, no I/O."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class Detokenizer:
    """Turns the bytes of tokens into text, whole characters only.

    A character's bytes may be spread over several tokens; they are kept until they are complete. The pieces
    joined are what decoding all bytes at once gives, with U+FFFD for what is no UTF-8.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, piece: bytes) -> str:
        """The text that is certain once `piece` is known; may be empty."""
        return self._decoder.decode(piece)

    def finish(self) -> str:
        """What an incomplete character at the end becomes: one U+FFFD, or nothing."""
        return self._decoder.decode(b"", True)


class StopFilter:
    """Lets text through up to a stop string, which itself never shows, not even its beginning.

    Text whose end may be the beginning of a stop string is held back until that is decided. What counts is
    the stop string that is complete first, and of several complete at the same place the longest; so the
    result does not hang on how the text was cut.

    Args:
        stops: non-empty strings; none means that everything passes at once.

    Attributes:
        stopped: the stop string that was met, or None.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._heads = {stop[0] for stop in self._stops}
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.stopped: str | None = None

    def feed(self, text: str) -> str:
        """The text that may be shown now. After a stop string was met: nothing more."""
        if not self._stops:
            return text
        if self.stopped is not None:
            return ""
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, start, self.stopped = min(found)
            self._held = ""
            return text[:start]
        start = self._undecided(text)
        self._held = text[start:]
        return text[:start]

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _undecided(self, text: str) -> int:
        """Where the longest end of `text` that begins a stop string starts."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._heads and any(stop.startswith(text[start:]) for stop in self._stops):
                return start
        return len(text)
