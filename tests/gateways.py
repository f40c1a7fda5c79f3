"""What the tests of models share: a gateway with a limit, requests, graphs, and copies of the tiny model."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from demandport.engine.executor import Executor
from demandport.engine.registry import load_specs
from demandport.engine.session import Session
from demandport.inference.backend import Finished, Progress, TextChunk
from demandport.inference.config import Config, ModelSpec
from demandport.inference.gateway import Gateway
from demandport.inference.library import tiny_path
from demandport.inference.requests import GenerateRequest
from demandport.nodes import BUILT_IN
from demandport.testing import ScriptedBackend
from demandport.workers.process import kill_all, live_workers
from sink import Sink
from support import END_S, eventually

#: How long a test may take. None should: it is for what hangs.
LIMIT_S = 60.0
#: As long as the tiny model's context allows.
LONG = "root ::= [a-z ]{450}"
#: A configured model that a `ScriptedBackend` runs.
SCRIPTED = {"scripted": ModelSpec("m", backend="openai", url="http://localhost")}

Body = Callable[[Gateway], Awaitable[None]]


def with_gateway(body: Body, **config: Any) -> None:
    """Run a test with a gateway of its own; it may hang only so long, and leaves no worker behind."""

    async def limited() -> None:
        async with asyncio.timeout(LIMIT_S):
            gateway = Gateway(Config(**config))
            try:
                await body(gateway)
            finally:
                await gateway.close()

    try:
        asyncio.run(limited())
        assert eventually(lambda: not live_workers(), END_S), "a worker is left"
    finally:
        kill_all()


@dataclass
class Answer:
    """What came of one request."""

    text: str = ""
    progress: list[Progress] = field(default_factory=list)
    end: Finished | None = None

    @property
    def finished(self) -> Finished:
        assert self.end is not None
        return self.end


async def ask(
    gateway: Gateway, model: ModelSpec | str | None = None, *, began: asyncio.Event | None = None, **options: Any
) -> Answer:
    """Generate to the end. `began` is set with the first text."""
    request = GenerateRequest.from_options({"prompt": "Tell me about cats.", **options})
    answer = Answer()
    async with aclosing(gateway.generate(request, model)) as events:
        async for event in events:
            assert answer.end is None, "nothing comes after the end"
            if isinstance(event, TextChunk):
                answer.text += event.text
                if began is not None:
                    began.set()
            elif isinstance(event, Progress):
                answer.progress.append(event)
            else:
                answer.end = event
    assert answer.end is not None
    return answer


async def until(condition: Callable[[], Any]) -> None:
    """Wait for something that comes by itself; the test's limit ends a wait in vain."""
    while not condition():
        await asyncio.sleep(0.001)


def described(gateway: Gateway, model: str) -> dict[str, Any]:
    """What `models` says of a model."""
    (found,) = [one for one in gateway.models() if one["model"] == model]
    return found


# ---------------------------------------------------------------------------------------------------------- files


def templated(path: Path, template: str) -> Path:
    """Copy the tiny model with another chat template."""
    reader, writer = GGUFReader(tiny_path()), GGUFWriter(path, "llama")
    for name, held in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "tokenizer.chat_template"):
            continue
        item = held.types[1] if held.types[0] is GGUFValueType.ARRAY else None
        writer.add_key_value(name, held.contents(), held.types[0], item)
    writer.add_chat_template(template)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# ---------------------------------------------------------------------------------------------------------- nodes


def node(id: str, node_type: str, **data: Any) -> dict[str, Any]:
    return {"id": id, "node_type": node_type, "data": data}


async def demand(gateway: Gateway, *nodes: dict[str, Any], edges: Any = (), **resources: Any) -> Sink:
    """Demand the last of some nodes; raises what the host would be told."""
    arrows = [
        {"id": str(n), "source": a, "source_handle": b, "target": c, "target_handle": d}
        for n, (a, b, c, d) in enumerate(edges)
    ]
    sink = Sink()
    async with anyio.create_task_group() as tasks:
        executor = Executor(tasks, {"gateway": gateway, "library": gateway.library} | resources)
        session = Session({"nodes": list(nodes), "edges": arrows}, load_specs(BUILT_IN), executor)
        session.demand(nodes[-1]["id"], sink, lambda _: None, events=True)
        await sink.done.wait()
    if sink.failure is not None:
        raise sink.failure
    return sink


def scripted(
    backend: ScriptedBackend, node_type: str, data: Mapping[str, Any], *, model: str = "model", **resources: Any
) -> Sink:
    """Demand one node that asks a scripted model, named at the port `model`; raises what the host would be told."""

    heard: list[Sink] = []
    failures: list[Exception] = []

    async def body(gateway: Gateway) -> None:
        try:
            heard.append(await demand(gateway, node("it", node_type, **{model: "scripted"} | data), **resources))
        except Exception as failed:
            failures.append(failed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("demandport.inference.gateway._openai", lambda spec: backend)
        with_gateway(body, models=SCRIPTED)
    if failures:
        raise failures[0]
    return heard[0]


def library_path(folder: Path) -> str:
    """PYTHONPATH with which model workers find the llama_cpp of that folder before the real one."""
    return os.pathsep.join([str(folder), str(folder.parents[1]), os.environ.get("PYTHONPATH", "")])
