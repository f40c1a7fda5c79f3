"""Frames: a 4-byte big-endian length, then that many bytes (Erlang's ``{:packet, 4}``). No I/O."""

from __future__ import annotations

from struct import Struct

from demandport.errors import BadFrame

MAX_FRAME_BYTES = 64 * 1024 * 1024
_LENGTH = Struct(">I")


def frame(payload: bytes) -> bytes:
    """The frame that carries `payload`."""
    return _LENGTH.pack(len(payload)) + payload


class FrameDecoder:
    """Cuts a stream of bytes, however it is split, into payloads.

    A length over the limit is refused before anything is kept for it; an empty frame comes out as an empty payload, for
    the caller to answer.
    """

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._max = max_frame_bytes
        self._buffer = bytearray()
        self._wanted = _LENGTH.size

    @property
    def buffered_bytes(self) -> int:
        """Bytes of a frame that is not complete yet."""
        return len(self._buffer)

    def feed(self, data: bytes) -> list[bytes]:
        """Take bytes in; returns the payloads that are complete now, in order.

        Raises:
            BadFrame: a length is over the limit. The frames before it are in ``details["frames"]``; the decoder is of
                no use afterwards, since where the next frame starts is unknown.
        """
        if self._buffer:
            self._buffer += data
            if len(self._buffer) < self._wanted:  # a large frame that arrives in many pieces is copied out only once
                return []
            data = bytes(self._buffer)
            self._buffer.clear()
        payloads: list[bytes] = []
        position, end = 0, len(data)
        self._wanted = _LENGTH.size
        while end - position >= 4:
            (length,) = _LENGTH.unpack_from(data, position)
            if length > self._max:
                raise BadFrame(
                    f"a frame of {length} bytes is over the limit of {self._max}",
                    details={"length": length, "limit": self._max, "frames": payloads},
                )
            after = position + 4 + length
            if after > end:
                self._wanted = after - position
                break
            payloads.append(data[position + 4 : after])
            position = after
        if position < end:
            self._buffer += data[position:]
        return payloads
