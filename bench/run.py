"""The benchmark: every figure is a ratio to something measured in the same run, or has a stated target.

    python bench/run.py [--quick]

Needs Elixir. A and B take turns; figures are medians after a warm-up. Exit status 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import beam
import latency
import random_model
from beam import BENCH, SOURCE
from table import Table

PARTS = ["demands", "stream", "engine", "start", "latency", "tokens"]
# With this seed the packaged model tells a story of 451 tokens, most of what its context of 512 holds.
PROMPT, TEMPERATURE, SEED = "Tell a story about a lighthouse.", 0.7, 11


class Bench:
    """What every measurement needs: a folder, an environment, the compiled client."""

    def __init__(self, folder: Path, quick: bool) -> None:
        self.folder, self.quick = folder, quick
        self.table = Table(*latency.HEAD)
        self.site = site = latency.make_site(folder)
        self.plain = {**os.environ, "PYTHONPATH": str(SOURCE)}
        self.env = {**beam.environment(), "BARE": str(BENCH / "bare_loop.py"), "PYTHONPATH": f"{SOURCE}:{site}"}
        self.elixir = beam.compiled(folder)

    def port(self, *arguments: Any, one_core: bool = False) -> dict[str, float]:
        """Run a mode of port.exs; returns its results by name."""
        command = [*self.elixir, *map(str, arguments)]
        if one_core:
            command = ["taskset", "-c", str(min(os.sched_getaffinity(0))), *command]
        done = subprocess.run(command, env=self.env, stdout=subprocess.PIPE, text=True, timeout=300, check=True)
        lines = [line.split() for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        return {name: float(value) for _, name, value in lines}

    # ------------------------------------------------------------------------------------ measurements

    def demands(self) -> None:
        """Demands of a cached text-output through a port, and the same port with a bare loop.

        On one core: on several, the kernel's choice of where each process runs decides, and it changes from run to run.
        Waking a core that sleeps takes longer than either program.
        """
        found = self.port("demands", *((3, 500, 5000) if self.quick else (7, 3000, 40_000)), one_core=True)
        rows = (
            ("sequential", "demands one after another", 0.5),
            ("pipelined", "demands, 256 in flight", 0.35),
            ("uncached", "edit and demand, two nodes run", None),
        )
        for name, what, target in rows:
            ours, bare = found[f"{name}_service"], found[f"{name}_bare"]
            ratio = ours / bare
            passed = None if target is None else ratio >= target
            self.table.add(
                what, f"{ours:,.0f}/s", f"bare loop {bare:,.0f}/s", f"{ratio:.2f}", _least(target), passed=passed
            )
        self._dirty("while these demands run", found["dirty_demands"])

    def stream(self) -> None:
        """Chunks from an async generator to a GenServer."""
        found = self.port("stream", *((3, 20_000) if self.quick else (5, 100_000)))
        ours, bare = found["stream_service"], found["stream_bare"]
        passed = ours >= 100_000 or ours / bare >= 0.4
        against, target = f"bare loop {bare:,.0f}/s", ">= 100,000/s or 0.40"
        self.table.add("chunks to a GenServer", f"{ours:,.0f}/s", against, f"{ours / bare:.2f}", target, passed=passed)
        ours, bare = found["stream_raw_service"], found["stream_raw_bare"]
        against = f"bare loop {bare:,.0f}/s"
        self.table.add("chunks to a port's owner, undecoded", f"{ours:,.0f}/s", against, f"{ours / bare:.2f}")
        self.table.add("dirty CPU, 100,000-value terminal", f"{found['dirty_stream']:.2f} %", "", "")

    def engine(self) -> None:
        """Cost per node in process."""
        command = [sys.executable, str(BENCH / "engine.py"), "3" if self.quick else "9"]
        found = json.loads(
            subprocess.run(command, env=self.env, stdout=subprocess.PIPE, check=True, timeout=300).stdout
        )
        for shape, name in (("chain", "chain of 10,000"), ("fan_in", "fan-in of 10,000")):
            bare = found[f"{shape}_bare"]
            steps = (("first", "first demand", 6), ("again", "after set_input", 6), ("open", "open", None))
            for step, what, target in steps:
                ours = found[f"{shape}_{step}"]
                passed = None if target is None else ours <= target
                against, ratio = f"bare loop {bare:.2f} µs", f"{ours / bare:.0f}x"
                limit = "" if target is None else f"<= {target} µs"
                self.table.add(f"{name}, {what}, per node", f"{ours:.1f} µs", against, ratio, limit, passed=passed)

    def start(self) -> None:
        """Spawn to `ready`, and the memory of an idle service."""
        import psutil

        plain, ready, memory = [], [], []
        for turn in range(4 if self.quick else 11):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", "pass"], env=self.plain, check=True)
            passed = time.perf_counter()
            command = [sys.executable, "-m", "demandport", "serve"]
            with subprocess.Popen(command, env=self.plain, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as service:
                assert service.stdin and service.stdout
                try:
                    assert b"ready" in service.stdout.read(11)
                    answered = time.perf_counter()
                    time.sleep(0.2)
                    rss = psutil.Process(service.pid).memory_info().rss / 2**20
                finally:
                    service.stdin.close()
                    service.wait(5)
            if turn:
                plain.append((passed - start) * 1e3)
                ready.append((answered - passed) * 1e3)
                memory.append(rss)
        ours, bare = statistics.median(ready), statistics.median(plain)
        more = ours - bare
        against = f"python -c pass {bare:.0f} ms"
        self.table.add("spawn to ready", f"{ours:.0f} ms", against, f"+{more:.0f} ms", "<= +200 ms", passed=more <= 200)
        rss = statistics.median(memory)
        self.table.add("memory of an idle service", f"{rss:.1f} MiB", "", "", "<= 40 MiB", passed=rss <= 40)

    def latency(self) -> None:
        """Pings and small demands while something large goes on; what a demand costs among many."""
        latency.measure(self.table, self.site, self.quick)

    def tokens(self) -> None:
        """Tokens per second through port and client, against llama.cpp's calls in one loop."""
        model = self.folder / "random.gguf"
        random_model.write(model)
        self._tokens("model of 135 M parameters", str(model), *((64, 4) if self.quick else (128, 9)))
        self._tokens("packaged model", "tiny", *((460, 7) if self.quick else (460, 25)))

    def _tokens(self, name: str, model: str, count: int, rounds: int) -> None:
        path = SOURCE / "demandport/data/tiny.gguf" if model == "tiny" else model
        options = {"prompt": PROMPT, "max_tokens": count, "temperature": TEMPERATURE, "seed": SEED}
        commands = {
            "direct": [sys.executable, str(BENCH / "direct.py"), str(path), json.dumps(options)],
            "port": [*self.elixir, "tokens", PROMPT, str(count), str(TEMPERATURE)],
        }
        rates: dict[str, list[float]] = {"direct": [], "port": []}
        dirty, tokens = [], 0
        running: dict[str, subprocess.Popen[str]] = {}
        try:
            for way, command in commands.items():
                running[way] = subprocess.Popen(
                    command, env=self.env | {"MODEL": model}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            for turn in range(rounds + 2):
                generated = set()
                for way, process in running.items():
                    assert process.stdin and process.stdout
                    process.stdin.write("go\n")
                    process.stdin.flush()
                    tokens, seconds, *rest = (float(word) for word in process.stdout.readline().split())
                    generated.add(tokens)
                    if turn >= 2:
                        rates[way].append(tokens / seconds)
                        dirty.extend(rest[1:])
                assert len(generated) == 1, f"the two made texts of different length: {generated}"
        finally:
            for process in running.values():
                assert process.stdin
                process.stdin.close()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        ours, direct = statistics.median(rates["port"]), statistics.median(rates["direct"])
        # Of each turn its own ratio: the machine's speed drifts more than the two differ.
        ratio = statistics.median(a / b for a, b in zip(rates["port"], rates["direct"], strict=True))
        what = f"tokens to a GenServer, {name}"
        self.table.add(
            what, f"{ours:,.0f}/s", f"direct {direct:,.0f}/s", f"{ratio:.2f}", ">= 0.95", passed=ratio >= 0.95
        )
        self._dirty(f"while tokens stream, {name}", max(dirty))

    def _dirty(self, when: str, percent: float) -> None:
        self.table.add(f"dirty CPU scheduler use {when}", f"{percent:.2f} %", "", "", "0 %", passed=percent < 0.05)


def _least(target: float | None) -> str:
    return "" if target is None else f">= {target:.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--only", choices=PARTS, help="one part")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="demandport-bench-") as folder:
        bench = Bench(Path(folder), arguments.quick)
        for part in [arguments.only] if arguments.only else PARTS:
            getattr(bench, part)()
    bench.table.show()
    return 1 if bench.table.missed else 0


if __name__ == "__main__":
    sys.exit(main())
