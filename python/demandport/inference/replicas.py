"""Several workers with the same model: which one gets a request."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from typing import Any

from demandport.inference.backend import Backend, BackendHealth, Capabilities, Embeddings, Event
from demandport.inference.requests import EmbedRequest, GenerateRequest, RerankRequest
from demandport.workers.policy import Load, least_loaded, round_robin

#: Prompts are told apart by blocks of this many characters.
BLOCK_CHARACTERS = 256
#: Blocks remembered per replica.
MOST_BLOCKS = 4096
#: A replica that holds the prompt's beginning is preferred to one that has up to this much less to do.
MOST_MORE_LOAD = 4


class Replicas:
    """Backends of one model as one (`Backend`). A request goes to the replica that has most of its prompt in its cells,
    unless that has much more to do than others; else by the balance. One that has crashed gets nothing until it is up.

    Args:
        backends: at least one, all alike.
        balance: ``least_loaded`` (of several, the first) or ``round_robin``.
    """

    def __init__(self, backends: Sequence[Backend], balance: str) -> None:
        self.backends = list(backends)
        self.kind = backends[0].kind
        self._balance = balance
        self._turn = 0
        self._held: list[OrderedDict[bytes, None]] = [OrderedDict() for _ in backends]
        self._restarts = [0] * len(backends)

    @property
    def info(self) -> dict[str, Any]:
        """Facts about the model, from the first replica that has them."""
        return next((backend.info for backend in self.backends if backend.info), {})

    async def generate(
        self, request: GenerateRequest, on_text: Callable[[str], None] | None = None
    ) -> AsyncGenerator[Event, None]:
        """Generate on one of them; see `Backend.generate`."""
        backend = self._choose(list(_blocks(request)))
        async with aclosing(backend.generate(request, on_text)) as events:
            async for event in events:
                yield event

    async def embed(self, request: EmbedRequest) -> Embeddings:
        """The vectors of some texts, from one of them; see `Backend.embed`."""
        return await self._choose([]).embed(request)

    async def rerank(self, request: RerankRequest) -> list[float]:
        """A score per document, from one of them; see `Backend.rerank`."""
        return await self._choose([]).rerank(request)

    async def load(self) -> dict[str, Any]:
        """Have all of them loaded; raises what the first that failed said."""
        return (await asyncio.gather(*(backend.load() for backend in self.backends)))[0]

    def capabilities(self) -> Capabilities:
        """What each of them can do."""
        return self.backends[0].capabilities()

    def health(self) -> BackendHealth:
        """How they stand together: ready if one is; the others' facts stand in `healths`."""
        each = self.healths()
        order = ("ready", "loading", "stopped", "quarantined", "closed")
        best = min(each, key=lambda one: order.index(one.state))
        return BackendHealth(
            best.state,
            sum(one.in_flight for one in each),
            best.os_pid,
            sum(one.restarts for one in each),
            all(one.crashed for one in each),
        )

    def healths(self) -> list[BackendHealth]:
        """How each of them stands."""
        return [backend.health() for backend in self.backends]

    async def close(self) -> None:
        """Close all."""
        await asyncio.gather(*(backend.close() for backend in self.backends))

    def _choose(self, blocks: list[bytes]) -> Backend:
        # The load counts what was given out before: choosing and starting happen without a turn of the loop in between.
        healths = self.healths()
        loads = [Load(one.in_flight, not one.crashed) for one in healths]
        for number, one in enumerate(healths):
            if one.restarts != self._restarts[number]:  # a new worker holds nothing
                self._restarts[number] = one.restarts
                self._held[number].clear()
        index = self._holder(blocks, loads)
        if index is None:
            index = least_loaded(loads) if self._balance == "least_loaded" else round_robin(loads, self._turn)
            self._turn = index + 1
        held = self._held[index]
        for block in blocks:
            held[block] = None
            held.move_to_end(block)
        while len(held) > MOST_BLOCKS:
            held.popitem(last=False)
        return self.backends[index]

    def _holder(self, blocks: list[bytes], loads: Sequence[Load]) -> int | None:
        shared = [
            next((count for count, block in enumerate(blocks) if block not in held), len(blocks)) for held in self._held
        ]
        most = max(range(len(loads)), key=lambda i: (loads[i].available, shared[i], -loads[i].in_flight))
        least = loads[least_loaded(loads)].in_flight
        if not shared[most] or not loads[most].available or loads[most].in_flight > least + MOST_MORE_LOAD:
            return None
        return most


def _blocks(request: GenerateRequest) -> Iterator[bytes]:
    """Hashes of the prompt's beginnings, block by block; the same for prompts that begin alike."""
    text = request.prompt if request.raw else json.dumps(request.conversation(), ensure_ascii=False)
    so_far = hashlib.blake2b(digest_size=16)
    for start in range(0, len(text or "") - BLOCK_CHARACTERS + 1, BLOCK_CHARACTERS):
        so_far.update((text or "")[start : start + BLOCK_CHARACTERS].encode("utf-8", "surrogatepass"))
        yield so_far.digest()
