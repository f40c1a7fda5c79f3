"""Values on the wire that plain Python has no word for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from demandport.errors import BadMessage

MAX_DEPTH = 100
#: msgpack ext type whose body is one External Term Format term.
ETF_EXT_TYPE = 69


@dataclass(frozen=True, slots=True)
class ErlangTerm:
    """A term of the host's that nodes pass on but cannot look into: an atom, tuple, pid, reference or large integer.

    Attributes:
        etf: the term in External Term Format, its version byte 131 included.
    """

    etf: bytes


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
            if isinstance(outer, (list, dict))
            for item in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(item, (list, dict))
        ]
        if not level:
            return
    raise BadMessage(f"the message is nested deeper than {MAX_DEPTH}")
