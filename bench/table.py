"""The table that a benchmark prints at its end."""

from __future__ import annotations

import sys


class Table:
    """Rows of cells under a head; the last column says whether a target is met, where there is one.

    Args:
        quiet: say nothing on stderr when a row is added.
    """

    def __init__(self, *head: str, quiet: bool = False) -> None:
        self._head, self._quiet = (*head, ""), quiet
        self._rows: list[tuple[str, ...]] = []
        self.missed = 0

    def add(self, *cells: str, passed: bool | None = None) -> None:
        """Add a row, of as many cells as there are; what is missing stays empty."""
        self.missed += passed is False
        verdict = "" if passed is None else "PASS" if passed else "FAIL"
        self._rows.append((*cells, *("" for _ in self._head[len(cells) + 1 :]), verdict))
        if not self._quiet:
            print(f"  {cells[0]}: {cells[1]} {verdict}", file=sys.stderr, flush=True)

    def show(self) -> None:
        """Print it."""
        widths = [max(len(row[i]) for row in [self._head, *self._rows]) for i in range(len(self._head))]
        for row in [self._head, tuple("-" * width for width in widths), *self._rows]:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
