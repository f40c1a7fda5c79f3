"""How soon a fault is over: kills of workers, of the service and of the BEAM, cancels, malformed frames.

    python bench/faults.py [--quick | --full] [--only PART]

Needs Elixir and llama-cpp-python, on Linux. Every conversation is judged by the tests' history checker: exactly one
terminal for each demand, and what else is promised. The targets hold for the slowest round; exit status 1 when one is
missed.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import itertools
import mmap
import os
import random
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import beam
import latency
import psutil
from beam import BENCH, ROOT, SOURCE
from table import Table

sys.path.insert(0, str(ROOT / "tests"))
os.environ.setdefault("DEMANDPORT_CODE", str(SOURCE))  # the copy of the package that `support` starts

from history import TERMINALS, Fact, Judge, Received, Sent
from malformed import GRAPH, MESSAGES, all_wrong, bend
from recording import Recorder
from support import LIBRARY, TIMEOUT_S, Gate, eventually, family, framed

PARTS = ["workers", "service", "beam", "cancel", "malformed"]
TOLD_MS, BACK_MS, KNOWN_MS, GONE_MS, STOP_MS, FRAME_MS = 250.0, 1000.0, 100.0, 2000.0, 20.0, 100.0
TINY = {"model_path": "tiny", "prompt": "Tell me about cats."}
#: Does not end by itself before it is ended.
LONG = TINY | {"grammar": "root ::= [a-z ]{450}", "temperature": 1.0}
#: Demands that a service has when it is killed.
WAITING, STREAMING = 100, 4
#: The worker hangs in C and hears nothing at these calls: the worst moments to lose the BEAM.
STALLS = {"load": "llama_model_load_from_file:1", "prompt": "llama_decode:1"}
#: With one thread of each kind and no busy waiting, as a machine with 2 cores needs it.
CALM = "+S 1:1 +SDcpu 1:1 +SDio 1 +A 1 +sbwt none +sbwtdcpu none +sbwtdio none"
RELAY = ["elixir", "--erl", f"-noinput {CALM}", str(ROOT / "tests/interop/relay.exs")]
#: A worker that has begun no decode for so long has stopped: many times what a token takes.
QUIET_S = 0.05
#: Cancels come anywhere within so long after a text: some tokens.
SPREAD_S = 0.03
#: Times of decodes that are kept.
KEPT = 4096
#: Random and bent frames that are sent at once.
BATCH = 100


@dataclass(frozen=True)
class Rounds:
    """How often each thing is done.

    Attributes:
        workers: kills, of each kind of worker. beams: kills in each state. cancels: demands that are cancelled.
        frames: that are random or bent, with each codec.
    """

    workers: int
    services: int
    beams: int
    cancels: int
    frames: int


QUICK, DEFAULT = Rounds(3, 3, 1, 40, 1_000), Rounds(8, 10, 3, 240, 10_000)
FULL = Rounds(1_000, 200, 50, 10_000, 5_000_000)


class Faults:
    """What every measurement needs: a folder, the benchmark's nodes, the number of rounds."""

    def __init__(self, folder: Path, rounds: Rounds) -> None:
        self.folder, self.rounds = folder, rounds
        self.site = latency.make_site(folder)
        (self.site / "stray.py").symlink_to(ROOT / "tests/stray.py")  # what LIBRARY prints with
        self.table = Table("what", "rounds", "p50", "p99", "max", "target")

    def row(self, what: str, found: list[float], limit: float | None = None, target: str = "") -> None:
        """Add milliseconds to the table.

        Args:
            limit: what the longest may take; None: there is no target.
        """
        cells = (f"{latency.percentile(found, part):.1f} ms" for part in (0.5, 0.99, 1.0))
        passed = None if limit is None else max(found) <= limit
        target = target or ("" if limit is None else f"<= {limit:,.0f} ms")
        self.table.add(what, f"{len(found):,}", *cells, target, passed=passed)

    def workers(self) -> None:
        """Kills of workers, seen by a host on two pipes."""
        models = [(f"model{n}", "llamacpp-inference", LONG | {"seed": n}) for n in range(4)]
        short = ("short", "llamacpp-inference", TINY | {"max_tokens": 2})
        self._kills("model worker, 4 generations", models, short, _model_worker)
        # One worker, so that what comes next is answered by the one that comes back.
        held: list[Any] = [("held", "bench-hold", {})]
        echo = ("short", "bench-echo", {"value": 1})
        self._kills("worker of cpu nodes", held, echo, _cpu_worker, "--cpu-workers", "1")

    def _kills(
        self, what: str, held: list[Any], short: Any, worker: Callable[[Recorder], int], *arguments: str
    ) -> None:
        told, back = [], []
        with Recorder(*arguments, folders=[self.site]) as host:
            host.open("s", *held, short)
            host.request("demand", "s", short[0])
            for _ in range(self.rounds.workers):
                pid, ids = worker(host), [host.new_id() for _ in held]
                host.send(*(["demand", id, "s", name] for id, (name, *_) in zip(ids, held, strict=True)))
                _hear_streams(host, *(name for name, *_ in held))
                host.record(Fact("worker_killed"))
                start = time.perf_counter()
                os.kill(pid, signal.SIGKILL)
                ended = host.hear_until(lambda ids=ids: not any(map(host.judge.is_open, ids)))
                told.append(_ms_since(start))
                assert {m[2]["code"] for m in ended if m[0] in TERMINALS} == {"worker_crash"}, ended
                host.send(["edit", host.new_id(), "s", [{"op": "invalidate", "node": short[0]}]])
                assert host.request("demand", "s", short[0])[0] == "demand_complete"
                back.append(_ms_since(start))
            host.verdict()
        self.row(f"{what}: kill to the last worker_crash", told, TOLD_MS)
        self.row(f"{what}: kill to the next answer of the new one", back, BACK_MS)

    def service(self) -> None:
        """Kills of the service, seen by processes of a BEAM that use the client."""
        told, back = [], []
        command = [*beam.compiled(self.folder, "faults.exs"), str(WAITING), str(STREAMING)]
        env = beam.environment()
        env["PYTHONPATH"] += f":{self.site}"
        with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin and process.stdout
            try:
                for _ in range(self.rounds.services):
                    process.stdin.write("go\n")
                    process.stdin.flush()
                    pid = int(_line(process, "open"))
                    start = time.perf_counter()
                    os.kill(pid, signal.SIGKILL)
                    _line(process, "told")
                    told.append(_ms_since(start))
                    _line(process, "back")
                    back.append(_ms_since(start))
                    _judge_ends(_line(process, "heard"))
            finally:
                process.stdin.close()
        self.row(f"service: kill to the last of {WAITING + STREAMING} told, BEAM", told, KNOWN_MS)
        self.row("service: kill to the next one's answer, BEAM", back)

    def beam(self) -> None:
        """Kills of a BEAM that has the service as its port."""
        for when in ("idle", "stream", *STALLS):
            self.row(f"BEAM, {when}: kill to the end of every process", self._beams(when), GONE_MS)

    def _beams(self, when: str) -> list[float]:
        found = []
        for number in range(self.rounds.beams):
            (folder := self.folder / f"{when}{number}").mkdir()
            gate = Gate(folder)
            environ = gate.at(STALLS.get(when, ""))
            with Recorder(through=RELAY, folders=[LIBRARY, self.site], env=environ) as host:
                flood = ("flood", "bench-flood", {"count": 1 << 40})
                host.open("s", ("held", "bench-hold", {}), ("llm", "llamacpp-inference", LONG), flood)
                host.send(["demand", 1, "s", "held"])
                _hear_streams(host, "held")
                if when != "idle":
                    host.send(["demand", 2, "s", "llm"])
                if when in STALLS:
                    gate.wait()
                elif when == "stream":
                    _hear_streams(host, "llm")
                    host.send(["demand", 3, "s", "flood"])
                    _hear_streams(host, "flood")
                found.append(_kill_all_of(family(host.pid)))
                host.hear_the_end()
                assert not host.judge.finish(), host.shown()
        return found

    def cancel(self) -> None:
        """Cancels while the tiny model decodes: how long after the host has sent them the last decode ends."""
        file = self.folder / "decodes"
        file.write_bytes(bytes(8 * (2 + KEPT)))
        decodes = Decodes(file)
        for streams, what in ((1, "1 generation"), (8, "8 generations at once")):
            found = self._cancels(decodes, {"DECODES": str(file)}, streams)
            token = statistics.median(token for one in found for token in one.tokens)
            limit = token + STOP_MS
            target = f"<= {limit:.1f} ms (a token takes {token:.2f})"
            self.row(f"cancel of {what}: to the end of the last decode", [one.stopped for one in found], limit, target)
            self.row(f"cancel of {what}: to the last terminal", [one.told for one in found])

    def _cancels(self, decodes: Decodes, env: dict[str, str], streams: int) -> list[Cancelled]:
        found: list[Cancelled] = []
        rng, names = random.Random(5), [f"model{n}" for n in range(streams)]
        with Recorder(folders=[BENCH / "decodes"], env=env) as host:
            host.open("s", *((name, "llamacpp-inference", LONG | {"seed": n}) for n, name in enumerate(names)))
            _cancel(host, decodes, names, 0)  # the model is loaded
            while len(found) < self.rounds.cancels // 2 // streams:
                cancelled = _cancel(host, decodes, names, rng.random() * SPREAD_S)
                if cancelled is not None:
                    found.append(cancelled)
            host.verdict()
        return found

    def malformed(self) -> None:
        """Malformed frames: until they and a ping behind them are answered."""
        for codec in ("msgpack", "etf"):
            rng = random.Random(5)
            with Recorder("--codec", codec) as host:
                for session in ("named", "untouched"):
                    assert host.request("open", session, GRAPH)[0] == "ok"
                wrong = (bent for message in MESSAGES for bent in all_wrong(message, host.new_id))
                found = [_answered(host, [host.codec.encode(bent)]) for bent in wrong]
                self._frames(f"one message wrong in one place, {codec}", found)
                found = [_answered(host, _bad_frames(host, rng)) for _ in range(self.rounds.frames // BATCH)]
                self._frames(f"{BATCH} random and bent frames, {codec}", found)
                assert host.request("demand", "untouched", "b")[2] == {"text": "<x>"}
                host.verdict()

    def _frames(self, what: str, found: list[tuple[float, float]]) -> None:
        self.row(f"{what}: to the ping behind", [took for took, _ in found], FRAME_MS)
        self.row(f"{what}: CPU of the service", [spent for _, spent in found])


# -------------------------------------------------------------------------------------------------- helpers


def _ms_since(start: float) -> float:
    return (time.perf_counter() - start) * 1e3


def _hear_streams(host: Recorder, *nodes: str) -> None:
    """Receive until each of these nodes has streamed something more."""
    silent = set(nodes)
    while silent:
        message = host.receive()
        assert message[0] not in TERMINALS, message
        if message[0] == "node_stream":
            silent.discard(message[1])


def _model_worker(host: Recorder) -> int:
    (worker,) = host.request("health")[2]["workers"]
    pid: int = worker["os_pid"]
    return pid


def _cpu_worker(host: Recorder) -> int:
    (worker,) = host.request("health")[2]["pools"]["cpu"]["workers"]
    pid: int = worker["os_pid"]
    return pid


def _line(process: subprocess.Popen[str], word: str) -> str:
    """What faults.exs says after a word."""
    assert process.stdout
    said, _, rest = process.stdout.readline().rstrip("\n").partition(" ")
    assert said == word, f"the BEAM said {said!r} instead of {word!r}"
    return rest


def _judge_ends(line: str) -> None:
    """Have the history checker judge what the client told those who demanded; it knows their tags as ids."""
    from demandport.wire.codec import MsgpackCodec

    heard: list[Any] = MsgpackCodec().decode(base64.b64decode(line))
    judge, counts = Judge(), [0] * (WAITING + STREAMING + 1)
    judge.note(Received(["ready", {}]))
    for tag in range(1, len(counts)):
        node = "person" if tag <= WAITING else f"flood{tag - WAITING}"
        judge.note(Sent(["demand", tag, "s", node]))
    for tag, kind, node, said in heard:
        if kind == "node_stream":
            judge.note(Received([kind, node, said, tag, counts[tag], "output"]))
            counts[tag] += 1
        else:
            assert kind == "demand_error" and said["code"] == "backend_unavailable", said
            judge.note(Received([kind, node, said, tag, {}]))
    assert not judge.finish(), judge.found[:5]


def _kill_all_of(processes: list[psutil.Process]) -> float:
    """Kill the first of the processes; milliseconds until none of them is left (zombies are gone)."""
    with contextlib.ExitStack() as stack:
        poll = select.poll()
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                fd = os.pidfd_open(process.pid)
                stack.callback(os.close, fd)
                poll.register(fd, select.POLLIN)
        left = len(processes)
        start = time.perf_counter()
        processes[0].kill()
        while left:
            ended = poll.poll(TIMEOUT_S * 1e3)
            assert ended, "some process never ended"
            for fd, _ in ended:
                poll.unregister(fd)
            left -= len(ended)
        return _ms_since(start)


class Decodes:
    """What decodes/llama_cpp.py tells of a worker."""

    def __init__(self, file: Path) -> None:
        with file.open("r+b") as opened:
            self._numbers = memoryview(mmap.mmap(opened.fileno(), 0)).cast("Q")

    @property
    def ended(self) -> int:
        """How many."""
        return self._numbers[1]

    def time_ms(self, number: int) -> float:
        """When one of the latest ended, by the machine's monotonic clock."""
        return self._numbers[2 + number % KEPT] / 1e6

    def wait(self) -> None:
        """Until none is under way, and none has begun for a while."""

        def look() -> bool:
            before = self._numbers[0]
            time.sleep(QUIET_S)
            return before == self._numbers[0] == self._numbers[1]

        assert eventually(look, TIMEOUT_S), "it goes on decoding"


@dataclass(frozen=True)
class Cancelled:
    """How some generations ended that were cancelled at once, in milliseconds.

    Attributes:
        stopped, told: from the sending of the cancels to the end of the last decode, to the last terminal.
        tokens: how long each token took before that.
    """

    stopped: float
    told: float
    tokens: list[float]


def _cancel(host: Recorder, decodes: Decodes, names: list[str], pause_s: float) -> Cancelled | None:
    """Demand some generations, and cancel them a while after all of them have begun to stream. None when one was over
    before its cancel came."""
    first, ids = decodes.ended, [host.new_id() for _ in names]
    host.send(*(["demand", id, "s", name] for id, name in zip(ids, names, strict=True)))
    _hear_streams(host, *names)
    time.sleep(pause_s)
    start = time.monotonic()
    host.send(*(["cancel", host.new_id(), id] for id in ids))
    ended = host.hear_until(lambda: not any(map(host.judge.is_open, ids)))
    told = (time.monotonic() - start) * 1e3
    ended += host.settle()
    decodes.wait()
    if not all(message[2] for message in ended if message[0] == "ok"):
        host.request("edit", "s", [{"op": "invalidate", "node": name} for name in names])
        return None
    times = [decodes.time_ms(number) - start * 1e3 for number in range(first, decodes.ended)]
    assert len(times) < KEPT
    before = [at for at in times[1:] if at < 0]
    return Cancelled(max(0.0, times[-1]), told, [later - earlier for earlier, later in itertools.pairwise(before)])


def _bad_frames(host: Recorder, rng: random.Random) -> list[bytes]:
    """Random and bent ones. No two have the same id, since the checker could not tell whose an answer is."""
    found: list[bytes] = []
    ids: set[str] = set()
    while len(found) < BATCH:
        kind, _, *fields = rng.choice(MESSAGES)
        good = host.codec.encode([kind, host.new_id(), *fields])
        bent = bend(rng, good, host.codec.encode(rng.choice(MESSAGES)))
        payload = rng.choice((bent, bent, bent, bent, rng.randbytes(rng.randrange(60))))
        message = _readable(host, payload)
        id = repr(message[1]) if message and len(message) > 1 else ""
        if not id or id not in ids:
            ids.add(id)
            found.append(payload)
    return found


def _answered(host: Recorder, payloads: list[bytes]) -> tuple[float, float]:
    """Send frames, whatever they hold, and a ping.

    Returns:
        milliseconds until all of them are answered, and how many of these the service computed.
    """
    for payload in payloads:
        host.record(Sent(_readable(host, payload)))
    ping = ["ping", host.new_id()]
    host.record(Sent(ping))
    data = b"".join(map(framed, [*payloads, host.codec.encode(ping)]))
    spent, start = _cpu_s(host.pid), time.perf_counter()
    host.write(data)
    host.settle()
    took, spent = _ms_since(start), _cpu_s(host.pid) - spent
    if took > FRAME_MS:
        what = f"{payloads[0][:60]!r} and {len(payloads) - 1} more"
        print(f"  {took:.0f} ms, {spent * 1e3:.0f} of CPU: {what}", file=sys.stderr)
    return took, spent * 1e3


def _cpu_s(pid: int) -> float:
    """CPU time of another process, by the kernel's clock for it (clock_getcpuclockid(3))."""
    return time.clock_gettime(~pid << 3 | 2)


def _readable(host: Recorder, payload: bytes) -> list[Any] | None:
    """The message in a frame, if there is one."""
    from demandport.errors import DemandportError

    with contextlib.suppress(DemandportError):
        message: list[Any] = host.codec.decode(payload)
        return message
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    often = parser.add_mutually_exclusive_group()
    often.add_argument("--quick", action="store_const", dest="rounds", const=QUICK, help="fewer rounds")
    often.add_argument("--full", action="store_const", dest="rounds", const=FULL, help="so many that it takes hours")
    parser.add_argument("--only", choices=PARTS, help="one part")
    arguments = parser.parse_args()
    print(f"  load of the machine before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="demandport-faults-") as folder:
        faults = Faults(Path(folder), arguments.rounds or DEFAULT)
        for part in [arguments.only] if arguments.only else PARTS:
            getattr(faults, part)()
    faults.table.show()
    return 1 if faults.table.missed else 0


if __name__ == "__main__":
    sys.exit(main())
