"""Who holds which cells, on a model that keeps llama.cpp's rules and remembers what each cell was computed from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("llama_cpp")
from demandport.llama.cells import WORTH_COPYING, Cells, Slot, shared_tokens


class Memory:
    """In place of a `Model`: a cell is (all tokens up to there, adapters); sequences may share it."""

    def __init__(self, sequences: int, cells: int, parts: bool = True) -> None:
        self.sequences, self.cells, self.forgets_parts = sequences, cells, parts
        self.held: list[list[tuple[tuple[int, ...], Any]]] = [[] for _ in range(sequences)]
        self.computed = 0

    def forget(self, sequence: int, start: int = -1) -> bool:
        if start > 0 and not self.forgets_parts:
            return False
        del self.held[sequence][max(0, start) :]
        return True

    def copy(self, source: int, target: int, count: int) -> None:
        assert source != target and self.forgets_parts
        assert not self.held[target], "llama.cpp would mix them"
        assert 0 < count <= len(self.held[source]), "there are not as many to copy"
        self.held[target] = self.held[source][:count]

    def restore(self, sequence: int, state: Any) -> bool:
        assert not self.held[sequence]
        self.held[sequence] = list(state or [])
        return state is not None

    def compute(self, slot: Slot) -> None:
        """The next token of a slot, as a decode would."""
        held = self.held[slot.number]
        assert len(held) == slot.placed < slot.cells, "positions have a gap, or more than was reserved"
        held.append((tuple(slot.tokens[: slot.placed + 1]), slot.adapters))
        slot.placed += 1
        self.computed += 1
        used = {id(cell) for sequence in self.held for cell in sequence}
        assert len(used) <= self.cells, "llama.cpp finds no cell"


def check(cells: Cells, memory: Memory) -> None:
    assert sorted(slot.number for slot in (*cells.free, *cells.taken)) == list(range(memory.sequences))
    assert cells.free_cells == memory.cells - sum(slot.cells for slot in cells.taken) >= 0
    for slot in (*cells.free, *cells.taken):
        held = memory.held[slot.number]
        assert len(held) == slot.placed
        # Each cell was computed from this very beginning, with these very adapters.
        assert held == [(tuple(slot.tokens[: end + 1]), slot.adapters) for end in range(slot.placed)]
    for slot in cells.free:
        assert slot.cells == 0 and slot.source is None
    for slot in cells.taken:
        assert slot.source is None or (slot.source in cells.taken and slot.source.adapters == slot.adapters)


def advance(cells: Cells, memory: Memory, tokens: int) -> bool:
    """A step: each slot that waits for nobody computes some tokens; whether one could."""
    cells.copy_what_is_there()
    moved = False
    for slot in cells.taken:
        for _ in range(tokens if slot.source is None else 0):
            if slot.placed == slot.cells:
                break
            if slot.placed == len(slot.tokens):
                slot.tokens.append(slot.placed % 2)  # generated
            memory.compute(slot)
            moved = True
    return moved


def prompt(parts: Sequence[int]) -> list[int]:
    """Blocks of equal tokens, so that drawn prompts begin alike often; longer than what is worth copying."""
    return [part for part in parts for _ in range(WORTH_COPYING * 2 // 3)] + [7]


ACTIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("take"),
            st.lists(st.integers(0, 1), max_size=5),
            st.integers(1, 6),
            st.sampled_from([(), (("a", 1.0),), (("a", 0.5),)]),
        ),
        st.tuples(st.just("step"), st.integers(1, 40)),
        st.tuples(st.just("leave"), st.integers(0, 5), st.booleans()),
    ),
    max_size=30,
)


@given(
    actions=ACTIONS,
    sequences=st.integers(1, 5),
    cells=st.sampled_from([120, 200, 400]),
    parts=st.sampled_from([1, 1, 0]),
)
def test_cells_hold_what_their_slots_say(actions: Any, sequences: int, cells: int, parts: int) -> None:
    memory = Memory(sequences, cells, bool(parts))
    tested = Cells(memory)  # type: ignore[arg-type]
    for kind, *facts in actions:
        if kind == "take":
            take(tested, memory, prompt(facts[0]), facts[1], facts[2])
        elif kind == "step":
            advance(tested, memory, facts[0])
        elif facts[0] < len(tested.taken):
            slot = tested.taken[facts[0]]
            if facts[1]:
                tested.spoil(slot)
            tested.give_back(slot)
        check(tested, memory)
    while tested.taken:  # whoever waits gets its turn
        if not advance(tested, memory, 50):
            tested.give_back(next(slot for slot in tested.taken if slot.source is None))
        check(tested, memory)
    assert tested.free_cells == cells and len(tested.free) == sequences


def take(tested: Cells, memory: Memory, tokens: list[int], more: int, adapters: Any) -> None:
    need = len(tokens) + more
    if not tested.fits(need):
        return
    left = [slot for slot in tested.free if slot.adapters == adapters and slot.placed]
    there = max((shared_tokens(slot.tokens, tokens) for slot in left), default=0)
    soon = [slot for slot in tested.taken if slot.adapters == adapters]
    promised = max((shared_tokens(slot.tokens, tokens) for slot in soon), default=0)
    slot = tested.take(tokens, need, adapters)
    got = slot.copies if slot.source is not None else slot.placed
    assert slot.tokens == tokens and got < len(tokens)
    if not memory.forgets_parts:
        assert got == 0
    else:
        assert got >= there and got >= promised - WORTH_COPYING


def test_one_that_waits_for_another_gets_what_that_left_when_it_leaves_half_way() -> None:
    memory = Memory(3, 1000)
    cells = Cells(memory)  # type: ignore[arg-type]
    tokens = list(range(100))
    first = cells.take(tokens, 110, ())
    advance(cells, memory, 50)
    second, third = cells.take([*tokens[:95], 7], 99, ()), cells.take([*tokens[:90], 9], 99, ())
    advance(cells, memory, 10)
    assert (first.placed, second.placed, third.placed) == (60, 0, 0)
    cells.give_back(first)
    assert (second.placed, third.placed) == (60, 60)
    check(cells, memory)


def test_a_chain_of_those_that_wait_holds_when_its_middle_leaves() -> None:
    memory = Memory(4, 1000)
    cells = Cells(memory)  # type: ignore[arg-type]
    tokens = list(range(200))
    first = cells.take(tokens[:100], 120, ())
    second = cells.take([*tokens[:99], 7, 8, *tokens[101:]], 250, ())
    third = cells.take([*tokens[:99], 7, 8, *tokens[101:150], 5], 250, ())
    assert (second.source, third.source) == (first, second)
    cells.give_back(second)
    while third.placed < len(third.tokens):
        assert advance(cells, memory, 30)
        check(cells, memory)


def test_what_lies_there_is_taken_over_and_computed_no_more() -> None:
    memory = Memory(3, 1000)
    cells = Cells(memory)  # type: ignore[arg-type]
    slot = cells.take(list(range(100)), 100, ())
    advance(cells, memory, 100)
    cells.give_back(slot)
    computed = memory.computed
    again = cells.take([*range(90), 5], 100, ())
    cells.copy_what_is_there()
    assert (again.placed, memory.computed) == (90, computed)
    assert cells.take([*range(90), 5], 100, (("a", 1.0),)).placed == 0, "another adapter's cells are of no use"
    check(cells, memory)


def test_who_shares_only_the_beginning_of_every_prompt_leaves_others_cells_alone() -> None:
    memory = Memory(4, 1000)
    cells = Cells(memory)  # type: ignore[arg-type]
    slot = cells.take(list(range(200)), 210, ())
    advance(cells, memory, 210)
    cells.give_back(slot)
    cells.take([0, 1, 2, 99, 99], 20, ())  # three slots are empty
    assert cells.take(list(range(200)), 210, ()).placed == 199


def test_the_only_slot_is_taken_over_as_far_as_it_is_alike() -> None:
    memory = Memory(1, 300)
    cells = Cells(memory)  # type: ignore[arg-type]
    for end, alike in ((100, 0), (60, 60), (80, 60)):
        slot = cells.take([*range(end), 999], 110, ())
        assert slot.placed == alike
        advance(cells, memory, 110)
        cells.give_back(slot)
        check(cells, memory)


def test_what_was_left_is_kept_while_slots_are_empty_and_then_the_oldest_goes() -> None:
    memory = Memory(3, 1000)
    cells = Cells(memory)  # type: ignore[arg-type]
    first, second, third = (cells.take([number] * 50, 60, ()) for number in (1, 2, 3))
    cells.copy_what_is_there()
    for slot in (first, second):
        for _ in range(50):
            memory.compute(slot)
    for slot in (second, first, third):  # the last one has computed nothing
        cells.give_back(slot)
    taken = cells.take([4] * 50, 60, ())
    assert (taken, first.placed, second.placed) == (third, 50, 50)
    assert cells.take([5] * 50, 60, ()) is second
    assert cells.take([1] * 50, 60, ()).placed == 49
    check(cells, memory)


def test_what_was_left_longest_ago_makes_room_first() -> None:
    memory = Memory(4, 300)
    cells = Cells(memory)  # type: ignore[arg-type]
    slots = [cells.take([number] * 60, 60, ()) for number in range(3)]
    advance(cells, memory, 60)
    for slot in (slots[1], slots[0], slots[2]):
        cells.give_back(slot)
    taken = cells.take([9] * 150, 160, ())
    check(cells, memory)
    assert taken not in slots and [slot.placed for slot in slots] == [60, 0, 60]


@pytest.mark.parametrize("fits", [True, False])
def test_a_state_is_restored_as_far_as_the_prompt_begins_so(fits: bool) -> None:
    memory = Memory(2, 300)
    cells = Cells(memory)  # type: ignore[arg-type]
    tokens = list(range(50))
    state = [(tuple(tokens[: end + 1]), ()) for end in range(50)]
    slot = cells.take([*tokens[:40], 99, 98], 60, ())
    assert cells.gains(slot, tokens) and not cells.gains(slot, [5, *tokens])
    cells.restore(slot, tokens, state if fits else None)  # type: ignore[arg-type]
    assert slot.placed == (40 if fits else 0) and not (fits and cells.gains(slot, tokens))
    check(cells, memory)
    advance(cells, memory, 60)
    check(cells, memory)


@given(st.lists(st.integers(0, 1), max_size=700), st.integers(0, 700), st.lists(st.integers(0, 1), max_size=20))
def test_shared_tokens_are_counted_and_one_is_left_to_compute(tokens: list[int], cut: int, rest: list[int]) -> None:
    other = [*tokens[:cut], *rest, 0]
    most = min(len(tokens), len(other) - 1)
    plain = next((place for place in range(most) if tokens[place] != other[place]), most)
    assert shared_tokens(tokens, other) == plain
