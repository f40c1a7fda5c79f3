"""How long a ping takes while a node holds up the event loop, beside pings to an idle service of the same run.

    python bench/stall.py [--seconds 5]

Exit status 1 when the 99th percentile misses its target.
"""

from __future__ import annotations

import argparse
import os
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgpack
from beam import BENCH, SOURCE
from table import Table

TARGET_MS = 10.0
#: Between two pings, so that they are spread over the whole stall.
PAUSE_S = 0.002


class Host:
    """Speaks frames to one service."""

    def __init__(self, site: Path) -> None:
        info = site / "bench_nodes-0.dist-info"
        info.mkdir(parents=True)
        (site / "bench_nodes.py").symlink_to(BENCH / "bench_nodes.py")
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bench-nodes\nVersion: 0\n")
        (info / "entry_points.txt").write_text("[demandport.nodes]\nbench = bench_nodes\n")
        env = {**os.environ, "PYTHONPATH": f"{SOURCE}:{site}"}
        command = [sys.executable, "-m", "demandport", "serve", "--log-level", "ERROR"]
        self.process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self._id = 1
        assert self.receive()[0] == "ready"

    def send(self, message: list[Any]) -> None:
        payload = msgpack.packb(message)
        assert self.process.stdin
        self.process.stdin.write(struct.pack(">I", len(payload)) + payload)

    def receive(self) -> list[Any]:
        message: list[Any] = msgpack.unpackb(self._read(*struct.unpack(">I", self._read(4))))
        return message

    def _read(self, size: int) -> bytes:
        found = b""
        assert self.process.stdout
        while len(found) < size:
            found += self.process.stdout.read(size - len(found))
        return found

    def ping_ms(self) -> float:
        """How long one ping takes; whatever else comes is dropped."""
        self._id += 1
        start = time.perf_counter()
        self.send(["ping", self._id])
        while self.receive() != ["ok", self._id, "pong"]:
            pass
        return (time.perf_counter() - start) * 1e3

    def pings_ms(self, seconds: float) -> list[float]:
        """Of pings for so long, one after the other, in ascending order."""
        end, found = time.monotonic() + seconds, []
        while time.monotonic() < end:
            found.append(self.ping_ms())
            time.sleep(PAUSE_S)
        return sorted(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="how long a node holds up the loop")
    seconds = parser.parse_args().seconds
    table = Table("the loop", "pings", "p50", "p99", "max", "p99 against idle", "target")
    with tempfile.TemporaryDirectory(prefix="demandport-stall-") as folder:
        host = Host(Path(folder) / "site")
        data = {"seconds": seconds}
        nodes = [{"id": kind, "node_type": f"bench-{kind}", "data": data} for kind in ("sleep", "spin")]
        host.send(["open", 1, "s", {"nodes": nodes, "edges": []}, {}])
        assert host.receive()[0] == "ok"
        host.pings_ms(0.5)
        idle = 0.0
        for what in ("idle", "sleep", "spin"):
            if what != "idle":
                host.send(["demand", 1, "s", what, {}])
            found = host.pings_ms(seconds * 0.9)  # from its very beginning, and not beyond its end
            p50, p99, most = found[len(found) // 2], found[int(len(found) * 0.99)], found[-1]
            idle = idle or p99
            cells = (f"{p50:.2f} ms", f"{p99:.2f} ms", f"{most:.1f} ms", f"{p99 / idle:.1f}x")
            target = "" if what == "idle" else f"p99 < {TARGET_MS:.0f} ms"
            passed = None if what == "idle" else p99 < TARGET_MS
            name = {"idle": "idle", "sleep": "held up by time.sleep", "spin": "held up by Python code"}[what]
            table.add(name, str(len(found)), *cells, target, passed=passed)
            while what != "idle" and host.receive()[0] != "demand_complete":
                pass
        assert host.process.stdin
        host.process.stdin.close()
        host.process.wait(5)
    table.show()
    return 1 if table.missed else 0


if __name__ == "__main__":
    sys.exit(main())
