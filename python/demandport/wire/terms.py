"""Values on the wire that plain Python has no word for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from demandport.errors import BadMessage, TypeMismatch

MAX_DEPTH = 100
#: A text or binary of more characters or bytes is written piece by piece: to copy it whole holds everybody up.
LARGE = 1 << 20
#: msgpack ext type whose body is one External Term Format term.
ETF_EXT_TYPE = 69


@dataclass(frozen=True, slots=True, repr=False)
class ErlangTerm:
    """A term of the host's that nodes pass on but cannot look into: an atom, tuple, pid, reference or large integer.

    Attributes:
        etf: the term in External Term Format, its version byte 131 included.
    """

    etf: bytes

    def __repr__(self) -> str:
        """As messages for people show it."""
        return f"<a term of Erlang's, {len(self.etf)} bytes>"


def check_depth(value: Any) -> None:
    """Refuse a value nested deeper than the limit.

    Raises:
        BadMessage: it is deeper than `MAX_DEPTH`.
    """
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            item
            for outer in level
            for item in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(item, list | dict)
        ]
        if not level:
            return
    raise BadMessage(f"the message is nested deeper than {MAX_DEPTH}")


def check_travels(message: list[Any]) -> bool:
    """Refuse a message that a codec would write but the other side would have to refuse.

    Returns:
        whether there is a text or binary of more than `LARGE` in it.

    Raises:
        TypeMismatch: a map key is no string, or something is nested deeper than `MAX_DEPTH`.
    """
    large = False
    level: Iterable[Any] = message
    for _ in range(MAX_DEPTH + 1):
        below: list[Any] = []
        for item in level:
            kind = type(item)
            if kind is str or kind is bytes:
                if len(item) > LARGE:
                    large = True
            elif kind not in _SCALARS:
                below.extend(_inner(item))
        if not below:
            return large
        level = below
    raise TypeMismatch(f"a value nested deeper than {MAX_DEPTH} cannot travel")


def _inner(outer: Any) -> Iterable[Any]:
    """What a container holds; nothing for what is none."""
    if isinstance(outer, dict):
        for key in outer:
            if type(key) is not str and not isinstance(key, str):
                raise TypeMismatch(f"map keys must be strings to travel, not {type(key).__name__}")
        return outer.values()
    if isinstance(outer, list):
        return outer
    if isinstance(outer, tuple):
        if hasattr(outer, "code"):  # msgpack's ExtType is a tuple
            raise TypeMismatch("an ext type of its own cannot travel")
        return outer
    return ()


#: Types that hold nothing else; looked up by the type itself, since this stands in the way of every message.
_SCALARS = frozenset({int, float, bool, type(None), ErlangTerm})
