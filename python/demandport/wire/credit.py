"""Flow control of one demand's stream, as arithmetic. No I/O.

The policy: a chunk leaves while there is credit and room. Otherwise it is kept: text joins the text already kept for
its port, so what is kept grows no larger than the output itself; other values are kept one by one, and `full` tells
their producer to wait. Credit that comes later releases what is kept in the order of arrival. `coalesce` holds text
back in the same way although there is credit; the first chunk of a port always goes at once.
"""

from __future__ import annotations

from typing import Any

#: (node, port)
Key = tuple[str, str]
#: node, port, seq, chunk
Sent = tuple[str, str, int, Any]


class StreamWindow:
    """What one demand may stream now.

    Args:
        credit: stream messages that may still be sent; None for no limit.
        coalesce_bytes: text is held back until this many characters are kept (0: not held by size).
        coalescing: whether text is held back at all, until `release` or the size is reached.
    """

    __slots__ = ("_coalesce_bytes", "_coalescing", "_kept", "_seq", "_values", "credit", "unwanted")

    def __init__(self, credit: int | None = None, *, coalesce_bytes: int = 0, coalescing: bool = False) -> None:
        self.credit = credit
        self.unwanted = credit == 0
        self._coalesce_bytes = coalesce_bytes
        self._coalescing = coalescing
        self._seq: dict[Key, int] = {}
        self._kept: dict[Key, list[Any]] = {}
        self._values = 0  # kept chunks that cannot be merged

    @property
    def kept(self) -> bool:
        """Something waits to be sent."""
        return bool(self._kept)

    @property
    def full(self) -> bool:
        """A producer of values that cannot be merged must wait, and one of text had better, where it can."""
        return self._values > 0 or (self.credit == 0 and bool(self._kept) and not self.unwanted)

    def offer(self, node: str, port: str, chunk: Any, room: bool) -> Sent | None:
        """A new chunk; returns it with its number when it leaves now, None when it is kept.

        Args:
            room: whether the pipe takes more just now.
        """
        key = (node, port)
        kept = self._kept.get(key)
        text = type(chunk) is str
        if self.unwanted and not text:
            return None  # no stream is wanted, and values, unlike text, would be kept without bound
        if kept is None and room and self.credit != 0 and not (text and self._coalescing and key in self._seq):
            return self._number(key, chunk)
        if kept is None:
            kept = self._kept[key] = []
        _keep(kept, chunk)
        self._values += not text
        return None

    def release(self, room: bool, *, held: bool = True) -> list[Sent]:
        """What may leave now of what is kept.

        Args:
            held: also text that is only held back for coalescing, whatever its size.
        """
        sent: list[Sent] = []
        while self._kept and room and self.credit != 0:
            key = next(iter(self._kept))
            values = self._kept[key]
            if not held and self._coalescing and not self._values and not self._large(values):
                break
            chunk, taken = _merged(values)
            self._values -= type(chunk) is not str
            sent.append(self._number(key, chunk))
            del values[:taken]
            if not values:
                del self._kept[key]
        return sent

    def grant(self, n: int) -> None:
        """Add `n` to the credit; of no effect without a limit."""
        self.unwanted = False
        if self.credit is not None:
            self.credit += n

    def _large(self, values: list[Any]) -> bool:
        return self._coalesce_bytes > 0 and sum(len(v) for v in values if type(v) is str) >= self._coalesce_bytes

    def _number(self, key: Key, chunk: Any) -> Sent:
        seq = self._seq.get(key, 0)
        self._seq[key] = seq + 1
        if self.credit is not None:
            self.credit -= 1
        return (*key, seq, chunk)


def _keep(values: list[Any], chunk: Any) -> None:
    """Append `chunk`; text is joined to the text before it while that is no longer.

    So text lies in pieces that halve towards the end, as the digits of a binary counter: a million tokens are some
    twenty strings, and each character is copied some twenty times at most.
    """
    if type(chunk) is str:
        while values and type(values[-1]) is str and len(values[-1]) <= len(chunk):
            chunk = values.pop() + chunk
    values.append(chunk)


def _merged(values: list[Any]) -> tuple[Any, int]:
    """The first value, with all text that follows it merged in when it is text; and how many values that took."""
    if type(values[0]) is not str:
        return values[0], 1
    taken = 0
    while taken < len(values) and type(values[taken]) is str:
        taken += 1
    return "".join(values[:taken]), taken
