"""What the tests share: a host that speaks frames to a real service process, and node types for tests."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import psutil

from demandport.inference.backend import Event, Finished, TextChunk
from demandport.wire.codec import codec_named
from demandport.workers.process import kill_all, live_workers

ROOT = Path(__file__).resolve().parent.parent
CODE = Path(os.environ.get("DEMANDPORT_CODE", ROOT / "python"))
#: Holds what stands before the real llama_cpp in a worker, and prints or hangs.
LIBRARY = ROOT / "tests" / "faults" / "library"
#: How long anything may take. Nothing should: it is for what hangs.
TIMEOUT_S = 60.0
#: What the specification promises: at the end, the service and all it started are gone within this time.
END_S = 2.0

NODES = """
import asyncio, multiprocessing, os, subprocess, sys, time
from typing import Any
from demandport import Context, node
from stray import print_in_every_way

@node("t-stray")
def stray(text: str = "") -> str:
    print_in_every_way("a node")
    return "done"

@node("t-child")
def child(how: str) -> int:
    if how == "exec":
        return subprocess.Popen(["sleep", "1000"], close_fds=False).pid
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,))
    process.start()
    return process.pid

@node("t-block")
def block(path: str) -> str:
    with open(path) as gate:
        return gate.read()

@node("t-chunks", outputs={"text": "string"})
async def chunks(chunks: list[Any]):
    for chunk in chunks:
        yield chunk

@node("t-objects", outputs={"items": "json"})
async def objects(ctx: Context, count: int, padding: str = ""):
    for number in range(count):
        yield {"n": number, "padding": padding}

@node("t-flood", outputs={"text": "string"})
async def flood(count: int, chunk: str = "x"):
    for _ in range(count):
        yield chunk

@node("t-turns", outputs={"out": "any"})
async def turns(key: str, chunks: list[Any] = []):
    gate = TURNS.setdefault(key, Turns())
    for number, chunk in enumerate(chunks):
        while number >= gate.let:
            await gate.changed.wait()
        yield chunk

@node("t-let", runs="inline")
def let(turns: dict[str, int]) -> bool:
    for key, count in turns.items():
        gate = TURNS.setdefault(key, Turns())
        gate.let, changed, gate.changed = count, gate.changed, asyncio.Event()
        changed.set()
    return True

class Turns:  # how many chunks the nodes with one key may stream
    def __init__(self):
        self.let, self.changed = 0, asyncio.Event()

TURNS = {}

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

@node("t-cpu", runs="cpu")
def cpu(text: str = "") -> str:
    return text

@node("t-spin", runs="inline")
def spin(gate: str) -> str:
    open(gate, "w").close()
    time.sleep(1000)
    return ""

@node("t-stall", runs="inline")
def stall(gate: str) -> str:
    with open(gate) as opened:
        return opened.read()

@node("t-stall-async")
async def stall_async(gate: str) -> str:
    return stall(gate)

@node("t-raise")
def fail(x: int = 0) -> str:
    raise RuntimeError("\\ud800 odd")
"""


def node_package(folder: Path) -> Path:
    """An installed package (by its metadata) whose entry point declares the test nodes; returns its folder."""
    (folder / "demandport_test_nodes.py").write_text(NODES)
    shutil.copy(ROOT / "tests" / "stray.py", folder)
    about = folder / "demandport_test_nodes-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: demandport-test-nodes\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[demandport.nodes]\ntests = demandport_test_nodes\n")
    return folder


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "demandport", "serve", *arguments]


def count(quick: int, soak: int) -> int:
    """How often: `quick` by `make test`, `soak` by `make soak`."""
    return soak if os.environ.get("DEMANDPORT_SOAK") else quick


def environment(*folders: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (CODE, *folders)))}


_PARENT = """
import subprocess, sys, time
service = subprocess.Popen(sys.argv[2:], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
service.stdin.write(bytes.fromhex(sys.argv[1]))
service.stdin.flush()
time.sleep(1000)
"""


def parent_of_service(frames: bytes, environ: dict[str, str]) -> subprocess.Popen[bytes]:
    """A host that started a service, sent it `frames`, and sleeps."""
    return subprocess.Popen([sys.executable, "-c", _PARENT, frames.hex(), *command()], env=environ)


def framed(payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + payload


class Ended(Exception):
    """The service closed its output."""


class ServiceProcess:
    """A service and the host's ends of its two pipes. Every wait has a limit.

    Args:
        arguments: of `demandport serve`.
        nodes, folders: where the service finds packages, first.
        env: variables of the environment to set.
        through: a program that is given the service's command and hands frames on, both ways. `pid` and `process` are
            its own then.
        greet: read `ready` at once.
    """

    def __init__(
        self,
        *arguments: str,
        nodes: Path | None = None,
        folders: Sequence[Path] = (),
        env: Mapping[str, str] | None = None,
        through: Sequence[str] = (),
        greet: bool = True,
    ) -> None:
        self.codec = codec_named("etf" if "etf" in arguments else "msgpack")
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - not a pipe, which would fill up
        fcntl.fcntl(self.errors, fcntl.F_SETFL, os.O_APPEND)
        self.process = subprocess.Popen(
            [*through, *command(*arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment(*folders, *([nodes] if nodes else [])) | dict(env or {}),
            bufsize=0,
        )
        assert self.process.stdin and self.process.stdout
        self.fd_in, self.fd_out = self.process.stdin.fileno(), self.process.stdout.fileno()
        self.raw = bytearray()
        self.parts: dict[int, bytearray] = {}
        self.part_numbers: list[int] = []
        self._id = 1 << 32
        try:
            self.ready = self.receive() if greet else None
        except BaseException:
            print(self.stderr(), file=sys.stderr)
            self.__exit__()
            raise

    @property
    def pid(self) -> int:
        return self.process.pid

    def __enter__(self) -> ServiceProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            kill(family(self.pid))
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self.errors):
            assert file
            file.close()

    def new_id(self) -> int:
        self._id += 1
        return self._id

    def send(self, *messages: list[Any]) -> None:
        self.write(b"".join(framed(self.codec.encode(message)) for message in messages))

    def write(self, data: bytes | memoryview) -> None:
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

    def write_alone(self, data: bytes) -> memoryview:
        """Write without reading for as long as the service takes it; returns what it did not take."""
        process, rest = psutil.Process(self.pid), memoryview(data)
        os.set_blocking(self.fd_in, False)
        while rest:
            if not select.select([], [self.fd_in], [], 0.1)[1]:
                settle(process)
                if not select.select([], [self.fd_in], [], 0)[1]:
                    break
            rest = rest[os.write(self.fd_in, rest[: 1 << 16]) :]
        return rest

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
            payload = self.payload(timeout_s)
            message = self.codec.decode(payload)
            self.heard(message, len(payload))
            if message[0] == "part":
                _, number, last, piece = message
                self.part_numbers.append(number)
                # In ETF text and bytes are one type.
                self.parts.setdefault(number, bytearray()).extend(piece.encode() if isinstance(piece, str) else piece)
                if not last:
                    continue
                whole = bytes(self.parts.pop(number))
                message = self.codec.decode(whole)
                self.heard(message, len(whole), number)
            if message[0] != "log" or logs:
                return message

    def heard(self, message: list[Any], size: int, number: int | None = None) -> None:
        """For whoever records: a message came, parts and those put together from `number` included."""

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
                or (kind.startswith("demand") and m[0].startswith("demand_") and m[3] == id)
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

    def says_nothing_more(self) -> None:
        """The reply to a ping comes next: whatever was sent before it would come first."""
        id = self.new_id()
        self.send(["ping", id])
        reply = self.receive()
        assert reply == ["ok", id, "pong"], reply

    def end(self) -> None:
        """Close the service's input."""
        assert self.process.stdin
        self.process.stdin.close()

    def hang_up(self) -> None:
        """Close the service's output and have it write."""
        assert self.process.stdout
        self.process.stdout.close()
        os.write(self.fd_in, framed(self.codec.encode(["ping", self.new_id()])))

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        return self.process.wait(TIMEOUT_S)

    def stderr(self) -> str:
        """What was written to stderr so far."""
        self.errors.seek(0)
        return self.errors.read().decode()


def run_within(limit_s: float, coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a test's coroutine; it may hang only so long, and leaves no worker behind."""

    async def limited() -> None:
        async with asyncio.timeout(limit_s):
            await coroutine

    try:
        asyncio.run(limited())
        assert live_workers() == []
    finally:
        kill_all()


async def read(events: AsyncGenerator[Event, None]) -> tuple[str, Finished | None]:
    """The text of a generation, and how it ended."""
    texts, end = [], None
    async with aclosing(events):
        async for event in events:
            if isinstance(event, TextChunk):
                texts.append(event.text)
            elif isinstance(event, Finished):
                end = event
    return "".join(texts), end


def is_terminal(id: int) -> Callable[[list[Any]], bool]:
    return lambda m: m[0] in ("demand_complete", "demand_error") and m[3] == id


class Gate:
    """A FIFO that something elsewhere opens, and so says that it got there."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "gate"
        os.mkfifo(self.path)
        self._fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)

    def at(self, call: str) -> dict[str, str]:
        """Environment in which a model worker with `LIBRARY` comes here at a call (`function:number`), and hangs."""
        return {"STALL": call, "GATE": str(self.path)}

    def wait(self) -> None:
        """Wait until it has been opened; for once."""
        opened = select.select([self._fd], [], [], TIMEOUT_S)[0]
        os.close(self._fd)
        assert opened, "nothing came to the gate"


def family(pid: int) -> list[psutil.Process]:
    """A process and all that it started."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def gone(processes: Sequence[psutil.Process], timeout_s: float = END_S) -> bool:
    """Whether all of these processes end in time. Those that do not are killed."""
    if eventually(lambda: not any(map(lives, processes)), timeout_s):
        return True
    kill(processes)
    return False


def kill(processes: Sequence[psutil.Process]) -> None:
    """Kill those of the processes that still are there."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def lives(process: psutil.Process) -> bool:
    """Whether a process has not ended (a zombie has)."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def settle(process: psutil.Process) -> int:
    """Wait until a process has done all it can and waits; returns the most memory it had meanwhile, in bytes.

    A process that only gets no turn is not asleep, so a busy machine makes this longer and not wrong.
    """
    peak, spent, calm = 0, -1.0, 0

    def look() -> bool:
        nonlocal peak, spent, calm
        before, spent = spent, sum(process.cpu_times()[:2])
        peak = max(peak, process.memory_info().rss)
        calm = calm + 1 if process.status() == psutil.STATUS_SLEEPING and spent == before else 0
        return calm == 20

    assert eventually(look, TIMEOUT_S), "it does not come to rest"
    return peak


def eventually(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Whether a condition comes to hold in time."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            return False
        select.select([], [], [], 0.01)
    return True
