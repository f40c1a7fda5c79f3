"""When a worker that died may be started again, and which of several gets the work: by a clock that a test sets."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demandport.workers.policy import Load, Restarts, least_loaded, round_robin

LOADS = st.lists(st.builds(Load, st.integers(0, 5), st.booleans()), min_size=1, max_size=6)


def pauses(restarts: Restarts, deaths: int) -> list[float]:
    """How long it has to wait after each of so many deaths in a row, each as soon as it is started again."""
    now, found = 1000.0, []
    for _ in range(deaths):
        restarts.died(now)
        found.append(restarts.wait_s(now))
        now += found[-1]
    return found


def test_the_first_restart_is_at_once_and_each_further_one_waits_twice_as_long_up_to_a_limit() -> None:
    restarts = Restarts(first_s=0.5, most_s=3.0, jitter=0.0, quarantine_after=100)
    assert pauses(restarts, 7) == [0.0, 0.5, 1.0, 2.0, 3.0, 3.0, 3.0]
    assert restarts.failures == 7 and not restarts.quarantined


@pytest.mark.parametrize("drawn", [0.0, 0.5, 0.999])
def test_the_wait_is_longer_by_a_share_drawn_each_time(drawn: float) -> None:
    draws = Counter[str]()

    def draw() -> float:
        draws["draw"] += 1
        return drawn

    restarts = Restarts(first_s=1.0, most_s=8.0, jitter=0.25, quarantine_after=100, draw=draw)
    found = pauses(restarts, 6)
    assert found == pytest.approx([plain * (1 + 0.25 * drawn) for plain in (0, 1, 2, 4, 8, 8)])
    assert draws["draw"] == 5  # a first restart at once has nothing to spread


def test_by_default_many_that_die_together_do_not_start_together() -> None:
    waits = {pauses(Restarts(), 2)[1] for _ in range(20)}
    assert len(waits) > 1 and all(0.25 <= wait <= 0.25 * 1.25 for wait in waits)


def test_the_wait_runs_down_with_the_clock() -> None:
    restarts = Restarts(first_s=4.0, jitter=0.0, quarantine_after=9)
    assert restarts.wait_s(5.0) == 0.0
    restarts.died(10.0)
    restarts.died(10.0)
    assert [restarts.wait_s(now) for now in (10.0, 11.5, 14.0, 99.0)] == [4.0, 2.5, 0.0, 0.0]


def test_quarantine_is_longer_is_tried_again_after_its_time_and_renewed_by_one_more_death() -> None:
    restarts = Restarts(jitter=0.0, quarantine_after=3, quarantine_s=60.0)
    now = 0.0
    for _ in range(3):
        assert not restarts.quarantined
        restarts.died(now)
        now += 1.0
    assert restarts.quarantined and restarts.wait_s(2.0) == 60.0 and restarts.wait_s(62.0) == 0.0
    restarts.died(62.0)
    assert restarts.quarantined and restarts.wait_s(62.0) == 60.0


def test_success_forgets_all_that_was() -> None:
    restarts = Restarts(jitter=0.0)
    pauses(restarts, 5)
    restarts.succeeded()
    assert (restarts.failures, restarts.quarantined, restarts.wait_s(0.0)) == (0, False, 0.0)
    assert pauses(restarts, 2) == [0.0, 0.25]


# ------------------------------------------------------------------------------------------------ balance


@pytest.mark.parametrize(
    ("in_flight", "chosen"),
    [([0], 0), ([0, 0, 0], 0), ([1, 0, 0], 1), ([2, 1, 0], 2), ([2, 1, 1], 1), ([3, 3, 3], 0)],
)
def test_the_least_loaded_is_chosen_and_of_several_the_first(in_flight: list[int], chosen: int) -> None:
    assert least_loaded([Load(count) for count in in_flight]) == chosen


def test_one_that_crashed_has_nothing_to_do_and_still_gets_nothing() -> None:
    assert least_loaded([Load(9), Load(0, available=False), Load(8)]) == 2
    assert least_loaded([Load(0, available=False), Load(1000)]) == 1
    assert least_loaded([Load(2, available=False), Load(1, available=False)]) == 1  # what else


@given(LOADS)
def test_nobody_else_had_less_to_do(loads: list[Load]) -> None:
    chosen = loads[least_loaded(loads)]
    rivals = [one for one in loads if one.available] or loads
    assert chosen in rivals and chosen.in_flight == min(one.in_flight for one in rivals)


def turns(loads: list[Load], count: int) -> list[int]:
    """The choices of `round_robin` one after the other, each from where the last one left off."""
    found, turn = [], 0
    for _ in range(count):
        found.append(round_robin(loads, turn))
        turn = found[-1] + 1
    return found


def test_round_robin_goes_round_and_passes_over_who_crashed() -> None:
    assert turns([Load(5), Load(0), Load(9)], 6) == [0, 1, 2, 0, 1, 2]
    assert turns([Load(0), Load(0, available=False), Load(0)], 5) == [0, 2, 0, 2, 0]
    assert turns([Load(0, available=False), Load(0)], 3) == [1, 1, 1]
    assert turns([Load(0, available=False)] * 2, 3) == [0, 1, 0]  # all have crashed: one of them is to be tried


@given(LOADS)
def test_everyone_that_is_up_gets_its_turn(loads: list[Load]) -> None:
    up = [index for index, one in enumerate(loads) if one.available] or list(range(len(loads)))
    found = turns(loads, 3 * len(up))
    assert set(found) == set(up) and max(Counter(found).values()) == 3
    assert all(first != second for first, second in itertools.pairwise(found)) or len(up) == 1
