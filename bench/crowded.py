"""Tokens a second while other programs take the cores: with all threads, with one, and as the worker chooses.

    python bench/crowded.py [MODEL.gguf]

Without a model the random one of bench/random_model.py is written. Loops that do nothing but count stand for the other
programs. The three take turns of two seconds; each figure is the median of its turns.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import random_model
from table import Table

from demandport.llama.model import Model

TURNS, TURN_S = 3, 2.0
STREAMS = (1, 8)


@contextmanager
def busy(loops: int) -> Iterator[None]:
    """So many programs that compute for ever."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    try:
        yield
    finally:
        for one in started:
            one.kill()
            one.wait()


def rate(model: Model, streams: int) -> float:
    """Tokens a second of so many sequences, over one turn."""
    started, tokens = time.perf_counter(), 0
    while time.perf_counter() - started < TURN_S:
        model.forget_all()
        for position in range(64):
            model.batch.clear()
            for sequence in range(streams):
                model.batch.add(300 + sequence, position, sequence, True)
            model.decode()
            tokens += streams
            if time.perf_counter() - started >= TURN_S:
                break
    return tokens / (time.perf_counter() - started)


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder) / "random.gguf"
        if not path.exists():
            random_model.write(path)
        models = [Model(path, sequences=max(STREAMS), threads=threads) for threads in (cores, 1, None)]
        table = Table("busy programs", "sequences", f"{cores} threads", "one thread", "chosen", "chosen / the better")
        for loops in (0, cores // 2, cores):
            for streams in STREAMS:
                with busy(loops):
                    turns = [[rate(model, streams) for model in models] for _ in range(TURNS)]
                every, one, chosen = (statistics.median(rates) for rates in zip(*turns, strict=True))
                figures = [f"{every:.0f}/s", f"{one:.0f}/s", f"{chosen:.0f}/s", f"{chosen / max(every, one):.2f}"]
                table.add(str(loops), str(streams), *figures)
        table.show()
        for model in models:
            model.close()


if __name__ == "__main__":
    main()
