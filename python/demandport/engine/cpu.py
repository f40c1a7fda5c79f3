"""Nodes that compute: they run in worker processes, one per core. Everything goes there and comes back as messages."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from typing import Any, Protocol

from demandport.errors import NodeFailed, TypeMismatch
from demandport.graph.spec import NodeSpec
from demandport.workers.pool import WorkerPool

WORKER_MODULE = "demandport.engine.cpu_worker"


class Caller(Protocol):
    """The run of a node, as far as its worker has to do with it."""

    async def emit(self, port: str, chunk: Any) -> None: ...
    def event(self, event: str, fields: dict[str, Any]) -> None: ...
    @property
    def deadline(self) -> float | None: ...
    @property
    def priority(self) -> int: ...


class CpuNodes:
    """Runs the functions and generators of ``cpu`` nodes in the pool ``cpu``; no process before the first of them.

    Args:
        size: number of workers; default: one per core that this process may use.
        options: of the `WorkerPool`.
    """

    def __init__(self, size: int | None = None, **options: Any) -> None:
        self.pool = WorkerPool("cpu", size or _cores(), WORKER_MODULE, setup=_setup, **options)

    async def call(
        self, node: str, spec: NodeSpec, inputs: Mapping[str, Any], run: Caller
    ) -> tuple[Any, dict[str, Any]]:
        """Run a node in a worker; what it streams and reports goes to `run` as it comes.

        The worker imports the module of the node's function. A cancelled caller returns at once, the worker is ended if
        it does not end by itself; see `WorkerPool.run`.

        Returns:
            what the function returned, and what it gave by ``ctx.output``.

        Raises:
            NodeFailed: the node raised, or a worker cannot import it.
            TypeMismatch: an input, a chunk or an output cannot travel.
            DemandportError: as `WorkerPool.run`.
        """
        module = spec.call.__module__
        if module == "__main__":
            raise NodeFailed(
                f"{spec.node_type} is declared in the main program, which a worker cannot import; "
                "declare it in a module of its own, or have it run in a thread"
            )
        payload = {
            "module": module,
            "node_type": spec.node_type,
            "node": node,
            "inputs": inputs,
            "deadline": run.deadline,  # the clock of time.monotonic is the machine's, not the process's
            "priority": run.priority,
        }

        async def take(said: list[Any]) -> None:
            kind, *rest = said
            if kind == "chunk":
                await run.emit(*rest)
            else:
                run.event(*rest)

        try:
            returned, extra = await self.pool.run(payload, take)
        except TypeMismatch as wrong:
            if wrong.node is not None:  # the node's own words
                raise
            raise TypeMismatch(f"{spec.node_type} runs in a worker process, and {wrong.message}") from None
        return returned, extra

    def health(self) -> dict[str, Any]:
        """Size, load and workers, as `health` reports it."""
        return self.pool.health()

    async def close(self) -> None:
        """End all workers."""
        await self.pool.close()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # pragma: no cover - macOS


def _setup() -> dict[str, Any]:
    """What a new worker is told: where modules are found here, and what is worth logging here."""
    return {"path": sys.path, "log_level": logging.getLogger().getEffectiveLevel()}
