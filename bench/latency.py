"""Latency and growth: how long a ping and a small demand take while something large goes on, and what a demand costs
among many.

    python bench/latency.py [--quick]

A host on two pipes, with no BEAM between. Every figure stands beside the idle one, or that of ten demands, of the same
run. Exit status 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import select
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from beam import BENCH, SOURCE, environment
from table import Table

HEAD = ("what", "demandport", "against", "ratio", "target")
PING_MS, MORE_MS, TIMES = 10.0, 10.0, 2.0
#: Between two probes: what is measured is the service under its load, not under that of the probes.
PAUSE_S = 0.004
#: Just under the largest frame.
LARGE = (64 << 20) - 4096
BLOCK_S = 5
STREAMS = 16
GROWTH = (10, 100, 1_000, 10_000)
#: As many demands are made for each of these figures, so that small rounds are made more often.
DEMANDS = 10_000
TIMEOUT_S = 60


class Host:
    """A service with the benchmark's nodes, and the host's ends of its pipes. It reads while it writes."""

    def __init__(self, site: Path) -> None:
        from demandport.wire.codec import MsgpackCodec

        self.codec = MsgpackCodec()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "demandport", "serve"],
            env=environment() | {"PYTHONPATH": f"{SOURCE}:{site}"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        assert self.process.stdin and self.process.stdout
        self.fd_in, self.fd_out = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self.fd_in, False)
        self._raw = bytearray()
        self._at = 0
        self._ids = itertools.count(1)
        #: When the reply or the terminal of an id came; large ones count when their last part has come.
        self.ended: dict[int, float] = {}
        self.last: dict[int, list[Any]] = {}
        #: The demand whose end comes in parts. They are not put together: that would take the probes' time.
        self.large = 0
        self.hear()

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait(TIMEOUT_S)
        self.process.stdout.close()

    def framed(self, message: list[Any]) -> bytes:
        payload = self.codec.encode(message)
        return struct.pack(">I", len(payload)) + payload

    def send(self, *messages: list[Any]) -> None:
        self.write(b"".join(map(self.framed, messages)))

    def write(self, data: bytes) -> None:
        """Write all, reading meanwhile."""
        rest = memoryview(data)
        while rest:
            readable, writable, _ = select.select([self.fd_out], [self.fd_in], [], TIMEOUT_S)
            if readable:
                self._raw += os.read(self.fd_out, 1 << 18)
            if writable:
                rest = rest[os.write(self.fd_in, rest[: 1 << 16]) :]

    def hear(self, timeout_s: float = TIMEOUT_S) -> list[Any] | None:
        """The next message that is no part; None when none comes in time."""
        end = time.perf_counter() + timeout_s
        while True:
            while (payload := self._payload()) is None:
                left = end - time.perf_counter()
                if left <= 0 or not select.select([self.fd_out], [], [], left)[0]:
                    if timeout_s == TIMEOUT_S:
                        raise TimeoutError("the service does not answer")
                    return None
                self._raw += os.read(self.fd_out, 1 << 18)
            message = self.codec.decode(payload)
            if message[0] == "part" and message[2]:
                message = ["demand_complete", "", {}, self.large, {}]
            if message[0] != "part":
                self._note(message)
                return message

    def _payload(self) -> bytes | None:
        if len(self._raw) - self._at < 4:
            return None
        size = struct.unpack_from(">I", self._raw, self._at)[0]
        if len(self._raw) - self._at < 4 + size:
            return None
        payload = bytes(memoryview(self._raw)[self._at + 4 : self._at + 4 + size])
        self._at += 4 + size
        if self._at > 1 << 20 or self._at == len(self._raw):
            del self._raw[: self._at]
            self._at = 0
        return payload

    def _note(self, message: list[Any]) -> None:
        kind = message[0]
        id = message[1] if kind in ("ok", "error") else message[3] if kind.startswith("demand_") else 0
        if id:
            self.ended[id] = time.perf_counter()
            self.last[id] = message

    def new_id(self) -> int:
        return next(self._ids)

    def wait(self, id: int) -> list[Any]:
        """Hear until an id is answered; returns the answer."""
        while id not in self.ended:
            self.hear()
        del self.ended[id]
        return self.last.pop(id)

    def ask(self, kind: str, *fields: Any) -> Any:
        """Send a request, and return what the reply says."""
        id = self.new_id()
        self.send([kind, id, *fields])
        reply = self.wait(id)
        assert reply[0] in ("ok", "demand_complete"), reply
        return reply[2]

    def open(self, session: str, nodes: dict[str, tuple[str, dict[str, Any]]], **options: Any) -> None:
        listed = [{"id": id, "node_type": kind, "data": data} for id, (kind, data) in nodes.items()]
        self.ask("open", session, {"nodes": listed, "edges": []}, options)

    def start(self, session: str, node: str, **options: Any) -> int:
        """Make a demand, and do not wait for it."""
        id = self.new_id()
        self.send(["demand", id, session, node, options])
        return id


@dataclass
class Probes:
    """Latencies in milliseconds."""

    pings: list[float] = field(default_factory=list)
    demands: list[float] = field(default_factory=list)


def percentile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * part))]


# ------------------------------------------------------------------------------------------------- latency


class Latency:
    """The part of the table about latency."""

    def __init__(self, host: Host, table: Table, quick: bool) -> None:
        self._host, self._table = host, table
        self._seconds = 1.0 if quick else 4.0
        self._number = itertools.count()
        self._idle = Probes()
        host.open("probe", {"in": ("text-input", {})})

    def measure(self) -> None:
        self._idle = self._probe(self._for(self._seconds))
        self._report("idle", self._idle)
        self._report(f"while a node blocks a thread for {BLOCK_S} s", self._beside_a_thread())
        self._report("while 64 MiB leave as an output", self._beside_outputs())
        self._report_inputs(self._behind_inputs())
        self._report(f"while {STREAMS} sequences decode", self._beside_a_model())

    def _for(self, seconds: float) -> Callable[[], bool]:
        end = time.perf_counter() + seconds
        return lambda: time.perf_counter() < end

    def _probe(self, going: Callable[[], bool]) -> Probes:
        """Ping, and edit and demand a node, by turns, for as long as it goes on."""
        found = Probes()
        while going():
            found.pings.append(self._timed(["ping", self._host.new_id()]))
            self._rest()
            input = {"op": "set_input", "node": "in", "port": "text", "value": str(next(self._number))}
            edit, demand = self._host.new_id(), self._host.new_id()
            found.demands.append(self._timed(["edit", edit, "probe", [input]], ["demand", demand, "probe", "in", {}]))
            self._host.wait(edit)
            self._rest()
        return found

    def _timed(self, *messages: list[Any]) -> float:
        start = time.perf_counter()
        self._host.send(*messages)
        id = messages[-1][1]
        while id not in self._host.ended:
            self._host.hear()
        end = self._host.ended[id]
        self._host.wait(id)
        return (end - start) * 1e3

    def _rest(self) -> None:
        """Read on between two probes, since a host that sleeps does not."""
        end = time.perf_counter() + PAUSE_S
        while (left := end - time.perf_counter()) > 0:
            self._host.hear(left)

    def _beside_a_thread(self) -> Probes:
        self._host.open("block", {"a": ("bench-block", {"seconds": BLOCK_S})})
        id = self._host.start("block", "a")
        found = self._probe(lambda: id not in self._host.ended)
        self._host.wait(id)
        return found

    def _beside_outputs(self) -> Probes:
        """One value after the other, each made anew."""
        self._host.open("large", {"a": ("bench-bytes", {"size": LARGE})})
        going, found = self._for(self._seconds), Probes()
        while going():
            self._host.ask("edit", "large", [{"op": "invalidate", "node": "a"}])
            self._host.large = id = self._host.start("large", "a")
            more = self._probe(lambda id=id: id not in self._host.ended)  # type: ignore[misc]
            self._host.wait(id)
            found.pings += more.pings
            found.demands += more.demands
        return found

    def _behind_inputs(self) -> list[float]:
        """A ping behind the frame that holds an input: from when the frame has been written to the reply."""
        self._host.open("input", {"a": ("linked-input", {})})
        found, going = [], self._for(self._seconds)
        value = bytes(LARGE)
        while going():
            id, input = self._host.new_id(), {"op": "set_input", "node": "a", "port": "value", "value": value}
            self._host.send(["edit", id, "input", [input]])
            found.append(self._timed(["ping", self._host.new_id()]))
            self._host.wait(id)
        self._host.ask("close", "input")
        return found

    def _beside_a_model(self) -> Probes:
        data = {"model_path": "tiny", "raw": True, "grammar": "root ::= [a-z ]*", "max_tokens": 400, "temperature": 1.0}
        names = [f"n{number}" for number in range(STREAMS)]
        self._host.open("model", {name: ("llamacpp-inference", data | {"prompt": f"Story {name}"}) for name in names})
        running = {name: self._host.start("model", name) for name in names}
        while (message := self._host.hear()) is None or message[0] != "node_stream":
            pass
        going = self._for(self._seconds)

        def keep_going() -> bool:
            for name, id in running.items():
                if id in self._host.ended:
                    assert self._host.wait(id)[0] == "demand_complete"
                    self._host.send(["edit", self._host.new_id(), "model", [{"op": "invalidate", "node": name}]])
                    running[name] = self._host.start("model", name)
            return going()

        found = self._probe(keep_going)
        self._host.ask("close", "model")
        return found

    def _report(self, when: str, found: Probes) -> None:
        idle = self._idle
        last = percentile(found.pings, 0.99)
        self._row(f"ping {when}", found.pings, idle.pings, f"p99 < {PING_MS:g} ms", last < PING_MS)
        limit = percentile(idle.demands, 0.99) + MORE_MS
        passed = percentile(found.demands, 0.99) <= limit
        self._row(f"small demand {when}", found.demands, idle.demands, f"p99 <= {limit:.1f} ms", passed)

    def _report_inputs(self, found: list[float]) -> None:
        """Shown alone: the ping stands behind the value in one pipe, and cannot come before it has been read."""
        self._row("ping right behind an input of 64 MiB", found, self._idle.pings, "", None)

    def _row(self, what: str, found: list[float], idle: list[float], target: str, passed: bool | None) -> None:
        ours, bare = (f"{percentile(v, 0.5):.2f} / {percentile(v, 0.99):.2f} ms" for v in (found, idle))
        ratio = percentile(found, 0.99) / percentile(idle, 0.99)
        self._table.add(f"{what}, p50 / p99", ours, f"idle {bare}", f"{ratio:.1f}", target, passed=passed)


# -------------------------------------------------------------------------------------------------- growth


class Growth:
    """The part of the table about many demands in flight: all wait for one node, and then all complete."""

    def __init__(self, host: Host, table: Table, quick: bool) -> None:
        self._host, self._table = host, table
        self._demands = DEMANDS // 5 if quick else DEMANDS
        self._number = itertools.count()
        host.open("gate", {"a": ("human-input", {})}, max_running=max(GROWTH))

    def measure(self) -> None:
        import psutil

        process = psutil.Process(self._host.process.pid)
        self._round(GROWTH[0])
        fresh, held = process.memory_info().rss, 0

        def look() -> None:
            nonlocal held
            held = process.memory_info().rss - fresh

        self._round(GROWTH[-1], look)
        costs: dict[int, list[float]] = {count: [] for count in GROWTH}
        for _ in range(3):
            for count, found in costs.items():
                rounds = max(1, self._demands // count)
                start = time.perf_counter()
                for _ in range(rounds):
                    self._round(count)
                found.append((time.perf_counter() - start) / (rounds * count) * 1e6)
        self._report({count: statistics.median(found) for count, found in costs.items()}, held)

    def _round(self, count: int, while_waiting: Callable[[], None] = lambda: None) -> None:
        host = self._host
        ids = [host.new_id() for _ in range(count)]
        host.send(["edit", host.new_id(), "gate", [{"op": "clear_input", "node": "a", "port": "user_response"}]])
        host.send(*(["demand", id, "gate", "a", {}] for id in ids))
        host.ask("ping")  # now all of them wait
        while_waiting()
        input = {"op": "set_input", "node": "a", "port": "user_response", "value": next(self._number)}
        host.ask("edit", "gate", [input])
        for id in ids:
            assert host.wait(id)[0] == "demand_complete"

    def _report(self, costs: dict[int, float], held: float) -> None:
        base = costs[GROWTH[0]]
        for count in GROWTH[1:]:
            ratio = costs[count] / base
            against = f"{GROWTH[0]} in flight {base:.1f} µs"
            self._table.add(
                f"cost of a demand, {count:,} in flight",
                f"{costs[count]:.1f} µs",
                against,
                f"{ratio:.2f}",
                f"<= {TIMES:.2f}",
                passed=ratio <= TIMES,
            )
        self._table.add(f"memory of a waiting demand, of {GROWTH[-1]:,}", f"{held / GROWTH[-1] / 1024:.2f} KiB")


@contextmanager
def running(site: Path) -> Iterator[Host]:
    """A service of its own."""
    host = Host(site)
    try:
        yield host
    finally:
        host.close()


def measure(table: Table, site: Path, quick: bool) -> None:
    """Add the rows.

    Args:
        site: directory where the service finds the benchmark's nodes.
    """
    for part in (Latency, Growth):
        with running(site) as host:
            part(host, table, quick).measure()


def make_site(folder: Path) -> Path:
    """A directory that holds the benchmark's nodes as an installed package."""
    site = folder / "site"
    info = site / "bench_nodes-0.dist-info"
    info.mkdir(parents=True)
    (site / "bench_nodes.py").symlink_to(BENCH / "bench_nodes.py")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bench-nodes\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[demandport.nodes]\nbench = bench_nodes\n")
    return site


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    arguments = parser.parse_args()
    table = Table(*HEAD)
    with tempfile.TemporaryDirectory(prefix="demandport-bench-") as folder:
        measure(table, make_site(Path(folder)), arguments.quick)
    table.show()
    return 1 if table.missed else 0


if __name__ == "__main__":
    sys.exit(main())
