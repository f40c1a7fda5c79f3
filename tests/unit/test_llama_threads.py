"""How many threads decodes get: a simulated machine that is quiet, crowded, and quiet again."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demandport.llama.threads import FIRST_WAIT_S, LONGEST_WAIT_S, STRETCH_S, ThreadChoice


@dataclass
class Machine:
    """Decodes take `all_s` with all threads and `one_s` with one, and are given `share` of their time."""

    choice: ThreadChoice
    all_s: float
    one_s: float
    share: float = 1.0
    spent_s: Counter[int] = field(default_factory=Counter)
    at_s: float = 0.0

    def run(self, seconds: float, tokens: int = 1) -> Machine:
        left = seconds
        while left > 0:
            threads = self.choice.now
            took_s = self.one_s if threads == 1 else self.all_s
            self.at_s += took_s
            self.choice.took(tokens, took_s, took_s * threads * self.share, self.at_s)
            self.spent_s[threads] += took_s
            left -= took_s
        return self


QUIET = {"all_s": 0.006, "one_s": 0.010, "share": 0.97}
CROWDED = {"all_s": 0.3, "one_s": 0.02, "share": 0.5}


def become(machine: Machine, state: dict[str, float]) -> Machine:
    for name, value in state.items():
        setattr(machine, name, value)
    machine.spent_s.clear()
    return machine


def test_a_quiet_machine_is_taken_whole() -> None:
    assert set(Machine(ThreadChoice(2), **QUIET).run(60).spent_s) == {2}


@pytest.mark.parametrize("most", [2, 8])
def test_a_crowded_machine_is_left_to_one_thread_and_all_are_tried_rarely(most: int) -> None:
    machine = Machine(ThreadChoice(most), **CROWDED).run(10)
    assert machine.choice.now == 1
    machine.spent_s.clear()
    machine.run(100)
    assert machine.spent_s[most] <= 0.04 * machine.spent_s[1]
    become(machine, QUIET).run(LONGEST_WAIT_S + 1)
    assert machine.choice.now == most
    machine.spent_s.clear()
    machine.run(10)
    assert set(machine.spent_s) == {most}


def test_all_threads_are_kept_where_they_are_faster_though_it_is_crowded() -> None:
    machine = Machine(ThreadChoice(2), all_s=0.009, one_s=0.012, share=0.7).run(100)
    assert machine.spent_s[1] <= 0.02 * machine.spent_s[2]


def test_it_comes_back_soon_from_a_short_crowd() -> None:
    machine = become(Machine(ThreadChoice(2), **CROWDED).run(0.5), QUIET)
    machine.run(2 * FIRST_WAIT_S + 4 * STRETCH_S)
    assert machine.choice.now == 2


def test_decodes_of_other_sizes_are_not_compared() -> None:
    choice = ThreadChoice(2)
    machine = Machine(choice, **CROWDED)
    machine.run(0.1, tokens=1)  # one is tried
    assert choice.now == 1
    machine.run(0.06, tokens=64)  # its outcome says nothing
    assert choice.now == 2


@given(st.lists(st.tuples(st.integers(1, 3), st.floats(0.001, 2), st.floats(0, 1)), max_size=300), st.integers(2, 64))
def test_it_is_one_or_all(decodes: list[tuple[int, float, float]], most: int) -> None:
    choice = ThreadChoice(most)
    at_s = 0.0
    for tokens, wall_s, share in decodes:
        at_s += wall_s
        choice.took(tokens, wall_s, wall_s * choice.now * share, at_s)
        assert choice.now in (1, most)
