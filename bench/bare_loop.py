"""What the service is measured against: the least a Python program on a port can do with the same messages.

It unpacks every message and packs a reply of the same shape; no graph, no checks, no flow control. `out` is answered
with what a cached text gives; `flood:N` streams N small integers, packed one by one and written in large pieces.
"""

from __future__ import annotations

import os
import struct

import msgpack

_LENGTH = struct.Struct(">I")
_FLUSH_BYTES = 1 << 16


def main() -> None:
    pack, unpack = msgpack.Packer().pack, msgpack.unpackb
    out = bytearray()

    def send(message: list[object]) -> None:
        payload = pack(message)
        out.extend(_LENGTH.pack(len(payload)))
        out.extend(payload)

    def flush() -> None:
        view = memoryview(bytes(out))
        out.clear()
        while view:
            view = view[os.write(1, view) :]

    send(["ready", {"protocol": 1, "limits": {}}])
    flush()
    rest = b""
    while data := os.read(0, 1 << 16):
        data = rest + data
        position = 0
        while len(data) - position >= 4:
            after = position + 4 + _LENGTH.unpack_from(data, position)[0]
            if after > len(data):
                break
            message = unpack(data[position + 4 : after])
            position = after
            if message[0] == "demand":
                node, id = message[3], message[1]
                if node.startswith("flood"):
                    for seq in range(int(node[6:])):
                        send(["node_stream", node, seq & 127, id, seq, "output"])
                        if len(out) >= _FLUSH_BYTES:
                            flush()
                meta = {"duration_us": 1, "ran": 0, "cached": 1}
                send(["demand_complete", node, {"text": "some text"}, id, meta])
            elif message[0] != "credit":
                send(["ok", message[1], {}])
        rest = data[position:]
        flush()


if __name__ == "__main__":
    main()
