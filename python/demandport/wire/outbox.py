"""Messages on their way out: which frame goes next, and how large messages travel in parts. No I/O.

A message that fits one frame leaves at once. A larger one is cut into parts, and the parts of all large messages take
turns, so that none of them holds up the others or any small message. Messages of one lane (a demand) keep their order:
behind a large one of its lane, a small message waits in line.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from demandport.errors import TooLarge
from demandport.wire.codec import Codec, Pieces
from demandport.wire.framing import frame

PART_BYTES = 64 * 1024


class Outbox:
    """Frames for the writer.

    Args:
        codec: how payloads are written.
        part_bytes: payloads larger than this travel in parts.

    Attributes:
        max_bytes: the largest payload that the peer accepts, its parts joined; None: any.
    """

    def __init__(self, codec: Codec, part_bytes: int = PART_BYTES) -> None:
        self._codec = codec
        self.part_bytes = part_bytes
        self.max_bytes: int | None = None
        self._lanes: deque[_Lane] = deque()
        self._lane_of: dict[int, _Lane] = {}
        self._number = 0
        self.waiting_bytes = 0

    def put(self, message: list[Any], lane: int = 0) -> bytes | None:
        """Take a message; returns its frame when it may leave at once, None when it waits for `next_frames`.

        Args:
            lane: the demand whose order is to be kept, or 0 for none.

        Raises:
            TypeMismatch: a value in it cannot travel.
            TooLarge: the peer does not accept so large a message.
        """
        payload = self._codec.pieces(message)
        if type(payload) is bytes and len(payload) <= self.part_bytes:
            if lane not in self._lane_of:
                return frame(payload)
            self._queue(payload, len(payload), lane, False)
            return None
        size = payload.size if isinstance(payload, Pieces) else len(payload)
        if self.max_bytes is not None and size > self.max_bytes:
            raise TooLarge(
                f"a message of {size} bytes is over the {self.max_bytes} that the host accepts (max_frame_bytes)",
                details={"bytes": size, "max_frame_bytes": self.max_bytes},
            )
        self._queue(payload, size, lane, True)
        return None

    def next_frames(self) -> list[bytes]:
        """The next frame of the lane whose turn it is; none when no large message waits."""
        if not self._lanes:
            return []
        lane = self._lanes.popleft()
        taken = self._cut(lane)
        if lane.payloads:
            self._lanes.append(lane)
        elif lane.key:
            del self._lane_of[lane.key]
        self.waiting_bytes -= len(taken)
        return [taken]

    def _queue(self, payload: bytes | Pieces, size: int, key: int, large: bool) -> None:
        lane = self._lane_of.get(key) if key else None
        if lane is None:
            lane = _Lane(key)
            self._lanes.append(lane)
            if key:
                self._lane_of[key] = lane
        lane.payloads.append((payload, size, large))
        self.waiting_bytes += size

    def _cut(self, lane: _Lane) -> bytes:
        payload, size, large = lane.payloads[0]
        if not large:
            assert isinstance(payload, bytes)
            lane.payloads.popleft()
            self.waiting_bytes += 4  # its own length field was not counted on the way in
            return frame(payload)
        if lane.position == 0:
            self._number += 1
            lane.number = self._number
        if isinstance(payload, Pieces):
            piece = payload.take(self.part_bytes)
        else:
            piece = payload[lane.position : lane.position + self.part_bytes]
        lane.position += len(piece)
        last = lane.position >= size
        cut = frame(self._codec.encode(["part", lane.number, last, piece]))
        self.waiting_bytes += len(cut) - len(piece)
        if last:
            lane.payloads.popleft()
            lane.position = 0
        return cut


class _Lane:
    """Messages that leave one after the other; the first may be on its way already."""

    __slots__ = ("key", "number", "payloads", "position")

    def __init__(self, key: int) -> None:
        self.key = key
        #: Each with its size, and whether it travels in parts.
        self.payloads: deque[tuple[bytes | Pieces, int, bool]] = deque()
        self.position = 0
        self.number = 0
