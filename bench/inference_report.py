"""What bench/inference.py measures of one model, and how it is judged, printed and drawn."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from table import Table
from ways import COMPLETION, DIRECT, LLAMA_SERVER, NAMES, PORT

ByWay = dict[str, list[float]]
GAPS_AT = 8


@dataclass
class Figures:
    """Of each way a list with an entry for each turn.

    Attributes:
        rates: tokens a second, all streams together, by their number.
        gaps: seconds between two tokens, all turns together, by the number of streams.
        first: seconds to the first token, by situation.
        arriving: seconds between two tokens of running streams while a long prompt arrives, the 99th percentile.
        undisturbed: the median of the same streams without it.
        memory: bytes at the peak.
    """

    title: str
    rates: dict[int, ByWay] = field(default_factory=dict)
    gaps: dict[int, ByWay] = field(default_factory=dict)
    first: dict[str, ByWay] = field(default_factory=dict)
    arriving: ByWay = field(default_factory=dict)
    undisturbed: ByWay = field(default_factory=dict)
    memory: ByWay = field(default_factory=dict)


def percentile(values: list[float], percent: int) -> float:
    """The least of the values that so many percent of them do not exceed."""
    return sorted(values)[-(-len(values) * percent // 100) - 1]


def ratio(ours: list[float], others: list[float]) -> float:
    """The median of the turns' ratios: the machine's speed drifts more than the two may differ."""
    return statistics.median(a / b for a, b in zip(ours, others, strict=True))


# ------------------------------------------------------------------------------------------------------ targets


def add_targets(table: Table, figures: Figures, judged: bool) -> None:
    """A row for each target whose figures are there. What runs in process is set against what does, and what is served
    against what is."""
    rows = _Rows(table, figures, judged)
    for streams in (8, 16):
        rows.rate(streams, PORT, LLAMA_SERVER, 1.2)
    for streams, target in ((1, 1.25), (8, 2.5), (16, 2.5)):
        rows.rate(streams, DIRECT, COMPLETION, target)
    for streams in (1, 8):
        rows.rate(streams, PORT, DIRECT, 0.97)
    rows.prefix(5)
    rows.arrival(3)


class _Rows:
    def __init__(self, table: Table, figures: Figures, judged: bool) -> None:
        self._table, self._figures, self._judged = table, figures, judged

    def rate(self, streams: int, ours: str, other: str, target: float) -> None:
        rates = self._figures.rates.get(streams, {})
        if ours in rates and other in rates:
            found = ratio(rates[ours], rates[other])
            cells = (f"{way} {statistics.median(rates[way]):,.0f}/s" for way in (ours, other))
            self._add(f"tokens, {_streams(streams)}", *cells, f"{found:.2f}", f">= {target}", found >= target)

    def prefix(self, target: float) -> None:
        cold, warm = (self._figures.first.get(situation, {}) for situation in ("cold", "warm prefix"))
        if DIRECT in cold:
            found = ratio(cold[DIRECT], warm[DIRECT])
            cells = (f"{name} {_ms(times[DIRECT])} ms" for name, times in (("warm", warm), ("cold", cold)))
            self._add("first token, prefix known", *cells, f"{found:.1f}", f">= {target}", found >= target)

    def arrival(self, target: float) -> None:
        p99, median = self._figures.arriving.get(DIRECT), self._figures.undisturbed.get(DIRECT)
        if p99 and median:
            found = ratio(p99, median)
            cells = (f"p99 {_ms(p99)} ms", f"median without {_ms(median)} ms")
            self._add("between tokens, prompt arrives", *cells, f"{found:.2f}", f"<= {target}", found <= target)

    def _add(self, what: str, ours: str, other: str, found: str, target: str, passed: bool) -> None:
        what = f"{what}, {self._figures.title}"
        if self._judged:
            self._table.add(what, ours, other, found, target, passed=passed)
        else:
            self._table.add(what, ours, other, found)


# ------------------------------------------------------------------------------------------------------- tables


def show(figures: Figures) -> None:
    """Print medians, a row for each way."""
    ways = [name for name in NAMES if any(name in by_way for by_way in _all(figures))]
    if figures.rates:
        table = Table(f"{figures.title}: tokens/s", *map(_streams, figures.rates), quiet=True)
        for way in ways:
            table.add(way, *(_cell(by_way.get(way), ",.0f") for by_way in figures.rates.values()))
        table.show()
        print()
    situations = list(figures.first)
    head = [*(f"first token, {situation}" for situation in situations), f"p50, {GAPS_AT} streams", "p99"]
    table = Table(f"{figures.title}: ms", *head, "p99, prompt arrives", "median without", "peak MiB", quiet=True)
    for way in ways:
        gaps = figures.gaps.get(GAPS_AT, {}).get(way)
        table.add(
            way,
            *(_ms(figures.first[situation].get(way)) for situation in situations),
            *(_ms([percentile(gaps, percent)] if gaps else None) for percent in (50, 99)),
            _ms(figures.arriving.get(way)),
            _ms(figures.undisturbed.get(way)),
            _cell(figures.memory.get(way), ",.0f", 1 / 2**20),
        )
    table.show()
    print()


def _all(figures: Figures) -> list[ByWay]:
    return [*figures.rates.values(), *figures.first.values(), figures.arriving, figures.memory]


def _streams(count: int) -> str:
    return f"{count} stream" if count == 1 else f"{count} streams"


def _ms(seconds: list[float] | None) -> str:
    return _cell(seconds, ",.1f", 1e3)


def _cell(values: list[float] | None, form: str, factor: float = 1.0) -> str:
    return format(statistics.median(values) * factor, form) if values else "-"


# --------------------------------------------------------------------------------------------------------- plot


def draw(all_figures: Mapping[str, Figures], path: Path) -> None:
    """Tokens a second over streams, and times to the first token; a column for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, len(all_figures), figsize=(6 * len(all_figures), 8), squeeze=False)
    for (above, below), figures in zip(grid.T, all_figures.values(), strict=True):
        above.set(title=figures.title, xlabel="streams", ylabel="tokens/s, all together", xscale="log")
        for way in NAMES:
            points = [(count, statistics.median(rates[way])) for count, rates in figures.rates.items() if way in rates]
            above.plot(*zip(*points, strict=True) if points else ([], []), marker="o", label=way)
        above.set_xticks(list(figures.rates), list(map(str, figures.rates)))
        above.minorticks_off()
        above.set_ylim(bottom=0)
        below.set(ylabel="ms to the first token", yscale="log")
        width = 0.8 / len(NAMES)
        for index, way in enumerate(NAMES):
            bars = [
                (place + index * width, statistics.median(times[way]) * 1e3)
                for place, times in enumerate(figures.first.values())
                if way in times
            ]
            below.bar(*zip(*bars, strict=True) if bars else ([], []), width, label=way)
        below.set_xticks([place + 0.4 - width / 2 for place in range(len(figures.first))], list(figures.first))
    grid[0, 0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
