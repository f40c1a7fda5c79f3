"""Continuous batching on the real model: what joins, leaves or is cancelled meanwhile changes no other's tokens."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demandport.inference.library import tiny_path
from demandport.inference.requests import GenerateRequest
from demandport.llama.model import Model
from demandport.llama.scheduler import Scheduler

PROMPTS = [
    "Tell me about cats.",
    "Tell a story about a lighthouse.",
    "What is bread?",
    "Tell me about owls. " * 30,
    "Hello",
]
SEQUENCES = 3


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    found = Model(tiny_path(), sequences=SEQUENCES)
    yield found
    found.close()


class Bench:
    """A scheduler, and what it has said of each request."""

    def __init__(self, model: Model) -> None:
        self.said: dict[int, list[list[Any]]] = {}
        self.scheduler = Scheduler(model, lambda message: self.said.setdefault(message[1], []).append(message))
        self.asked: dict[int, int] = {}

    def submit(self, id: int, prompt: int, tokens: int = 25, **parameters: Any) -> None:
        self.asked[id] = prompt
        options = {"prompt": PROMPTS[prompt], "max_tokens": tokens, "temperature": 0} | parameters
        self.scheduler.submit(id, GenerateRequest.from_options(options))

    def run(self, steps: int = 10_000) -> None:
        while steps and self.scheduler.step():
            steps -= 1

    def text(self, id: int) -> str:
        return "".join(message[2] for message in self.said.get(id, []) if message[0] == "chunk")

    def end(self, id: int) -> str:
        """How it ended; exactly once, with nothing after it."""
        kinds = [message[0] for message in self.said[id]]
        assert kinds[-1] in ("done", "error") and not {"done", "error"} & set(kinds[:-1])
        return str(kinds[-1])

    def is_empty(self) -> bool:
        """Every slot and every cell is free again."""
        scheduler = self.scheduler
        free = len(scheduler._cells.free), scheduler._cells.free_cells
        return free == (scheduler._model.sequences, scheduler._model.cells) and not scheduler.busy


@pytest.fixture(scope="module")
def alone(model: Model) -> Any:
    """The text that a prompt gives when nothing else runs."""

    @cache
    def text(prompt: int, seed: int | None = None) -> str:
        bench = Bench(model)
        bench.submit(1, prompt, **({} if seed is None else {"seed": seed, "temperature": 0.8}))
        bench.run()
        assert bench.end(1) == "done" and bench.is_empty()
        return bench.text(1)

    return text


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(0, len(PROMPTS) - 1)),
        st.tuples(st.just("cancel"), st.integers(0, 9)),
        st.tuples(st.just("steps"), st.integers(1, 12)),
    ),
    min_size=3,
    max_size=16,
)


@given(actions=ACTIONS)
def test_nobody_else_changes_what_is_generated(model: Model, alone: Any, actions: list[tuple[str, int]]) -> None:
    bench, cancelled = Bench(model), set()
    for kind, number in actions:
        if kind == "submit":
            bench.submit(len(bench.asked) + 1, number)
        elif kind == "steps":
            bench.run(number)
        elif number in bench.asked:
            bench.scheduler.settle_cancel(number)
            cancelled.add(number)
    bench.run()
    assert bench.is_empty()
    for id, prompt in bench.asked.items():
        if bench.end(id) == "done":
            assert bench.text(id) == alone(prompt)
        else:
            assert id in cancelled and alone(prompt).startswith(bench.text(id))


def test_a_seed_gives_the_same_in_any_company(model: Model, alone: Any) -> None:
    bench = Bench(model)
    for id, prompt in enumerate([0, 1, 2, 1, 0], 1):
        bench.submit(id, prompt, seed=5, temperature=0.8)
    bench.run()
    assert [bench.text(id) for id in bench.asked] == [alone(prompt, 5) for prompt in bench.asked.values()]


def test_several_run_in_one_decode(model: Model) -> None:
    bench, sizes = Bench(model), []
    decode = model.decode
    model.decode = lambda: sizes.append(model.batch.size) or decode()  # type: ignore[method-assign, func-returns-value]
    try:
        for id in range(1, 6):
            bench.submit(id, 1, tokens=10)
        bench.run()
    finally:
        del model.decode
    assert sizes.count(SEQUENCES) >= 9 and len(sizes) < 5 * 10
    assert all(bench.end(id) == "done" for id in range(1, 6)) and bench.is_empty()


def test_a_long_prompt_joins_in_small_steps_beside_those_that_generate(model: Model) -> None:
    bench = Bench(model)
    bench.submit(1, 1, tokens=40)
    bench.run(3)
    generated = len(bench.scheduler._running) and bench.scheduler._running[0].generated
    bench.submit(2, 3)
    bench.run(2)
    first, second = bench.scheduler._running
    assert first.generated == generated + 2 and 0 < second.slot.placed < len(second.prompt)
    bench.run()
    assert bench.end(1) == bench.end(2) == "done" and bench.is_empty()


def test_a_context_for_many_brings_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    """Together they have more cells than the model was trained with, each of them has not."""
    Model(tiny_path(), sequences=16).close()
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_prompt_that_has_begun_before_is_computed_from_there(model: Model, alone: Any) -> None:
    bench, sizes = Bench(model), []
    decode = model.decode
    model.decode = lambda: sizes.append(model.batch.size) or decode()  # type: ignore[method-assign, func-returns-value]
    try:
        for id in (1, 2):
            bench.submit(id, 3, tokens=1)
            bench.run()
            sizes.append(0)
    finally:
        del model.decode
    first, second = sizes[: sizes.index(0)], sizes[sizes.index(0) + 1 : -1]
    assert sum(first) > 200 and sum(second) == 1
    assert bench.text(1) == bench.text(2) and alone(3).startswith(bench.text(2)) and bench.is_empty()


@pytest.mark.parametrize("tokens", [1, 7])
def test_a_prompt_that_goes_on_from_an_answer_is_read_like_any_other(model: Model, tokens: int) -> None:
    begin = "Once upon a time"
    bench = Bench(model)
    bench.scheduler.submit(1, GenerateRequest(prompt=begin, raw=True, max_tokens=tokens, temperature=0))
    bench.run()
    whole = GenerateRequest(prompt=f"{begin}{bench.text(1)} and then", raw=True, max_tokens=20, temperature=0)
    bench.scheduler.submit(2, whole)
    bench.run()
    fresh = Bench(model)
    fresh.scheduler.submit(2, whole)
    fresh.run()
    assert bench.text(2) == fresh.text(2) and bench.is_empty()


def test_what_is_left_in_cells_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("demandport.llama.model.SHARED_CELLS", 512)
    model = Model(tiny_path(), sequences=3)
    try:
        bench = Bench(model)
        bench.submit(1, 3, tokens=5)
        bench.submit(2, 1, tokens=20)
        bench.run()
        bench.submit(3, 1, tokens=460, grammar="root ::= [^ ]{1000}")
        bench.run()
        assert [bench.end(id) for id in (1, 2, 3)] == ["done"] * 3 and bench.is_empty()
        assert bench.said[3][-1][2]["usage"]["completion_tokens"] > 300
    finally:
        model.close()
