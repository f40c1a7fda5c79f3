"""What a model worker answers to messages of every kind, over its real pipes: an error with a code, and it lives on."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest

from demandport.errors import BY_CODE
from demandport.inference import caches
from demandport.inference.library import tiny_path
from demandport.inference.llama_cpp import WORKER_MODULE
from demandport.workers.process import WorkerProcess, kill_all, live_workers

pytest.importorskip("llama_cpp")
LIMIT_S = 120.0
GREEDY = {"prompt": "Once upon a time", "raw": True, "max_tokens": 8, "temperature": 0}
LONG = {"prompt": "cats", "grammar": "root ::= [a-z ]{450}"}


class Worker:
    """A worker, and its messages; what it logs is left out."""

    def __init__(self):
        self.messages = asyncio.Queue()
        self.process = WorkerProcess.spawn(
            WORKER_MODULE,
            name="test",
            on_message=lambda message: message[0] == "log" or self.messages.put_nowait(message),
            on_exit=lambda reason: self.messages.put_nowait(["exit", reason]),
        )
        self._id = 0

    def send(self, *message):
        self.process.send(list(message))

    async def answer(self, kind, *body):
        """What is said of a request, the last message of it: `ok`, `done` or `error`."""
        self._id += 1
        self.send(kind, self._id, *body)
        return (await self.all_of(self._id))[-1]

    async def all_of(self, id):
        said = []
        while not said or said[-1][0] not in ("ok", "done", "error"):
            message = await self.messages.get()
            assert message[0] != "exit", message
            if message[1] == id:
                said.append(message)
        return said

    async def load(self, **spec):
        return await self.answer("load", {"path": str(tiny_path()), "size_bytes": 1} | spec)

    async def text(self):
        """What it generates now, which is always the same."""
        self._id += 1
        self.send("generate", self._id, GREEDY)
        said = await self.all_of(self._id)
        assert said[-1][0] == "done", said[-1]
        return "".join(message[2] for message in said if message[0] == "chunk")


def run(body, **spec):
    """Run a test with a worker, loaded if there is a `spec`; it hangs only so long and leaves no process."""

    async def main():
        async with asyncio.timeout(LIMIT_S), started() as worker:
            if spec:
                assert (await worker.load(**spec))[0] == "ok"
            await body(worker)

    try:
        asyncio.run(main())
        assert live_workers() == []
    finally:
        kill_all()


@asynccontextmanager
async def started():
    worker = Worker()
    try:
        assert (await worker.messages.get())[0] == "ready"
        yield worker
    finally:
        await worker.process.stop()


def code(message):
    assert message[0] == "error" and message[2]["code"] in BY_CODE and message[2]["message"], message
    return message[2]["code"]


def test_before_a_model_is_loaded_every_request_is_refused():
    async def body(worker):
        for kind in ("generate", "embed", "rerank", "save", "no such kind", "chunk", "done"):
            assert code(await worker.answer(kind, {})) == "internal"
        for _ in range(2):
            assert code(await worker.load(path="/nowhere/at/all.gguf")) == "model_not_found"
        worker.send("cancel", 77)
        assert (await worker.load())[0] == "ok"
        assert await worker.text()
        assert code(await worker.load()) == "internal", "it has one already"
        assert await worker.text()

    run(body)


SPECS = [None, {}, [], {"path": 5, "size_bytes": 1}, {"path": "a\0b", "size_bytes": 1}, {"size_bytes": 1}]


def test_a_malformed_load_is_refused_and_the_next_one_works():
    async def body(worker):
        for spec in [*SPECS, {"path": str(tiny_path()), "size_bytes": 1, "context_length": "many"}]:
            code(await worker.answer("load", spec))
        code(await worker.answer("load"))
        assert code(await worker.load(purpose="rerank")) == "model_load_failed"
        assert (await worker.load())[0] == "ok"
        assert await worker.text()

    run(body)


def test_a_purpose_that_is_none_is_refused():
    async def body(worker):
        code(await worker.load(purpose="dance"))

    run(body)


def test_a_ping_is_answered_while_it_generates():
    async def body(worker):
        worker.send("generate", 7, LONG)
        worker.send("ping", 8)
        while (message := await worker.messages.get())[0] != "pong":
            assert message[0] in ("chunk", "progress")
        assert message[1] == 8

    run(body, purpose="generate")


BODIES = [
    None, 5, "text", [], {}, {"prompt": 5}, {"prompt": "x", "no_such": 1}, {"prompt": "x", "messages": []},
    {"prompt": "x", "temperature": "hot"}, {"prompt": "x", "adapters": 5}, {"prompt": "x", "adapters": [{}]},
    {"prompt": "x", "adapters": [{"path": "/nowhere"}]}, {"prompt": "x", "adapters": [{"path": "a\0b"}]},
    {"prompt": "x", "kv_cache": 5}, {"prompt": "x", "kv_cache": {}}, {"prompt": "x", "kv_cache": {"tokens": b"x"}},
    {"prompt": "x", "grammar": "root ::= nowhere"}, {"prompt": "x", "json_schema": {"type": "no such"}},
    {"prompt": "x " * 5000}, {"messages": [{"role": "boss", "content": ""}]}, {"prompt": "x", "deadline_ms": -1},
    {"prompt": "x", "stop": [b"x"]}, {"prompt": b"x"},
]  # fmt: skip


def test_malformed_requests_are_refused_beside_one_that_runs(tmp_path):
    async def body(worker):
        expected = await worker.text()
        worker.send("generate", 1000, LONG)
        for wrong in BODIES:
            code(await worker.answer("generate", wrong))
        code(await worker.answer("generate"))
        for wrong in [*BODIES, {"request": {}}, {"path": str(tmp_path / "x.kv")}]:
            code(await worker.answer("save", wrong))
        for request in ({}, {"prompt": "x"}, {"kv_cache": {}}, {"kv_cache": None}):
            code(await worker.answer("save", {"request": request, "path": str(tmp_path / "x.kv")}))
        assert await worker.text() == expected
        worker.send("cancel", 1000)
        assert not list(tmp_path.iterdir())

    run(body, purpose="generate")


def test_a_worker_does_only_what_its_model_was_loaded_for():
    async def generating(worker):
        for kind, request in (("embed", {"texts": ["x"]}), ("rerank", {"query": "x", "documents": ["y"]})):
            refused = await worker.answer(kind, request)
            assert code(refused) == "internal" and kind in refused[2]["message"]
        assert await worker.text()

    async def embedding(worker):
        for kind in ("generate", "rerank", "save"):
            assert code(await worker.answer(kind, GREEDY)) == "internal"
        for wrong in (None, [], {}, {"texts": []}, {"texts": "x"}, {"texts": [5]}, {"texts": ["x"], "normalize": 1}):
            code(await worker.answer("embed", wrong))
        assert code(await worker.answer("embed", {"texts": ["fine", "x " * 5000]})) == "context_overflow"
        done = await worker.answer("embed", {"texts": ["x", "y"]})
        assert done[0] == "done" and len(done[2]["vectors"]) == 2

    run(generating, purpose="generate")
    run(embedding, purpose="embed")


def test_progress_of_loading_counts_bytes_up_to_the_total():
    async def body(worker):
        size = tiny_path().stat().st_size
        worker.send("load", 1, {"path": str(tiny_path()), "size_bytes": size})
        said = await worker.all_of(1)
        assert said[-1][0] == "ok"
        facts = [message[2] for message in said[:-1]]
        assert {(fact["total"], fact["unit"]) for fact in facts} == {(size, "load_bytes")}
        assert all(before["done"] < after["done"] for before, after in pairwise(facts))
        assert facts[0]["done"] >= 0 and facts[-1]["done"] == size and len(facts) <= 21

    run(body)


def test_progress_of_a_long_prompt_counts_tokens_up_to_the_total():
    async def body(worker):
        worker.send("generate", 1, GREEDY | {"prompt": "Cats sleep all day. " * 60})
        said = await worker.all_of(1)
        facts = [message[2] for message in said if message[0] == "progress"]
        total = said[-1][2]["usage"]["prompt_tokens"]
        assert total > 256 and {(fact["total"], fact["unit"]) for fact in facts} == {(total, "prompt_tokens")}
        assert all(before["done"] < after["done"] for before, after in pairwise(facts))
        assert facts[-1]["done"] == total

    run(body, purpose="generate")


def test_cancels_of_many_that_wait_and_run_end_them_all():
    async def body(worker):
        for id in range(100, 140):
            worker.send("generate", id, LONG)
        for id in range(100, 140):
            worker.send("cancel", id)
        ended = {}
        while len(ended) < 40:
            message = await worker.messages.get()
            if message[0] in ("done", "error", "exit"):
                ended[message[1]] = message
        assert {code(message) for message in ended.values()} == {"cancelled"}
        assert await worker.text()

    run(body, purpose="generate")


def test_a_saved_cache_goes_on_in_the_next_worker(tmp_path):
    path, found = tmp_path / "mine.kv", {}
    then = GREEDY | {"prompt": " and then", "max_tokens": 12}

    async def saves(worker):
        done = await worker.answer("generate", GREEDY | {"prompt": "Cats sleep. " * 40})
        cache = done[2]["kv_cache"]
        said = await worker.answer("save", {"request": {"kv_cache": cache}, "path": str(path)})
        assert said[2]["bytes"] == path.stat().st_size
        found["kv_cache"] = (await worker.answer("generate", then | {"kv_cache": cache}))[2]["kv_cache"]

    async def goes_on(worker):
        cache = caches.read(path).to_plain() | {"file": str(path)}
        done = await worker.answer("generate", then | {"kv_cache": cache})
        assert done[2]["kv_cache"] == found["kv_cache"]
        assert done[2]["usage"]["cached_tokens"] == len(caches.read(path).tokens) > 100
        path.write_bytes(path.read_bytes()[:-1])
        assert code(await worker.answer("generate", then | {"kv_cache": cache})) == "type_mismatch"
        assert await worker.text()

    run(saves, purpose="generate")
    run(goes_on, purpose="generate")
