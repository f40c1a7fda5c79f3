"""Generation: the scheduler, directly and through port and GenServer, beside what llama.cpp and llama-cpp-python offer.

    LLAMA_SERVER=/path/of/llama-server python bench/inference.py [--quick] [--only PART …] [--model NAME] [--out DIR]

Needs Elixir; llama-server takes part where the environment names it. The ways take turns, each with the same prompts,
and every ratio is of two figures of one turn; what is printed are medians after a warm-up. Targets are judged on the
random model and shown for the packaged one. Exit status 1 when one is missed. A full run draws docs/inference.png; with
--out that and the figures (inference.json) go there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import beam
import random_model
from inference_report import Figures, add_targets, draw, percentile, show
from jobs import Job, Stream
from table import Table
from ways import (
    CORES,
    DIRECT,
    LLAMA_SERVER,
    PORT,
    STARTERS,
    Setting,
    Way,
    all_but_llama_server,
    and_llama_server,
    llama_server,
    memory,
)

SAMPLING = {"raw": True, "temperature": 0.7, "top_k": 40, "top_p": 0.95, "min_p": 0.05}
PARTS = ["rates", "prefix", "load", "arrival", "memory"]
#: Cells that all streams of a way share; as many as the worker takes.
CELLS = 8192
#: Streams that run while another comes.
RUNNING_UNDER_LOAD, RUNNING_AT_ARRIVAL = 7, 4


@dataclass(frozen=True)
class Case:
    """A model and how much is asked of it, in tokens. Figures of a quick run come from less of the same.

    Attributes:
        threads: for one token at a time: what demandport chooses by itself, and the ways that are told so.
        made: by each stream where tokens a second are counted.
        prefix: of the prompts that begin alike.
        arriving: of the prompt that comes while others run.
        running: made by those others.
        after: pieces of text that the first of them has given by then.
        often: times as many turns, where they are short.
        endless: it never ends a text by itself, so every stream makes all its tokens; else their real number counts.
    """

    title: str
    context: int
    threads: int
    made: int
    prefix: int
    arriving: int
    running: int
    after: int
    often: int
    endless: bool


CASES = {
    "random": Case("135 M parameters", random_model.CONTEXT, CORES, 128, 1000, 2000, 160, 16, 1, True),
    "tiny": Case("packaged model", 512, 1, 96, 250, 400, 300, 4, 2, False),
}


@dataclass(frozen=True)
class Effort:
    """How often is measured, and at how many streams."""

    streams: tuple[int, ...]
    turns: int
    few_turns: int
    share: float  # of the tokens that streams make
    running_share: float  # of those that they make while a prompt arrives


FULL = Effort((1, 2, 4, 8, 16), turns=3, few_turns=3, share=1.0, running_share=1.0)
QUICK = Effort((1, 8), turns=1, few_turns=1, share=0.5, running_share=0.6)


class Prompts:
    """Prompts of words that are one token each: new ones each time, the same in every run."""

    def __init__(self) -> None:
        self._words, self._random = random_model.words(), random.Random(7)

    def words(self, count: int) -> str:
        return "".join(self._random.choices(self._words, k=count))

    def story(self, before: str = "") -> str:
        """What the packaged model answers at length, so that streams seldom end before their time."""
        subject = self.words(4) + "<|end|>\n<|user|>\nTell a story about a" + self.words(1)
        return f"{before}{subject}.<|end|>\n<|assistant|>\nOnce upon a time there was"

    def requests(self, count: int, tokens: int) -> list[Job]:
        return [request(self.story(), tokens, seed) for seed in range(count)]


def request(prompt: str, tokens: int, seed: int = 1) -> Job:
    return {**SAMPLING, "prompt": prompt, "max_tokens": tokens, "seed": seed}


def job(streams: list[Job], late: Job | None = None, after: int = 0) -> Job:
    return {"streams": streams, "late": late, "after": after}


def turns(ways: dict[str, Way], count: int, make: Callable[[int], Job]) -> Iterator[dict[str, list[Stream]]]:
    """What the ways make of one job after another; the first, number 0, is warm-up and not among them."""
    for turn in range(count + 1):
        asked = make(turn)
        came = {name: way.run(asked) for name, way in ways.items()}
        for index in range(len(asked["streams"])):
            read = {streams[index].prompt_tokens for streams in came.values()} - {0}
            if len(read) > 1:
                raise RuntimeError(f"the ways read the same prompt as {read} tokens")
        if turn:
            yield came


class Bench:
    """Measures one model, part by part."""

    def __init__(self, name: str, setting: Setting, effort: Effort) -> None:
        self.case, self.setting, self.streams = CASES[name], setting, effort.streams
        self.turns, self.few_turns = effort.turns * self.case.often, effort.few_turns * self.case.often
        self.made, self.running = int(self.case.made * effort.share), int(self.case.running * effort.running_share)
        self.prompts, self.figures = Prompts(), Figures(self.case.title)

    def run(self, parts: list[str]) -> None:
        with all_but_llama_server(self.setting) as ways:
            for part in parts:
                if part != "memory":
                    print(f"{self.case.title}: {part}", file=sys.stderr, flush=True)
                    getattr(self, f"measure_{part}")(ways)
        if "memory" in parts:
            self.measure_memory()

    def measure_rates(self, ways: dict[str, Way]) -> None:
        """All streams start at once. Tokens over the time from the first request to the last end."""
        for count in self.streams:
            rates, gaps = self.figures.rates.setdefault(count, {}), self.figures.gaps.setdefault(count, {})

            def make(turn: int, count: int = count) -> Job:
                return job(self.prompts.requests(count, self.made if turn else 4))

            with and_llama_server(ways, self.setting, count, count * 512) as all_ways:
                for came in turns(all_ways, self.turns, make):
                    for way, streams in came.items():
                        if self.case.endless and {s.tokens for s in streams} != {self.made}:
                            raise RuntimeError(f"{way} makes not {self.made} tokens, but {[s.tokens for s in streams]}")
                        took = max(s.end for s in streams) - min(s.start for s in streams)
                        rates.setdefault(way, []).append(sum(s.tokens for s in streams) / took)
                        gaps.setdefault(way, []).extend(b - a for s in streams for a, b in s.gaps)

    def measure_prefix(self, ways: dict[str, Way]) -> None:
        """A long new prompt, and then one that begins like it."""
        with self._together(ways) as all_ways:
            for turn in range(self.turns + 1):
                prefix = self.prompts.words(self.case.prefix if turn else 8)
                for situation in ("cold", "warm prefix"):
                    asked = job([request(self.prompts.story(prefix), 4)])
                    came = {way: running.run(asked) for way, running in all_ways.items()}
                    if turn:
                        self._note_first(situation, came)

    def measure_load(self, ways: dict[str, Way]) -> None:
        """A short new prompt comes while others generate."""

        def make(turn: int) -> Job:
            running = self.prompts.requests(RUNNING_UNDER_LOAD, self.made if turn else 4)
            return job(running, request(self.prompts.story(), 4), 4)

        with self._together(ways) as all_ways:
            for came in turns(all_ways, self.few_turns, make):
                self._note_first("under load", came)

    def measure_arrival(self, ways: dict[str, Way]) -> None:
        """A long new prompt comes while others generate. Ways that serve one after another have no place here."""

        def make(turn: int) -> Job:
            running = self.prompts.requests(RUNNING_AT_ARRIVAL, self.running if turn else 8)
            late = self.prompts.story(self.prompts.words(self.case.arriving if turn else 8))
            return job(running, request(late, 1), self.case.after if turn else 1)

        with self._together({name: ways[name] for name in (DIRECT, PORT)}) as batching:
            for came in turns(batching, self.few_turns, make):
                for way, (*running, late) in came.items():
                    during, without = split_gaps(running, late)
                    self.figures.arriving.setdefault(way, []).append(percentile(during, 99))
                    self.figures.undisturbed.setdefault(way, []).append(statistics.median(without))

    def measure_memory(self) -> None:
        """Each way alone, since programs that run at once share the pages of the model."""
        most = max(self.streams)
        starters = dict(STARTERS)
        if os.environ.get("LLAMA_SERVER"):
            starters[LLAMA_SERVER] = partial(llama_server, streams=most, cells=CELLS, unified=True)
        asked = job(self.prompts.requests(most, 8))
        for name, start in starters.items():
            with start(self.setting) as way:
                self.figures.memory[name] = [peak_memory(way, asked)]

    def _note_first(self, situation: str, came: dict[str, list[Stream]]) -> None:
        for way, streams in came.items():
            self.figures.first.setdefault(situation, {}).setdefault(way, []).append(streams[-1].first)

    def _together(self, ways: dict[str, Way]) -> AbstractContextManager[dict[str, Way]]:
        """With llama-server for as many streams as these parts have, sharing cells as the scheduler's do."""
        return and_llama_server(ways, self.setting, RUNNING_UNDER_LOAD + 1, CELLS, unified=True)


def split_gaps(running: list[Stream], late: Stream) -> tuple[list[float], list[float]]:
    """Waits between tokens of the running streams that touch the time to the late one's first token, and the others."""
    during, without = [], []
    for begin, end in (gap for stream in running for gap in stream.gaps):
        (during if end > late.start and begin < late.times[0] else without).append(end - begin)
    return during, without


def peak_memory(way: Way, asked: Job) -> float:
    """The most that its processes take while it does a job, looked at twenty times a second."""
    seen = [memory(way)]
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(way.run, asked)
        while not work.done():
            seen.append(memory(way))
            wait([work], 0.05)
        work.result()
    return max(seen)


def measure(arguments: argparse.Namespace) -> dict[str, Figures]:
    """The figures of each model, by its name."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="demandport-bench-") as temporary:
        folder = Path(temporary)
        elixir = beam.compiled(folder)
        paths = {"random": folder / "random.gguf", "tiny": beam.SOURCE / "demandport/data/tiny.gguf"}
        if "random" in arguments.model:
            random_model.write(paths["random"])
        for name in arguments.model:
            setting = Setting(paths[name], CASES[name].context, CASES[name].threads, folder, elixir)
            bench = Bench(name, setting, QUICK if arguments.quick else FULL)
            bench.run(arguments.only)
            found[name] = bench.figures
    return found


def report(found: dict[str, Figures], out: Path | None, complete: bool) -> int:
    """Print, write and draw; returns how many targets are missed."""
    table = Table("what", "demandport", "against", "ratio", "target", quiet=True)
    for name, figures in found.items():
        show(figures)
        add_targets(table, figures, judged=name == "random")
    table.show()
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "inference.json").write_text(json.dumps({name: asdict(figures) for name, figures in found.items()}))
        draw(found, out / "inference.png")
    elif complete:
        draw(found, beam.ROOT / "docs/inference.png")
    return table.missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter turns")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="some parts", metavar="PART")
    parser.add_argument("--model", nargs="+", choices=CASES, default=list(CASES), help="some models")
    parser.add_argument("--out", type=Path, help="folder for the plot and the figures")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    found = measure(arguments)
    complete = not arguments.quick and arguments.only == PARTS and arguments.model == list(CASES)
    return 1 if report(found, arguments.out, complete) else 0


if __name__ == "__main__":
    sys.exit(main())
