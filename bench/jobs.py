"""What a way of generating is asked, and what it answers: both travel as lines of msgpack in base64.

A job is a map: `streams`, the requests to start at once; `late`, one more or None; `after`, how many pieces of text the
first stream has given when the late one is started. A request has the names of demandport's `GenerateRequest`.
"""

from __future__ import annotations

import base64
from dataclasses import asdict, dataclass, field
from typing import Any

import msgpack

Job = dict[str, Any]


@dataclass
class Stream:
    """What came of one request: seconds on the way's own clock.

    Attributes:
        times: of the tokens; with the GenServer of its messages, which may hold several tokens.
        tokens: how many were generated, as the way itself counts.
        prompt_tokens: how many it read; 0 where the way does not say.
    """

    start: float
    times: list[float] = field(default_factory=list)
    end: float = 0.0
    tokens: int = 0
    prompt_tokens: int = 0

    @property
    def first(self) -> float:
        """Seconds to the first text."""
        return self.times[0] - self.start

    @property
    def gaps(self) -> list[tuple[float, float]]:
        """Begin and end of each wait between two tokens."""
        return list(zip(self.times, self.times[1:], strict=False))


def to_line(value: Job | list[Stream]) -> bytes:
    """A job or the streams that came of it."""
    plain = [asdict(stream) for stream in value] if isinstance(value, list) else value
    return base64.b64encode(msgpack.packb(plain)) + b"\n"


def job(line: bytes) -> Job:
    """The job in a line."""
    return msgpack.unpackb(base64.b64decode(line))


def streams(line: bytes) -> list[Stream]:
    """The streams in a line."""
    return [Stream(**fields) for fields in msgpack.unpackb(base64.b64decode(line))]
