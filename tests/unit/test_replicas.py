"""Which of several workers of one model gets a request; the workers are stand-ins that hold what they were given."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import pytest

from demandport.errors import WorkerCrash
from demandport.inference.backend import BackendHealth, BackendState, Capabilities, Event, Finished
from demandport.inference.replicas import BLOCK_CHARACTERS, MOST_BLOCKS, MOST_MORE_LOAD, Replicas
from demandport.inference.requests import EmbedRequest, GenerateRequest, RerankRequest

BLOCK = "b" * BLOCK_CHARACTERS


class Held:
    """Keeps every request until it is let go."""

    kind = "held"

    def __init__(self) -> None:
        self.info: dict[str, Any] = {}
        self.in_flight = 0
        self.taken = 0
        self.crashed = False
        self.restarts = 0
        self.closed = False
        self.state: BackendState = "ready"
        self._go = asyncio.Event()

    async def _hold(self) -> None:
        self.in_flight += 1
        self.taken += 1
        try:
            await self._go.wait()
        finally:
            self.in_flight -= 1
        if self.crashed:
            raise WorkerCrash("it died")

    def let_go(self) -> None:
        self._go.set()
        self._go = asyncio.Event()

    async def generate(self, request: GenerateRequest, on_text: Any = None) -> AsyncGenerator[Event, None]:
        await self._hold()
        yield Finished("stop")

    async def embed(self, request: EmbedRequest) -> Any:
        await self._hold()

    async def rerank(self, request: RerankRequest) -> Any:
        await self._hold()

    async def load(self) -> dict[str, Any]:
        self.crashed, self.state = False, "ready"
        return self.info

    def capabilities(self) -> Capabilities:
        return Capabilities(frozenset({"generate"}))

    def health(self) -> BackendHealth:
        return BackendHealth(self.state, self.in_flight, restarts=self.restarts, crashed=self.crashed)

    async def close(self) -> None:
        self.closed = True


class Bench:
    """Replicas, and where each request went."""

    def __init__(self, count: int, balance: str) -> None:
        self.held = [Held() for _ in range(count)]
        self.replicas = Replicas(self.held, balance)
        self.tasks: list[asyncio.Future[Any]] = []

    async def give(self, prompt: str = "short", *, how: str = "generate", **options: Any) -> int:
        """Give one request out; the index of who got it."""
        before = [one.taken for one in self.held]
        self.tasks.append(asyncio.ensure_future(self._start(how, prompt, options)))
        while [one.taken for one in self.held] == before:
            assert not self.tasks[-1].done(), self.tasks[-1]
            await asyncio.sleep(0)
        (index,) = [n for n, one in enumerate(self.held) if one.taken != before[n]]
        return index

    async def _start(self, how: str, prompt: str, options: dict[str, Any]) -> None:
        if how == "embed":
            await self.replicas.embed(EmbedRequest((prompt,)))
        elif how == "rerank":
            await self.replicas.rerank(RerankRequest("query", (prompt,)))
        else:
            async for _ in self.replicas.generate(GenerateRequest.from_options({"prompt": prompt} | options)):
                pass

    async def given(self, count: int, prompt: str = "short", **options: Any) -> list[int]:
        return [await self.give(prompt, **options) for _ in range(count)]

    async def end(self) -> list[Any]:
        for one in self.held:
            one.let_go()
        return await asyncio.gather(*self.tasks, return_exceptions=True)


def on_bench(body: Callable[[Bench], Awaitable[None]], count: int = 3, balance: str = "least_loaded") -> None:
    async def main() -> None:
        async with asyncio.timeout(20):
            bench = Bench(count, balance)
            await body(bench)
            await bench.end()
            assert bench.replicas.health().in_flight == 0

    asyncio.run(main())


@pytest.mark.parametrize("how", ["generate", "embed", "rerank"])
def test_least_loaded_spreads_and_of_several_the_first_gets_it(how: str) -> None:
    async def body(bench: Bench) -> None:
        assert await bench.given(4, how=how) == [0, 1, 2, 0]
        bench.held[1].let_go()
        while bench.held[1].in_flight:
            await asyncio.sleep(0)
        assert await bench.given(3, how=how) == [1, 1, 2]

    on_bench(body)


@pytest.mark.parametrize("count", [2, 3])
def test_round_robin_takes_turns_whatever_there_is_to_do(count: int) -> None:
    async def body(bench: Bench) -> None:
        assert await bench.given(2 * count) == [*range(count)] * 2
        bench.held[0].let_go()
        assert await bench.given(1, how="embed") == [0]
        assert await bench.given(1) == [1]

    on_bench(body, count, "round_robin")


def test_many_that_come_in_one_turn_of_the_loop_are_spread() -> None:
    async def body(bench: Bench) -> None:
        bench.tasks = [asyncio.ensure_future(bench._start("generate", "x", {})) for _ in range(9)]
        while sum(one.in_flight for one in bench.held) < 9:
            await asyncio.sleep(0)
        assert [one.in_flight for one in bench.held] == [3, 3, 3]

    on_bench(body)


@pytest.mark.parametrize("balance", ["least_loaded", "round_robin"])
def test_one_that_crashed_gets_nothing_until_it_is_up(balance: str) -> None:
    async def body(bench: Bench) -> None:
        bench.held[1].crashed, bench.held[1].state = True, "stopped"
        assert set(await bench.given(6)) == {0, 2}
        assert bench.replicas.health().state == "ready" and not bench.replicas.health().crashed
        bench.held[1].crashed = False
        assert 1 in await bench.given(3)
        for one in bench.held:
            one.crashed = True
        assert bench.replicas.health().crashed
        await bench.give()  # one of them is tried: what else

    on_bench(body, balance=balance)


def test_a_crash_fails_what_that_one_had_and_nothing_else() -> None:
    async def body(bench: Bench) -> None:
        places = await bench.given(6)
        bench.held[1].crashed = True
        outcomes = await bench.end()
        assert [isinstance(one, WorkerCrash) for one in outcomes] == [place == 1 for place in places]

    on_bench(body)


# ------------------------------------------------------------------------------------------------ prefixes


@pytest.mark.parametrize("balance", ["least_loaded", "round_robin"])
@pytest.mark.parametrize("form", ["prompt", "raw", "messages"])
def test_a_prompt_goes_to_who_holds_its_beginning_unless_that_has_much_more_to_do(balance: str, form: str) -> None:
    def options(end: str) -> dict[str, Any]:
        if form == "messages":
            return {"prompt": None, "messages": [{"role": "user", "content": BLOCK * 2 + end}]}
        return {"prompt": BLOCK * 2 + end, "raw": form == "raw"}

    async def body(bench: Bench) -> None:
        assert await bench.give(**options(" first")) == 0
        assert await bench.give("else") == 1
        # The one with the prefix has one more each time, until it has so much more that the others are better.
        found = [await bench.give(**options(f" {n}")) for n in range(MOST_MORE_LOAD)]
        assert found == [0] * MOST_MORE_LOAD
        assert bench.held[2].in_flight == 0
        assert await bench.give(**options(" again")) == 2

    on_bench(body, balance=balance)


def test_the_longest_beginning_wins_and_then_who_has_least_to_do() -> None:
    async def body(bench: Bench) -> None:
        other = "o" * BLOCK_CHARACTERS
        assert await bench.give(BLOCK, raw=True) == 0
        assert await bench.give("x") == 1
        assert await bench.give(other + BLOCK, raw=True) == 2
        assert await bench.give(other + "end", raw=True) == 2
        bench.held[0].let_go()
        bench.held[2].let_go()
        while bench.held[0].in_flight or bench.held[2].in_flight:
            await asyncio.sleep(0)
        assert await bench.give(BLOCK + other, raw=True) == 0
        assert await bench.give(BLOCK + other + "tail", raw=True) == 0
        assert await bench.give(other + BLOCK + "tail", raw=True) == 2

    on_bench(body)


def test_a_short_prompt_is_no_reason_to_prefer_anyone() -> None:
    async def body(bench: Bench) -> None:
        assert await bench.given(3, "the same " * 5) == [0, 1, 2]

    on_bench(body)


def test_a_replica_that_crashed_is_not_preferred_for_what_it_held() -> None:
    async def body(bench: Bench) -> None:
        assert await bench.give(BLOCK, raw=True) == 0
        bench.held[0].crashed, bench.held[0].restarts = True, 1
        assert await bench.give(BLOCK, raw=True) == 1
        # Now the second holds it, and the first is up again with nothing in its cells.
        bench.held[0].crashed = False
        bench.held[0].let_go()
        while bench.held[0].in_flight:
            await asyncio.sleep(0)
        assert await bench.give(BLOCK, raw=True) == 1

    on_bench(body)


def test_what_is_remembered_of_prompts_has_a_limit() -> None:
    async def body(bench: Bench) -> None:
        await bench.give("".join(chr(300 + n // BLOCK_CHARACTERS) for n in range(3 * BLOCK_CHARACTERS)), raw=True)
        await bench.give("x" * (BLOCK_CHARACTERS * (MOST_BLOCKS + 10)), raw=True)
        assert all(len(held) <= MOST_BLOCKS for held in bench.replicas._held)

    on_bench(body)


def test_all_are_loaded_and_all_are_closed() -> None:
    async def body(bench: Bench) -> None:
        for one in bench.held:
            one.state = "stopped"
        assert bench.replicas.health().state == "stopped"
        await bench.replicas.load()
        assert [one.state for one in bench.replicas.healths()] == ["ready"] * 3
        await bench.replicas.close()
        assert all(one.closed for one in bench.held)

    on_bench(body)
