"""A scheduler for tests on a real model, and what it has said of each request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import llama_cpp

from demandport.inference.requests import GenerateRequest
from demandport.llama.model import Model
from demandport.llama.scheduler import Scheduler


class Chunks:
    """A `Pace` that always gives prompts the same number of tokens, whatever the clock says."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens

    def prompt_tokens(self, *_: int) -> int:
        return self._tokens

    def took(self, *_: object) -> None:
        pass


class Bench:
    """A scheduler with a clock that stands still unless it is moved.

    Args:
        chunk: tokens of prompts in a step; None: as the scheduler paces them.
    """

    def __init__(self, model: Model, chunk: int | None = None) -> None:
        self.model = model
        self.said: dict[int, list[list[Any]]] = {}
        self.order: list[int] = []
        self.now = 0.0
        self.scheduler = Scheduler(model, self._hear, lambda: self.now)
        if chunk is not None:
            self.scheduler._pace = Chunks(chunk)  # type: ignore[assignment]

    def _hear(self, message: list[Any]) -> None:
        self.said.setdefault(message[1], []).append(message)
        if message[0] in ("done", "error"):
            self.order.append(message[1])

    def raw(self, id: int, prompt: str, tokens: int = 10, **parameters: Any) -> None:
        """Submit a prompt without a template, greedy unless `parameters` say else."""
        options = {"prompt": prompt, "raw": True, "max_tokens": tokens, "temperature": 0} | parameters
        self.scheduler.submit(id, GenerateRequest.from_options(options))

    def run(self, steps: int = 10_000) -> None:
        while steps and self.scheduler.step():
            steps -= 1

    def text(self, id: int) -> str:
        return "".join(message[2] for message in self.said.get(id, []) if message[0] == "chunk")

    def end(self, id: int) -> str:
        """How it ended, with the code of an error; exactly once, with nothing after it."""
        kinds = [message[0] for message in self.said[id]]
        assert kinds[-1] in ("done", "error") and not {"done", "error"} & set(kinds[:-1])
        return str(self.said[id][-1][2]["code"] if kinds[-1] == "error" else "done")

    def result(self, id: int) -> dict[str, Any]:
        assert self.end(id) == "done", self.said[id][-1]
        found: dict[str, Any] = self.said[id][-1][2]
        return found

    def sequence(self, id: int) -> Any:
        """What runs or waits under that id."""
        return next(one for one in (*self.scheduler._running, *self.scheduler._waiting) if one.id == id)

    def is_empty(self) -> bool:
        """Every slot and every cell is free again, and llama.cpp holds nothing but what was left."""
        self.check()
        cells = self.scheduler._cells
        free = len(cells.free), cells.free_cells
        scheduler = self.scheduler
        done = not scheduler._running and not scheduler._waiting
        return free == (self.model.sequences, self.model.cells) and done

    def check(self) -> None:
        """What holds between two steps: the cells are counted right, and llama.cpp holds what the slots say."""
        cells = self.scheduler._cells
        assert Counter(slot.number for slot in (*cells.free, *cells.taken)) == Counter(range(self.model.sequences))
        assert cells.free_cells + sum(slot.cells for slot in cells.taken) == self.model.cells
        assert 0 <= sum(slot.placed for slot in cells.free) <= cells.free_cells
        assert all(slot.placed <= slot.cells for slot in cells.taken)
        assert {slot.number for slot in cells.taken} == {one.slot.number for one in self.scheduler._running}
        for slot in (*cells.free, *cells.taken):
            assert held(self.model, slot.number) == slot.placed <= len(slot.tokens)


def held(model: Model, sequence: int) -> int:
    """How many cells llama.cpp has for a sequence; they are positions from 0 on."""
    memory = llama_cpp.llama_get_memory(model.context)
    first = llama_cpp.llama_memory_seq_pos_min(memory, sequence)
    last = llama_cpp.llama_memory_seq_pos_max(memory, sequence)
    assert (first, last) == (-1, -1) or first == 0
    return int(last) + 1


@contextmanager
def decodes(model: Model, before: Callable[[], None] = lambda: None) -> Iterator[list[int]]:
    """The number of tokens of each decode in the block; `before` is called before each."""
    sizes: list[int] = []
    decode = model.decode

    def counted() -> None:
        sizes.append(model.batch.size)
        before()
        decode()

    model.decode = counted  # type: ignore[method-assign]
    try:
        yield sizes
    finally:
        del model.decode
