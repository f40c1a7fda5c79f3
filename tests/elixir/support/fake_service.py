"""A small service for tests of the Elixir client: it speaks version 1 of the protocol and misbehaves on request.

Standard library only, so that any Python 3 runs it. What a demand does is told by the name of its node:

    echo            completes with the demand's options as outputs
    stream-N        N chunks, within the credit given, then completes
    never           does not end until it is cancelled
    hold            as never, and streams nothing
    refuse          answers with `error` in place of a terminal
    fail            ends with `node_failed`
    new-code        ends with a code that no table knows
    twice           two terminal messages
    late            a stream message after the terminal
    part-N          an output of N bytes, in parts, other messages between
    parts-endless   parts without end
    torn            half a frame, then exit
    exit-N          exit with status N
    garbage         a frame that is no message
    odd             messages of unknown types, then completes
    bye             `goodbye`, then exit status 65

Arguments: ``slow`` waits 0.3 s before `ready`; ``mute`` is never ready; ``old`` speaks protocol 9;
``die`` ends at once; ``log`` logs a line of each level; ``open=FILE`` does with `open` what the file says at the time:
``mute`` does not answer it, ``refuse`` refuses it; ``models=a,b`` says that it has these models loaded.
"""

import os
import struct
import sys
import time

PART = 65536


def pack(value):
    if value is None:
        return b"\xc0"
    if value is True or value is False:
        return b"\xc3" if value else b"\xc2"
    if isinstance(value, int):
        return b"\xd3" + struct.pack(">q", value) if value < 0 else b"\xcf" + struct.pack(">Q", value)
    if isinstance(value, float):
        return b"\xcb" + struct.pack(">d", value)
    if isinstance(value, str):
        data = value.encode()
        return b"\xdb" + struct.pack(">I", len(data)) + data
    if isinstance(value, bytes):
        return b"\xc6" + struct.pack(">I", len(value)) + value
    if isinstance(value, list):
        return b"\xdd" + struct.pack(">I", len(value)) + b"".join(pack(item) for item in value)
    pairs = b"".join(pack(key) + pack(item) for key, item in value.items())
    return b"\xdf" + struct.pack(">I", len(value)) + pairs


class Reader:
    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, size):
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, form):
        return struct.unpack(">" + form, self.take(struct.calcsize(form)))[0]

    def value(self):
        tag = self.number("B")
        if tag < 0x80:
            return tag
        if tag < 0x90:
            return self.map(tag & 15)
        if tag < 0xA0:
            return [self.value() for _ in range(tag & 15)]
        if tag < 0xC0:
            return self.take(tag & 31).decode()
        if tag >= 0xE0:
            return tag - 256
        if tag in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[tag]
        if tag in NUMBERS:
            return self.number(NUMBERS[tag])
        size = self.number(SIZES[tag])
        if tag in (0xC4, 0xC5, 0xC6):
            return self.take(size)
        if tag in (0xD9, 0xDA, 0xDB):
            return self.take(size).decode()
        if tag in (0xDC, 0xDD):
            return [self.value() for _ in range(size)]
        if tag in (0xDE, 0xDF):
            return self.map(size)
        return self.take(size + 1)  # ext: of no interest here

    def map(self, size):
        return {self.value(): self.value() for _ in range(size)}


NUMBERS = {0xCA: "f", 0xCB: "d", 0xCC: "B", 0xCD: "H", 0xCE: "I", 0xCF: "Q", 0xD0: "b", 0xD1: "h", 0xD2: "i", 0xD3: "q"}
SIZES = {0xC4: "B", 0xC5: "H", 0xC6: "I", 0xC7: "B", 0xC8: "H", 0xC9: "I", 0xD9: "B", 0xDA: "H", 0xDB: "I"}
SIZES |= {0xDC: "H", 0xDD: "I", 0xDE: "H", 0xDF: "I"}

running = {}  # demand id -> (node, next seq, end, credit)
loaded = None
seen = {"credits": [], "cancelled": [], "hello": None}


def write(data):
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(1, view) :]
        except BrokenPipeError:
            os._exit(0)


def frame(payload):
    write(struct.pack(">I", len(payload)) + payload)


def send(*message):
    frame(pack(list(message)))


def read(size):
    data = b""
    while len(data) < size:
        more = os.read(0, size - len(data))
        if not more:
            sys.exit(0)
        data += more
    return data


def error(code, text="as asked", node=None):
    return {"code": code, "message": text, "node": node, "retryable": False, "details": None, "traceback": None}


def complete(demand, node, outputs):
    send("demand_complete", node, outputs, demand, {"duration_us": 1, "ran": 1, "cached": 0, "skipped": False})


def parts(payload, number):
    slices = [payload[at : at + PART] for at in range(0, len(payload), PART)]
    for index, piece in enumerate(slices):
        send("part", number, index == len(slices) - 1, piece)
        if index == 0:
            send("log", "debug", "fake", "between parts", {})


def stream(demand):
    node, at, end, credit = running[demand]
    while at < end and credit != 0:
        send("node_stream", node, f"chunk {at} ", demand, at, "text")
        at, credit = at + 1, credit - 1
    running[demand] = (node, at, end, credit)
    if at == end:
        del running[demand]
        complete(demand, node, {"text": "".join(f"chunk {i} " for i in range(end))})


def demanded(demand, node, options):
    name, _, text = node.partition("-")
    count = int(text) if text.isdigit() else 0
    if name == "stream":
        running[demand] = (node, 0, count, options.get("credit", -1))
        if options.get("credit", -1) == 0:
            running[demand] = (node, count, count, 0)
        stream(demand)
    elif name == "never":
        running[demand] = (node, 0, -1, 0)
        send("node_stream", node, "started", demand, 0, "text")
    elif name == "hold":
        running[demand] = (node, 0, -1, 0)
    elif name == "refuse":
        send("error", demand, error("bad_message"))
    elif name == "fail":
        send("demand_error", node, error("node_failed", "it broke", node), demand, {})
    elif node == "new-code":
        send("demand_error", node, error("brand_new"), demand, {})
    elif name == "twice":
        complete(demand, node, {"n": 1})
        complete(demand, node, {"n": 2})
    elif name == "late":
        complete(demand, node, {})
        send("node_stream", node, "too late", demand, 0, "text")
    elif name == "part":
        parts(pack(["demand_complete", node, {"bytes": b"\xff" * count}, demand, {}]), demand)
    elif name == "parts":
        while True:
            send("part", 1, False, b"x" * PART)
    elif name == "torn":
        write(struct.pack(">I", 1000) + b"half")
        os._exit(1)
    elif name == "exit":
        os._exit(count)
    elif name == "garbage":
        frame(b"\xc1\xc1")
    elif name == "odd":
        send("from_the_future", 1, 2)
        send("ok", 987654, None)
        send("node_stream", "n", "c", 987654, 0, "text")
        complete(demand, node, {})
    elif name == "bye":
        send("goodbye", error("bad_frame", "a frame over the limit"))
        os._exit(65)
    else:
        send("node_event", "s", {"event": "task_started", "node": node, "demand_id": demand})
        complete(demand, node, {"options": options})


def handle(message):
    kind, rest = message[0], message[1:]
    if kind == "demand":
        demanded(rest[0], rest[2], rest[3] if len(rest) > 3 else {})
    elif kind == "credit":
        seen["credits"].append(rest)
        if rest[0] in running:
            node, at, end, credit = running[rest[0]]
            running[rest[0]] = (node, at, end, credit + rest[1])
            stream(rest[0])
    elif kind == "cancel":
        known = running.pop(rest[1], None)
        seen["cancelled"].append(rest[1])
        if known:
            send("demand_error", known[0], error("cancelled"), rest[1], {})
        send("ok", rest[0], known is not None)
    elif kind == "ping":
        send("ok", rest[0], "pong")
    elif kind == "health":
        send("ok", rest[0], {**seen, "open": len(running), "os_pid": os.getpid()})
    elif kind == "models":
        if loaded is not None:  # else it is never answered
            send("ok", rest[0], [{"model": model, "state": "ready"} for model in loaded])
    elif kind == "hello":
        seen["hello"] = rest[1]
        send("ok", rest[0], {"protocol": 1, "features": []})
    elif kind == "edit":
        send("ok", rest[0], {"stale": [operation["op"] for operation in rest[2]]})
    elif kind == "get_output":
        send("ok", rest[0], {"status": rest[2], "value": rest[3]})
    elif kind == "open" and how_to_open() == "mute":
        pass
    elif kind == "open" and how_to_open() == "refuse":
        send("error", rest[0], error("invalid_graph"))
    elif kind == "open":
        send("ok", rest[0], {"nodes": [], "problems": [], "options": rest[3]})
    elif kind == "drain":
        send("ok", rest[0], {"completed": 0, "cancelled": 0})
    else:
        send("ok", rest[0], {"kind": kind, "fields": [repr(item) for item in rest[1:]]})


def how_to_open():
    path = sys.argv[1].removeprefix("open=") if len(sys.argv) > 1 else ""
    return open(path).read() if os.path.exists(path) else ""


def main(mode):
    global loaded
    if mode.startswith("models="):
        loaded = [model for model in mode.removeprefix("models=").split(",") if model]
    if mode == "die":
        sys.exit(3)
    if mode == "slow":
        time.sleep(0.3)
    limits = {"max_frame_bytes": 1 << 20, "part_bytes": PART, "max_open_requests": 2000}
    if mode != "mute":
        send(
            "ready",
            {"protocol": 9 if mode == "old" else 1, "codec": "msgpack", "limits": limits, "os_pid": os.getpid()},
        )
    if mode == "log":
        for level in ("debug", "info", "warning", "error", "odd-level"):
            send("log", level, "fake.logger", f"a line of {level}", {"n": 1})
    while True:
        (size,) = struct.unpack(">I", read(4))
        handle(Reader(read(size)).value())


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
