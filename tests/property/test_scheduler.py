"""Continuous batching on the real model: what joins, leaves or is cancelled meanwhile changes no other's tokens."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("llama_cpp")
import llama_cpp

import batching
from batching import decodes
from demandport.inference.library import tiny_path
from demandport.inference.requests import GenerateRequest
from demandport.llama.cells import WORTH_COPYING
from demandport.llama.model import Model
from support import count

PROMPTS = [
    "Tell me about cats.",
    "Tell a story about a lighthouse.",
    "What is bread?",
    "Tell me about owls. " * 30,
    "Hello",
]
SEQUENCES = 3
DEFAULTS = llama_cpp.llama_context_default_params
GGML_TYPE_F32 = 0


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    found = Model(tiny_path(), sequences=SEQUENCES, threads=1)
    yield found
    found.close()


class Bench(batching.Bench):
    """Prompts by number, as chats; most of `PROMPTS`."""

    def __init__(self, model: Model, chunk: int | None = None) -> None:
        super().__init__(model, chunk)
        self.asked: dict[int, int] = {}

    def submit(self, id: int, prompt: int, tokens: int = 25, **parameters: Any) -> None:
        self.asked[id] = prompt
        options = {"prompt": PROMPTS[prompt], "max_tokens": tokens, "temperature": 0} | parameters
        self.scheduler.submit(id, GenerateRequest.from_options(options))


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
            assert bench.end(id) == "cancelled" and id in cancelled and alone(prompt).startswith(bench.text(id))


def test_a_seed_gives_the_same_in_any_company(model: Model, alone: Any) -> None:
    bench = Bench(model)
    for id, prompt in enumerate([0, 1, 2, 1, 0], 1):
        bench.submit(id, prompt, seed=5, temperature=0.8)
    bench.run()
    assert [bench.text(id) for id in bench.asked] == [alone(prompt, 5) for prompt in bench.asked.values()]


def test_several_run_in_one_decode(model: Model) -> None:
    bench = Bench(model)
    with decodes(model) as sizes:
        for id in range(1, 6):
            bench.submit(id, 1, tokens=10)
        bench.run()
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
    bench = Bench(model)
    with decodes(model) as sizes:
        for id in (1, 2):
            bench.submit(id, 3, tokens=1)
            bench.run()
            sizes.append(0)
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
    model = Model(tiny_path(), sequences=3, threads=1)
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


# ----------------------------------------------------------------------------------- shared beginnings, in company


OWLS = "Tell me about owls and where they live. " * 30
CATS = "Cats sleep all day and hunt at night. " * 25
THEN = " there was a small owl who"
#: Prompts without a template that share long beginnings; whole ones, parts of them, and other ends.
FAMILIES = [
    *(text[:end] + rest for text in (OWLS, CATS) for end in (150, 300, 340, 450) for rest in ("", THEN)),
    "Once upon a time",
    "",
]
#: Slots, cells that they share, and the most for one: for one alone, too few for all, enough for all.
SIZES = [(1, 256, 256), (2, 512, 256), (3, 768, 256), (5, 512, 256), (16, 1024, 256)]


def exact() -> Any:
    """Parameters of a context that keeps 32-bit floats. With 16 bits, rounding hangs on who else was in a decode, and a
    token that is drawn, not the most likely one, can be another when its number falls on a border."""
    found = DEFAULTS()
    found.type_k = found.type_v = GGML_TYPE_F32
    found.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return found


@pytest.fixture(scope="module")
def models() -> Iterator[Callable[[tuple[int, int, int]], Model]]:
    """A model of each size, loaded once."""
    loaded: dict[tuple[int, int, int], Model] = {}

    def found(size: tuple[int, int, int]) -> Model:
        if size not in loaded:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("demandport.llama.model.SHARED_CELLS", size[1])
                patch.setattr("llama_cpp.llama_context_default_params", exact)
                loaded[size] = Model(tiny_path(), threads=1, sequences=size[0], context_length=size[2])
        return loaded[size]

    yield found
    for model in loaded.values():
        model.close()


@pytest.fixture(scope="module")
def family_alone(models: Any) -> Any:
    """The text of a prompt of `FAMILIES` when nothing else runs, of some seed or greedy."""

    @cache
    def text(prompt: int, seed: int | None = None) -> str:
        bench = batching.Bench(models(SIZES[0]))
        bench.raw(1, FAMILIES[prompt], 12, **chance(seed))
        bench.run()
        assert bench.end(1) == "done" and bench.is_empty()
        return bench.text(1)

    return text


def chance(seed: int | None) -> dict[str, Any]:
    return {} if seed is None else {"seed": seed, "temperature": 1.2}


COMPANY = st.lists(
    st.one_of(
        st.tuples(
            st.just("submit"),
            st.integers(0, len(FAMILIES) - 1),
            st.sampled_from([None, None, 3, 4]),
            st.fixed_dictionaries(
                {"priority": st.sampled_from([0, 0, 0, 5, -5])},
                optional={"deadline_ms": st.sampled_from([10, 30]), "logprobs": st.just(2)},
            ),
        ),
        st.tuples(st.sampled_from(["cancel", "cancel from elsewhere"]), st.integers(0, 5)),
        st.tuples(st.just("steps"), st.integers(1, 12)),
        st.tuples(st.just("time"), st.integers(1, 20)),
    ),
    min_size=4,
    max_size=24,
)


class Company:
    """Requests for prompts of `FAMILIES` that come, run, are cancelled and expire."""

    def __init__(self, model: Model, chunk: int) -> None:
        self.bench = batching.Bench(model, chunk)
        #: Prompt, seed and deadline of each.
        self.asked: dict[int, tuple[int, int | None, float]] = {}
        self.cancelled: set[int] = set()

    def act(self, kind: str, *facts: Any) -> None:
        bench = self.bench
        if kind == "submit":
            prompt, seed, options = facts
            id = len(self.asked) + 1
            self.asked[id] = prompt, seed, bench.now + options.get("deadline_ms", 1e9) / 1000
            bench.raw(id, FAMILIES[prompt], 12, **chance(seed), **options)
        elif kind == "steps":
            for _ in range(facts[0]):
                bench.run(1)
                bench.check()
        elif kind == "time":
            bench.now += facts[0] / 1000
        elif len(self.asked) > facts[0]:  # one of the last that came
            id = len(self.asked) - facts[0]
            self.cancelled.add(id)
            bench.scheduler.cancel(id) if "from" in kind else bench.scheduler.settle_cancel(id)
            bench.check()

    def each_got_its_own(self, alone: Any) -> None:
        bench = self.bench
        bench.run()
        assert bench.is_empty()
        for id, (prompt, seed, deadline) in self.asked.items():
            end, expected = bench.end(id), alone(prompt, seed)
            if end == "done":
                assert bench.text(id) == expected
                continue
            assert expected.startswith(bench.text(id))
            assert id in self.cancelled if end == "cancelled" else end == "deadline_exceeded" and bench.now >= deadline


@given(company=COMPANY, size=st.sampled_from(SIZES), chunk=st.sampled_from([8, 40, 240]))
def test_prompts_that_begin_alike_share_cells_and_nothing_else(
    models: Any, family_alone: Any, company: list[Any], size: tuple[int, int, int], chunk: int
) -> None:
    tested = Company(models(size), chunk)
    for action in company:
        tested.act(*action)
    tested.each_got_its_own(family_alone)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("round", range(count(3, 200)))
def test_in_a_crowd_too(models: Any, family_alone: Any, size: tuple[int, int, int], round: int) -> None:
    """So many that slots and cells are short all the time, and what was left is thrown out."""
    numbers = random.Random(f"{size} {round}")
    tested = Company(models(size), numbers.choice([8, 40, 240]))
    for _ in range(40):
        for _ in range(numbers.randint(0, 3)):
            options = {"priority": numbers.choice([0, 0, 5])}
            if numbers.random() < 0.1:
                options["deadline_ms"] = 30
            tested.act("submit", numbers.randrange(len(FAMILIES)), numbers.choice([None, 3]), options)
        tested.act("time", 3)
        tested.act("steps", numbers.randint(1, 9))
        if numbers.random() < 0.4:
            tested.act(numbers.choice(["cancel", "cancel from elsewhere"]), numbers.randint(0, 3))
    tested.each_got_its_own(family_alone)


@pytest.fixture
def three(models: Any) -> Model:
    found: Model = models((3, 1536, 512))
    return found


def prompt_tokens(model: Model, *prompts: str) -> list[list[int]]:
    return [[model.begin, *model.tokenize(prompt, special=True)] for prompt in prompts]


def generated(bench: batching.Bench, *ids: int) -> int:
    """Tokens that were decoded after the prompts: the last one of each never is."""
    return sum(bench.result(id)["usage"]["completion_tokens"] - 1 for id in ids)


def shared(first: list[int], second: list[int]) -> int:
    return next(place for place, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1])


def test_one_waits_for_what_another_is_reading_and_copies_it(three: Model) -> None:
    bench, prompts = batching.Bench(three, chunk=16), (OWLS[:900] + THEN, OWLS[:900] + " one evening")
    first, second = prompt_tokens(three, *prompts)
    with decodes(three) as sizes:
        bench.raw(1, prompts[0], 5)
        bench.run(2)
        bench.raw(2, prompts[1], 5)
        bench.run(1)
        assert bench.sequence(2).slot.source is bench.sequence(1).slot and bench.sequence(2).slot.placed == 0
        bench.run()
    spared = shared(first, second)
    assert spared > 150 and bench.result(2)["usage"]["cached_tokens"] == spared
    assert sum(sizes) == len(first) + (len(second) - spared) + generated(bench, 1, 2)
    assert bench.is_empty()


def test_one_copies_from_another_that_generates(three: Model) -> None:
    bench, prompts = batching.Bench(three, chunk=256), (OWLS[:900] + THEN, OWLS[:900] + " one evening")
    first, second = prompt_tokens(three, *prompts)
    bench.raw(1, prompts[0], 60, grammar="root ::= [a-z ]{300}")
    bench.run(3)
    bench.raw(2, prompts[1], 1)
    with decodes(three) as sizes:
        bench.run(1)
    assert bench.end(2) == "done" and sizes == [1 + len(second) - shared(first, second)]
    bench.run()
    assert bench.end(1) == "done" and bench.is_empty()


def test_when_the_one_that_reads_is_cancelled_the_one_that_waits_goes_on_from_there(three: Model) -> None:
    bench, prompts = batching.Bench(three, chunk=16), (OWLS[:900] + THEN, OWLS[:900] + " one evening")
    second = prompt_tokens(three, prompts[1])[0]
    bench.raw(1, prompts[0], 5)
    bench.raw(2, prompts[1], 5)
    with decodes(three) as sizes:
        bench.run(4)
        assert bench.sequence(1).slot.placed == 64 and bench.sequence(2).slot.placed == 0
        bench.scheduler.settle_cancel(1)
        assert bench.sequence(2).slot.placed == 64
        bench.run()
    assert bench.result(2)["usage"]["cached_tokens"] == 64 and sum(sizes) == len(second) + generated(bench, 2)
    assert bench.end(1) == "cancelled" and bench.is_empty()


def test_one_of_three_that_wait_for_each_other_leaves(three: Model) -> None:
    """The second waits for the first, the third for the second; whoever leaves, the others' text is their own."""
    prompts = (OWLS[:500], OWLS[:900] + THEN, OWLS[:900] + " one evening")
    texts = []
    for prompt in prompts:
        bench = batching.Bench(three)
        bench.raw(1, prompt)
        bench.run()
        texts.append(bench.text(1))
    for leaves in (1, 2, 3):
        for after in (1, 4, 9):
            bench = batching.Bench(three, chunk=16)
            for id, prompt in enumerate(prompts, 1):
                bench.raw(id, prompt)
            bench.run(after)
            bench.scheduler.settle_cancel(leaves)
            bench.check()
            bench.run()
            assert [bench.text(id) for id in (1, 2, 3) if id != leaves] == [
                text for id, text in enumerate(texts, 1) if id != leaves
            ]
            assert bench.is_empty()


def test_little_that_is_shared_is_not_waited_for(three: Model) -> None:
    bench = batching.Bench(three, chunk=8)
    bench.raw(1, "Once upon a time there was a small owl who lived in a tall tree", 5)
    bench.raw(2, "Once upon a time there was a tall man", 5)
    bench.run(1)
    assert shared(bench.sequence(1).prompt, bench.sequence(2).prompt) < WORTH_COPYING
    assert bench.sequence(2).slot.source is None
    bench.run()
    assert bench.is_empty()


# ------------------------------------------------------------------------------------------------- who comes first


@pytest.fixture
def one(models: Any) -> Model:
    found: Model = models((1, 512, 512))
    return found


def test_those_that_wait_come_by_priority_then_by_arrival(one: Model) -> None:
    bench = batching.Bench(one)
    bench.raw(1, "Hello", 3)
    bench.run(1)
    for id, priority in enumerate([0, 5, -3, 5, 100, 0, -100], 2):
        bench.raw(id, "Hello", 2, priority=priority)
    bench.run()
    assert bench.order == [1, 6, 3, 5, 2, 7, 4, 8] and bench.is_empty()


def test_one_that_finds_no_room_is_not_overtaken_by_smaller_ones(models: Any) -> None:
    bench = batching.Bench(models((2, 700, 512)))
    bench.raw(1, "Hello", 400, grammar="root ::= [a-z ]{600}")
    bench.run(1)
    bench.raw(2, "Hello again", 450)
    for id in (3, 4):
        bench.raw(id, "Hello", 1)
    bench.run(5)
    assert bench.order == [] and len(bench.scheduler._running) == 1
    bench.raw(5, "Hello", 1, priority=1)
    bench.run(1)
    assert bench.order == [5], "one of higher priority may"
    bench.run()
    assert bench.order.index(1) < min(map(bench.order.index, (3, 4))) and bench.is_empty()


@pytest.mark.parametrize("more", [0, 1])
def test_one_joins_when_all_it_may_become_fits_and_not_before(models: Any, more: int) -> None:
    model = models((2, 768, 512))
    bench, tokens = batching.Bench(model), len(prompt_tokens(model, "Hello")[0])
    bench.raw(1, "Hello", 400 - tokens, grammar="root ::= [a-z ]{600}")
    bench.raw(2, "Hello", model.cells - 400 - tokens + more, grammar="root ::= [a-z ]{600}")
    bench.run(3)
    assert len(bench.scheduler._running) == 2 - more
    bench.check()
    bench.run()
    assert bench.end(1) == bench.end(2) == "done" and bench.is_empty()


def test_too_long_a_prompt_is_refused_before_work_while_all_slots_are_taken(one: Model) -> None:
    bench = batching.Bench(one)
    bench.raw(1, "Hello", 100, grammar="root ::= [a-z ]{300}")
    bench.run(2)
    bench.raw(2, "Hello", 2)
    for id, options in {3: {"prompt": OWLS * 9}, 4: {"prompt": "Hello", "tokens": 512}}.items():
        bench.raw(id, **options)  # type: ignore[arg-type]
    with decodes(one) as sizes:
        bench.run(3)
    assert sizes == [1, 1, 1] and bench.order == [3, 4]
    for id in (3, 4):
        facts = bench.said[id][-1][2]
        assert facts["code"] == "context_overflow" and facts["details"]["context_length"] == 512
        assert facts["details"]["prompt_tokens"] + facts["details"]["max_tokens"] > 512
    bench.run()
    assert bench.end(1) == bench.end(2) == "done" and bench.is_empty()


def test_the_whole_context_can_be_used_and_not_one_token_more(one: Model) -> None:
    tokens = len(prompt_tokens(one, "Hello")[0])
    for more, end in ((0, "done"), (1, "context_overflow")):
        bench = batching.Bench(one)
        bench.raw(1, "Hello", 512 - tokens + more, grammar="root ::= [a-z]{1000}")
        bench.run()
        assert bench.end(1) == end and bench.is_empty()


def test_a_request_that_cannot_begin_fails_alone(three: Model) -> None:
    bench = batching.Bench(three)
    bench.raw(1, "Hello", 20)
    bench.raw(2, "Hello", 20, grammar="root ::= nowhere")
    bench.raw(3, "Hello", 20)
    bench.run()
    assert (bench.end(2), bench.text(1)) == ("type_mismatch", bench.text(3)) and bench.is_empty()


def test_a_deadline_ends_those_that_wait_and_those_that_run(one: Model) -> None:
    bench = batching.Bench(one)
    bench.raw(1, "Hello", 50, deadline_ms=100)
    bench.raw(2, "Hello", 50, deadline_ms=50)
    bench.raw(3, "Hello", 1)
    bench.run(3)
    bench.now = 0.0999
    bench.run(1)
    assert bench.order == [2]
    bench.now = 0.1
    bench.run(1)
    assert bench.order == [2, 1, 3] or bench.order[:2] == [2, 1]
    bench.run()
    assert [bench.end(id) for id in (1, 2, 3)] == ["deadline_exceeded", "deadline_exceeded", "done"]
    assert len(bench.text(1)) > 0 and bench.text(2) == "" and bench.is_empty()


# --------------------------------------------------------------------------------------------------------- cancels


def test_after_ten_thousand_cancels_everything_is_free(models: Any, family_alone: Any) -> None:
    model, numbers = models(SIZES[-1]), random.Random(5)
    bench, id, cancelled = batching.Bench(model, chunk=32), 0, 0
    while cancelled < count(10_000, 100_000):
        ids = range(id + 1, id + 1 + numbers.randint(1, 24))
        id = ids[-1]
        for one in ids:
            bench.raw(one, FAMILIES[numbers.randrange(len(FAMILIES))], 12, priority=numbers.randint(0, 1))
        bench.run(numbers.randint(0, 3))
        for one in numbers.sample(ids, len(ids)):
            if numbers.random() < 0.06:
                bench.run(numbers.randint(1, 3))
            (bench.scheduler.cancel if numbers.random() < 0.3 else bench.scheduler.settle_cancel)(one)
        bench.run(1)
        bench.check()
        cancelled += sum(bench.end(one) == "cancelled" for one in ids)
        for one in ids:
            bench.scheduler.settle_cancel(one)
        bench.said.clear()
    assert bench.is_empty() and not bench.scheduler._cancelled and bench.scheduler._unread == 0
    for prompt in range(len(FAMILIES)):
        bench.raw(id + 1 + prompt, FAMILIES[prompt], 12)
    bench.run()
    for prompt in range(len(FAMILIES)):
        assert bench.text(id + 1 + prompt) == family_alone(prompt)
    assert bench.is_empty()


def test_after_cancels_llama_cpp_has_every_cell(three: Model) -> None:
    """As many tokens as there are cells are computed together: none of them was lost."""
    assert three.cells == 3 * three.context_length
    bench = batching.Bench(three)
    for id in range(1, 10):
        bench.raw(id, FAMILIES[id], 12)
    bench.run(4)
    for id in range(1, 10):
        bench.scheduler.settle_cancel(id)
    assert bench.is_empty()
    tokens = len(prompt_tokens(three, "Hello")[0])
    for id in (11, 12, 13):
        bench.raw(id, "Hello", three.context_length - tokens, grammar="root ::= [a-z]{1000}")
    bench.run()
    assert [bench.result(id)["finish_reason"] for id in (11, 12, 13)] == ["length"] * 3 and bench.is_empty()


def test_what_was_left_in_turns_is_put_in_order_while_nothing_runs(model: Model, alone: Any) -> None:
    bench = Bench(model)
    for id in (1, 2, 3):
        bench.submit(id, id - 1)
    while not bench.scheduler._cells.untidy:
        bench.scheduler.step()
    with decodes(model) as sizes:
        bench.run()
        assert not sizes and not bench.scheduler.busy, "no decode was needed"
        for id in (4, 5, 6):
            bench.submit(id, id - 4)
            bench.run()
    assert [bench.text(id) for id in (4, 5, 6)] == [alone(prompt) for prompt in (0, 1, 2)] and bench.is_empty()
    usages = [bench.result(id)["usage"] for id in (4, 5, 6)]
    assert all(usage["cached_tokens"] == usage["prompt_tokens"] - 1 for usage in usages)


def test_putting_in_order_is_broken_off_for_whoever_comes(model: Model, alone: Any) -> None:
    bench = Bench(model)
    for id in (1, 2, 3):
        bench.submit(id, id - 1)
    while not bench.scheduler._cells.untidy:
        bench.scheduler.step()
    bench.run(2)
    assert bench.scheduler._cells.untidy
    bench.submit(4, 1)
    bench.run()
    assert bench.text(4) == alone(1) and bench.is_empty()


def test_a_prompt_that_comes_again_fills_no_other_slot(model: Model) -> None:
    bench = Bench(model)
    for id in range(1, 6):
        bench.submit(id, 0)
        bench.run()
    assert sum(slot.placed > 0 for slot in bench.scheduler._cells.free) == 1
