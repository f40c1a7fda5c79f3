"""The pool of threads: its bounds, and when a place in it is free."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any

import pytest

from demandport.engine.threads import Threads
from demandport.errors import QueueFull

TIMEOUT_S = 20.0


class Held:
    """A function that says when it has begun, and ends when it is let go."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self) -> str:
        self.begun.set()
        assert self.go.wait(TIMEOUT_S)
        return "held"


def held_pool(max_queued: int) -> tuple[Threads, Held, Future[Any]]:
    """A pool of one thread, which is held."""
    threads, held = Threads(1, max_queued), Held()
    future = threads.submit(held)
    assert held.begun.wait(TIMEOUT_S)
    return threads, held, future


def test_there_are_four_threads_a_core_and_at_most_64() -> None:
    assert Threads().size == min(64, 4 * (os.cpu_count() or 1)) and Threads().max_queued == 1000


def test_a_place_is_charged_until_the_thread_has_ended() -> None:
    threads, held, future = held_pool(0)
    assert not future.cancel()
    with pytest.raises(QueueFull, match="'threads'"):
        threads.submit(int)
    assert threads.health() == {"size": 1, "in_flight": 1, "queued": 0, "max_queued": 0}
    held.go.set()
    assert future.result(TIMEOUT_S) == "held"
    assert threads.submit(int).result(TIMEOUT_S) == 0 and threads.in_flight == 0


def test_who_hears_that_one_has_ended_finds_its_place_free() -> None:
    threads, held, future = held_pool(0)
    found: list[Future[Any]] = []
    future.add_done_callback(lambda _: found.append(threads.submit(int)))
    held.go.set()
    future.result(TIMEOUT_S)
    assert found[0].result(TIMEOUT_S) == 0


def test_what_waits_runs_in_its_order_and_what_is_cancelled_leaves_nothing_behind() -> None:
    threads, held, future = held_pool(3)
    ran: list[int] = []

    def job(number: int) -> Callable[[], None]:
        return lambda: ran.append(number)

    waiting = [threads.submit(job(number)) for number in range(3)]
    with pytest.raises(QueueFull):
        threads.submit(int)
    assert waiting[1].cancel() and threads.health()["queued"] == 2
    for _ in range(1000):  # a place that is given back so often is one place
        given_up = job(-1)
        watched, cancelled = weakref.ref(given_up), threads.submit(given_up)
        assert cancelled.cancel()
        with pytest.raises(CancelledError):
            cancelled.result()
        del given_up, cancelled
        assert watched() is None
    last = threads.submit(job(3))
    held.go.set()
    last.result(TIMEOUT_S)
    assert ran == [0, 2, 3] and future.result(TIMEOUT_S) == "held"


def test_what_failed_is_let_go_of_without_a_collection() -> None:
    threads = Threads(1)
    watched: list[weakref.ref[Any]] = []

    def fail() -> None:
        here = Held()
        watched.append(weakref.ref(here))
        raise ValueError(here)

    gc.disable()
    try:
        future = threads.submit(fail)
        assert isinstance(future.exception(TIMEOUT_S), ValueError)
        threads.submit(int).result(TIMEOUT_S)  # the thread has done with the first
        del future
        assert watched[0]() is None
    finally:
        gc.enable()
