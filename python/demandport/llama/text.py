"""From token bytes to the text a consumer sees. Pure: no model, no I/O."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

#: Text is held back at most this long: a hundred messages a second are as many as anyone sees, and each one takes the
#: cores some tenths of a millisecond of computing. A model of up to a hundred tokens a second sends each at once.
COALESCE_S = 0.010


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


class Output:
    """The text of one generation: from token bytes to the chunks that are sent, at most one per `COALESCE_S`.

    No timer is needed: while text is held back the next token is being computed, and a model slow enough for that to
    matter has let more than `COALESCE_S` pass since the last chunk, so that nothing is held back. Bytes are read as
    text only then, unless a stop string is looked for.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._detokenizer = Detokenizer()
        self._stops = StopFilter(stops)
        self._looks = bool(stops)
        self._pieces: list[bytes] = []
        self._pending: list[str] = []
        self._sent_at = float("-inf")

    @property
    def stopped(self) -> bool:
        """A stop string was met."""
        return self._stops.stopped is not None

    def add(self, piece: bytes, now: float) -> str:
        """Take the bytes of a token in; returns the text to send now, or nothing. `now` is in seconds."""
        self._pieces.append(piece)
        due = now - self._sent_at >= COALESCE_S
        if due or self._looks:
            self._read()
        if not due or not self._pending:
            return ""
        self._sent_at = now
        return self.take()

    def take(self) -> str:
        """What is whole and was not sent yet."""
        self._read()
        text = "".join(self._pending)
        self._pending.clear()
        return text

    def finish(self) -> str:
        """The rest, when no more tokens come: also what was held back."""
        text = self.take()
        if not self.stopped:
            text += self._stops.feed(self._detokenizer.finish())
            if not self.stopped:
                text += self._stops.finish()
        return text

    def _read(self) -> None:
        text = self._stops.feed(self._detokenizer.feed(b"".join(self._pieces)))
        self._pieces.clear()
        if text:
            self._pending.append(text)
