"""How many tokens of prompts a step takes, learned from times that a test gives."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demandport.llama.pace import LEAST, MOST, STEP_S, STRETCH, Pace

SEQUENCES = 16
#: Of a model that is guessed to take 10 ms per token of a prompt and 50 ms per step.
BYTES = 1_000_000_000


class Machine:
    """Takes so long for each step: what a step costs, a generation in it, and a token of a prompt."""

    def __init__(self, step_s: float, generation_s: float, token_s: float) -> None:
        self.step_s, self.generation_s, self.token_s = step_s, generation_s, token_s
        self.pace = Pace(SEQUENCES, BYTES)

    def plain_s(self, generating: int) -> float:
        return self.step_s + generating * self.generation_s

    def step(self, generating: int, prompts: bool) -> int:
        """One step as the scheduler makes it; how many tokens of prompts it had."""
        tokens = self.pace.prompt_tokens(generating) if prompts else 0
        self.pace.took(self.plain_s(generating) + tokens * self.token_s, generating, tokens)
        return tokens


def test_what_is_not_known_is_guessed_from_the_size_of_the_model():
    pace = Pace(SEQUENCES, BYTES)
    assert pace.prompt_tokens(0) == 30, "0.3 s of 10 ms each"
    assert pace.prompt_tokens(3) == LEAST, "0.8 times 50 ms would be 4"
    assert Pace(SEQUENCES, BYTES // 100).prompt_tokens(0) == MOST


def test_a_burst_is_read_in_one_step_where_that_does():
    pace = Pace(SEQUENCES, BYTES)
    assert pace.prompt_tokens(2, reading=2, backlog=30) == 30
    assert pace.prompt_tokens(2, reading=2, backlog=31) == LEAST, "it would take more than one"
    assert pace.prompt_tokens(3, reading=2, backlog=30) == LEAST, "more would be held up"
    assert pace.prompt_tokens(1, reading=1, backlog=30) == LEAST, "one that comes is no burst"


@pytest.mark.parametrize("token_s", [0.0002, 0.0005, 0.002])
@pytest.mark.parametrize("generating", [1, 4, 16])
def test_prompts_stretch_a_step_by_what_they_may(token_s, generating):
    machine = Machine(0.01, 0.001, token_s)
    for _ in range(5):
        machine.step(generating, prompts=False)
    for _ in range(60):
        tokens = machine.step(generating, prompts=True)
    allowed = STRETCH * machine.plain_s(generating)
    assert tokens == LEAST or tokens * token_s <= allowed * 1.001
    assert tokens == MOST or (tokens + 2) * token_s > allowed * 0.999, "and by no less"


@pytest.mark.parametrize("token_s", [0.0005, 0.002, 0.004, 1.0])
def test_alone_a_step_lasts_no_longer_than_a_cancel_may_wait(token_s):
    machine = Machine(0.0, 0.0, token_s)
    for _ in range(60):
        tokens = machine.step(0, prompts=True)
    assert tokens == max(LEAST, min(MOST, int(STEP_S / token_s + 1e-6)))


def test_alone_and_beside_others_are_learned_apart():
    pace = Pace(SEQUENCES, BYTES)
    pace.took(0.01, 2, 0)
    pace.took(1.0, 0, 500)
    assert pace.prompt_tokens(2) == LEAST
    pace.took(0.01 + 0.1, 2, 10)
    alone, beside = pace.prompt_tokens(0), pace.prompt_tokens(2)
    assert (alone, beside) == (150, LEAST)


def test_a_number_that_was_never_measured_counts_as_the_nearest():
    pace = Pace(SEQUENCES, BYTES)
    pace.took(0.010, 2, 0)
    pace.took(0.100, 12, 0)
    pace.took(0.010 + 0.010, 2, 10)
    assert pace.prompt_tokens(3) == pace.prompt_tokens(2) == 8
    assert pace.prompt_tokens(11) == pace.prompt_tokens(16) == pace.prompt_tokens(12) == 80


def test_it_follows_a_machine_that_becomes_slower():
    machine = Machine(0.01, 0.0, 0.0001)
    machine.step(4, prompts=False)
    for _ in range(30):
        before = machine.step(4, prompts=True)
    machine.token_s *= 10
    for _ in range(30):
        after = machine.step(4, prompts=True)
    assert before in (79, 80)
    assert after == 8


@given(
    st.lists(
        st.tuples(
            st.floats(0, 1e6, allow_nan=False),
            st.integers(0, SEQUENCES),
            st.integers(0, MOST),
        ),
        max_size=30,
    )
)
def test_it_always_says_a_number_in_its_bounds(steps):
    pace = Pace(SEQUENCES, BYTES)
    for seconds, generating, tokens in steps:
        if generating or tokens:  # an empty step is never made
            pace.took(seconds, generating, tokens)
        for number in range(SEQUENCES + 1):
            assert LEAST <= pace.prompt_tokens(number) <= MOST
