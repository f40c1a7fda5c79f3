"""What the tests share: a host that speaks frames to a real service process, and node types for tests."""

from __future__ import annotations

import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from demandport.wire.codec import MsgpackCodec

ROOT = Path(__file__).resolve().parent.parent
CODE = Path(os.environ.get("DEMANDPORT_CODE", ROOT / "python"))
TIMEOUT_S = 20.0

NODES = """
import asyncio, ctypes, os, subprocess, sys, time
from typing import Any
from demandport import Context, node

@node("t-stray")
def stray(text: str = "") -> str:
    print("stray from print", flush=True)
    os.write(1, b"stray from write\\n")
    libc = ctypes.CDLL(None)
    libc.printf(b"stray from C\\n")
    libc.fflush(None)
    subprocess.run(["echo", "stray from a child"], check=True)
    return "done"

@node("t-block")
def block(path: str) -> str:
    with open(path) as gate:
        return gate.read()

@node("t-chunks", outputs={"text": "string"})
async def chunks(chunks: list[Any]):
    for chunk in chunks:
        yield chunk

@node("t-objects", outputs={"items": "json"})
async def objects(ctx: Context, count: int, seen: str = ""):
    for number in range(count):
        yield {"n": number}

@node("t-flood", outputs={"text": "string"})
async def flood(count: int, chunk: str = "x"):
    for _ in range(count):
        yield chunk

@node("t-exit")
def leave(code: int = 3) -> str:
    sys.exit(code)

@node("t-exit-inline", runs="inline")
def leave_inline(code: int = 3) -> str:
    sys.exit(code)

@node("t-cancelled")
async def cancelled(x: int = 0) -> str:
    raise asyncio.CancelledError

@node("t-stop")
def stop(x: int = 0) -> str:
    return next(iter(()))

@node("t-value")
def value(kind: str) -> Any:
    return {"surrogate": "\\ud800", "intkey": {1: 2}, "set": {1}, "object": object(), "complex": 1j,
            "deep": deep(200), "big": 1 << 70, "nan": float("nan"), "datetime": __import__("datetime").datetime.now(),
            "class": int}[kind]

def deep(n):
    found = []
    for _ in range(n):
        found = [found]
    return found

@node("t-log", runs="inline")
def log(ctx: Context, text: str = "\\ud800") -> str:
    ctx.log("info", text)
    return "logged"

@node("t-large")
def large(size: int) -> str:
    return "x" * size

@node("t-wait")
async def wait(x: int = 0) -> str:
    await asyncio.Event().wait()

@node("t-spin", runs="inline")
def spin(x: int = 0) -> str:
    time.sleep(30)
    return ""

@node("t-raise")
def fail(x: int = 0) -> str:
    raise RuntimeError("\\ud800 odd")
"""


def node_package(folder: Path) -> Path:
    """An installed package (by its metadata) whose entry point declares the test nodes; returns its folder."""
    (folder / "demandport_test_nodes.py").write_text(NODES)
    about = folder / "demandport_test_nodes-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: demandport-test-nodes\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[demandport.nodes]\ntests = demandport_test_nodes\n")
    return folder


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "demandport", "serve", *arguments]


def environment(*folders: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (CODE, *folders)))}


def framed(payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + payload


class Ended(Exception):
    """The service closed its output."""


class ServiceProcess:
    """A service and the host's ends of its two pipes. Every wait has a limit."""

    def __init__(self, *arguments: str, nodes: Path | None = None, greet: bool = True) -> None:
        self.codec = MsgpackCodec()
        self.process = subprocess.Popen(
            command(*arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(*([nodes] if nodes else [])),
            bufsize=0,
        )
        assert self.process.stdin and self.process.stdout
        self.fd_in, self.fd_out = self.process.stdin.fileno(), self.process.stdout.fileno()
        self.raw = bytearray()
        self.parts: dict[int, bytearray] = {}
        self.part_numbers: list[int] = []
        self._id = 1 << 32
        self.ready = self.receive() if greet else None

    @property
    def pid(self) -> int:
        return self.process.pid

    def __enter__(self) -> ServiceProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert pipe
            pipe.close()

    def new_id(self) -> int:
        self._id += 1
        return self._id

    def send(self, *messages: list[Any]) -> None:
        self.write(b"".join(framed(self.codec.encode(message)) for message in messages))

    def write(self, data: bytes) -> None:
        """Write all, reading meanwhile, so that both directions may be full."""
        rest = memoryview(data)
        os.set_blocking(self.fd_in, False)
        while rest:
            readable, writable, _ = select.select([self.fd_out], [self.fd_in], [], TIMEOUT_S)
            if not readable and not writable:
                raise TimeoutError("the service neither reads nor writes")
            if readable:
                data = os.read(self.fd_out, 1 << 18)
                if not data:
                    raise Ended
                self.raw += data
            if writable:
                rest = rest[os.write(self.fd_in, rest[: 1 << 16]) :]

    def payload(self, timeout_s: float = TIMEOUT_S) -> bytes:
        """The next frame's payload."""
        end = time.monotonic() + timeout_s
        while len(self.raw) < 4 or len(self.raw) < 4 + struct.unpack_from(">I", self.raw)[0]:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.fd_out], [], [], left)[0]:
                raise TimeoutError("no frame came")
            data = os.read(self.fd_out, 1 << 18)
            if not data:
                raise Ended
            self.raw += data
        size = struct.unpack_from(">I", self.raw)[0]
        found = bytes(self.raw[4 : 4 + size])
        del self.raw[: 4 + size]
        return found

    def receive(self, timeout_s: float = TIMEOUT_S, *, logs: bool = False) -> list[Any]:
        """The next message, put together from its parts."""
        while True:
            message = self.codec.decode(self.payload(timeout_s))
            if message[0] == "part":
                _, number, last, piece = message
                self.part_numbers.append(number)
                self.parts.setdefault(number, bytearray()).extend(piece)
                if not last:
                    continue
                message = self.codec.decode(bytes(self.parts.pop(number)))
            if message[0] != "log" or logs:
                return message

    def until(self, wanted: Callable[[list[Any]], bool], timeout_s: float = TIMEOUT_S) -> list[list[Any]]:
        """Messages up to the first that is wanted, that one included."""
        found = []
        while True:
            found.append(self.receive(timeout_s))
            if wanted(found[-1]):
                return found

    def request(self, kind: str, *fields: Any) -> list[Any]:
        """Send a request and return its reply; other messages are dropped."""
        id = self.new_id()
        self.send([kind, id, *fields])
        return self.until(
            lambda m: (
                (m[0] in ("ok", "error") and m[1] == id)
                or (kind == "demand" and m[0].startswith("demand_") and m[3] == id)
            )
        )[-1]

    def open(
        self, session: str, *nodes: tuple[str, str, dict[str, Any]], edges: list[Any] | None = None, **options: Any
    ) -> None:
        if edges is None:
            edges = []
        graph = {"nodes": [{"id": i, "node_type": t, "data": d} for i, t, d in nodes], "edges": edges}
        reply = self.request("open", session, graph, options)
        assert reply[0] == "ok", reply

    def ping(self) -> None:
        assert self.request("ping")[2] == "pong"

    def end(self) -> None:
        """Close the service's input."""
        assert self.process.stdin
        self.process.stdin.close()

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        return self.process.wait(TIMEOUT_S)

    def stderr(self) -> str:
        """All of stderr, after the end."""
        assert self.process.stderr
        return self.process.stderr.read().decode()


def is_terminal(id: int) -> Callable[[list[Any]], bool]:
    return lambda m: m[0] in ("demand_complete", "demand_error") and m[3] == id


def gone(pids: list[int], timeout_s: float = 5.0) -> bool:
    """Whether all of these processes end in time (a zombie has ended)."""
    end = time.monotonic() + timeout_s
    while any(_lives(pid) for pid in pids):
        if time.monotonic() > end:
            return False
        select.select([], [], [], 0.01)
    return True


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
