"""The Ollama backend against a stand-in that speaks Ollama's wire format, and against servers that misbehave."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, asynccontextmanager
from functools import partial

import pytest

from demandport import errors
from demandport.inference import http
from demandport.inference.backend import Finished, TextChunk, Usage
from demandport.inference.config import ModelSpec
from demandport.inference.ollama import OllamaBackend
from demandport.inference.requests import EmbedRequest, GenerateRequest, RerankRequest
from http_script import scripted
from ollama_stand_in import ollama
from support import read, run_within

LIMIT_S = 60.0
run = partial(run_within, LIMIT_S)
TEXT = "Cats are smäll 🐈"
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


@asynccontextmanager
async def backend_at(server, model="cats", **options):
    url = f"http://127.0.0.1:{server.port}"
    backend = OllamaBackend(ModelSpec(model, "ollama", url=url, **{"timeout_ms": 50_000, **options}))
    try:
        yield backend
    finally:
        await backend.close()


def with_ollama(model="cats", settings=None, **options):
    """Run an async test with a backend and the stand-in that it speaks to."""

    def decorate(body):
        def test():
            async def main():
                async with ollama(**(settings or {})) as server, backend_at(server.server, model, **options) as backend:
                    await body(backend, server)

            run(main())

        test.__name__ = body.__name__
        return test

    return decorate


async def collect(backend, **options):
    request = GenerateRequest.from_options({"prompt": "Tell me about cats.", **options})
    return await read(backend.generate(request))


def paths(server):
    return [path for path, _ in server.requests]


@with_ollama()
async def test_a_chat_streams_its_words_and_ends_with_its_counts(backend, server):
    text, end = await collect(backend, seed=3)
    assert (text, end) == (TEXT, Finished("stop", Usage(7, 4), seed=3, model="cats"))
    short, end = await collect(backend, max_tokens=2)
    assert (short, end.finish_reason) == ("Cats are", "length")
    assert end.seed == server.requests[-1][1]["options"]["seed"], "a seed that was drawn is told"
    assert backend.health().state == "ready"


@with_ollama()
async def test_the_request_says_what_was_asked_in_ollamas_words(backend, server):
    await collect(
        backend,
        system_prompt="Be kind.",
        max_tokens=9,
        temperature=0,
        top_k=5,
        top_p=0.5,
        min_p=0.1,
        repeat_penalty=1.1,
        repeat_last_n=-1,
        frequency_penalty=0.2,
        presence_penalty=0.3,
        seed=0,
        stop=["\n"],
        json_schema={"type": "object"},
        tools=[TOOL],
        tool_choice="auto",
        priority=1,
    )
    path, body = server.requests[-1]
    assert path == "/api/chat"
    assert body == {
        "model": "cats",
        "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Tell me about cats."}],
        "stream": True,
        "truncate": False,
        "shift": False,
        "format": {"type": "object"},
        "tools": [TOOL],
        "options": {
            "num_predict": 9,
            "temperature": 0,
            "top_k": 5,
            "top_p": 0.5,
            "min_p": 0.1,
            "repeat_penalty": 1.1,
            "repeat_last_n": -1,
            "frequency_penalty": 0.2,
            "presence_penalty": 0.3,
            "seed": 0,
            "stop": ["\n"],
        },
    }


@with_ollama()
async def test_a_raw_prompt_goes_to_generate(backend, server):
    assert (await collect(backend, prompt="Cats", raw=True))[0] == TEXT
    path, body = server.requests[-1]
    assert (path, body["prompt"], body["raw"]) == ("/api/generate", "Cats", True)
    with pytest.raises(errors.TypeMismatch, match="tools"):
        await collect(backend, raw=True, tools=[TOOL])


@pytest.mark.parametrize(
    "options",
    [
        {"grammar": 'root ::= "a"'},
        {"logprobs": 1},
        {"adapters": [{"path": "a"}]},
        {"tools": [TOOL], "tool_choice": "required"},
        {"prompt": None, "messages": [{"role": "user", "content": [IMAGE | {"image_url": {"url": "http://a/b.png"}}]}]},
    ],
)
def test_what_ollama_has_not_is_refused(options):
    @with_ollama("eyes:7b")
    async def body(backend, server):
        with pytest.raises(errors.TypeMismatch):
            await collect(backend, **options)
        assert paths(server) == []

    body()


@with_ollama(settings={"calls": ({"function": {"name": "add", "arguments": {"x": [1, "é"]}}},) * 2})
async def test_tools_are_called_and_their_results_sent_back_by_name(backend, server):
    _, end = await collect(backend, tools=[TOOL])
    assert end.finish_reason == "tool_calls"
    assert [(call.name, call.arguments) for call in end.tool_calls] == [("add", '{"x": [1, "é"]}')] * 2
    ids = [call.id for call in end.tool_calls]
    assert len(set(ids)) == 2
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in end.tool_calls
    ]
    conversation = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "3", "tool_call_id": ids[1]},
    ]
    await collect(backend, prompt=None, messages=conversation, tools=[TOOL], tool_choice="none")
    _, body = server.requests[-1]
    assert "tools" not in body
    assert body["messages"][1]["tool_calls"][0] == {
        "id": ids[0],
        "function": {"name": "add", "arguments": {"x": [1, "é"]}},
    }
    assert body["messages"][2] == {"role": "tool", "content": "3", "tool_call_id": ids[1], "tool_name": "add"}


@with_ollama("eyes:7b")
async def test_images_travel_as_base64_beside_the_text(backend, server):
    parts = [{"type": "text", "text": "What"}, IMAGE, {"type": "text", "text": "is it?"}]
    assert (await collect(backend, prompt=None, messages=[{"role": "user", "content": parts}]))[0] == TEXT
    _, body = server.requests[-1]
    assert body["messages"] == [{"role": "user", "content": "What\nis it?", "images": ["AAAA"]}]


@with_ollama()
async def test_a_model_without_vision_is_a_clear_error(backend, server):
    with pytest.raises(errors.BackendUnavailable, match="takes no images"):
        await collect(backend, prompt=None, messages=[{"role": "user", "content": [IMAGE]}])
    assert paths(server) == ["/api/show"]


@with_ollama("vectors")
async def test_vectors_and_what_embedding_refuses(backend, server):
    await backend.load()
    assert "vectors:latest" in server.loaded
    found = await backend.embed(EmbedRequest(("a", "b")))
    assert (found.dimensions, found.usage, found.model) == (2, Usage(2, 0), "vectors")
    assert [memoryview(vector).cast("f").tolist() for vector in found.vectors] == [pytest.approx([0.6, 0.8])] * 2
    assert server.requests[-1][1]["truncate"] is False
    with pytest.raises(errors.ContextOverflow):
        await backend.embed(EmbedRequest(("a " * 200,)))
    with pytest.raises(errors.TypeMismatch, match="normalize"):
        await backend.embed(EmbedRequest(("a",), normalize=False))
    with pytest.raises(errors.BackendUnavailable, match="rerank"):
        await backend.rerank(RerankRequest("q", ("a",)))
    with pytest.raises(errors.TypeMismatch, match="does not support chat"):
        await collect(backend)


@with_ollama()
async def test_a_prompt_that_does_not_fit_is_refused_and_not_cut(backend, server):
    for raw in (False, True):
        with pytest.raises(errors.ContextOverflow):
            await collect(backend, prompt="cats " * 200, raw=raw)


@with_ollama("dogs")
async def test_an_unknown_model_is_told_with_those_there_are(backend, server):
    with pytest.raises(errors.ModelNotFound, match="it has cats:latest, eyes:7b, vectors:latest"):
        await backend.load()
    with pytest.raises(errors.ModelNotFound, match="model 'dogs' not found"):
        await collect(backend)


# -------------------------------------------------------------------------------------------- loading, unloading


@with_ollama()
async def test_what_this_backend_had_loaded_it_has_unloaded(backend, server):
    assert (await backend.load())["size_bytes"] == 42
    assert server.loaded == {"cats:latest": None}
    await collect(backend)
    assert paths(server).count("/api/ps") == 1
    await backend.close()
    assert server.loaded == {}
    with pytest.raises(errors.BackendUnavailable, match="unloaded"):
        await backend.load()


@with_ollama(settings={"loaded": {"cats:latest": "5m"}})
async def test_what_was_loaded_before_is_left_loaded(backend, server):
    await collect(backend)
    assert await backend.unload() is False
    await backend.close()
    assert list(server.loaded) == ["cats:latest"]


@pytest.mark.parametrize(("written", "sent"), [("5m", "5m"), ("-1", -1), ("300", 300), ("1.5", 1.5)])
def test_a_configured_keep_alive_is_sent_and_outlives_the_backend(written, sent):
    @with_ollama(keep_alive=written)
    async def body(backend, server):
        await collect(backend)
        await backend.close()
        assert server.loaded == {"cats:latest": sent}

    body()


@with_ollama(keep_alive="-1")
async def test_unload_unloads_whatever_keep_alive_says(backend, server):
    await backend.load()
    assert await backend.unload() is True
    assert server.loaded == {}


def test_first_requests_at_once_look_once_and_for_all():
    @with_ollama()
    async def body(backend, server):
        await asyncio.gather(*(collect(backend) for _ in range(5)))
        await backend.close()
        assert server.loaded == {}

    body()


# ---------------------------------------------------------------------------------------------- misbehaviour


@with_ollama(settings={"fail_after": 2})
async def test_an_error_in_mid_stream_is_raised(backend, server):
    texts = []
    with pytest.raises(errors.BackendUnavailable, match="CUDA error"):
        async with aclosing(backend.generate(GenerateRequest(prompt="Hi"), texts.append)) as events:
            async for _ in events:
                pass
    assert texts == ["Cats", " are"]
    assert paths(server).count("/api/chat") == 1


def line(text, **more):
    return {"message": {"role": "assistant", "content": text}, "done": False, **more}


async def not_running(exchange):
    exchange.whole(200, {"models": []})


def with_script(*scripts, **options):
    """Run an async test against a server whose first answer is that no model is loaded, then these scripts."""

    def decorate(body):
        async def main():
            async with scripted(not_running, *scripts) as server, backend_at(server, keep_alive="5m", **options) as one:
                await body(one, server)

        return lambda: run(main())

    return decorate


async def ends_in_the_middle(exchange):
    exchange.chunked("application/x-ndjson")
    exchange.line(line("Cats"))
    exchange.end()


async def cut(exchange):
    exchange.chunked("application/x-ndjson")
    exchange.line(line("Cats"))
    exchange.send(b"ff\r\n{")
    await exchange.writer.drain()
    exchange.abort()


@pytest.mark.parametrize("script", [ends_in_the_middle, cut])
def test_a_server_that_breaks_off_is_unavailable_and_not_asked_again(script):
    @with_script(script)
    async def body(backend, server):
        with pytest.raises(errors.BackendUnavailable):
            await collect(backend)
        assert len(server.exchanges) == 2

    body()


@pytest.mark.parametrize("data", [b"{", b"3", b"[]", b'{"message": 3}', b'{"message": {"content": 3}}', b"[" * 99_999])
def test_what_is_no_line_is_a_typed_error(data):
    async def odd(exchange):
        exchange.chunked("application/x-ndjson")
        exchange.chunk(data + b"\n")
        exchange.end()

    @with_script(odd)
    async def body(backend, server):
        with pytest.raises(errors.BackendUnavailable, match="no line"):
            await collect(backend)

    body()


async def last_line_without_end(exchange):
    exchange.chunked("application/x-ndjson")
    exchange.line(line("Cats"))
    exchange.chunk(b'{"done": true, "done_reason": "stop"}')
    exchange.end()


@with_script(last_line_without_end)
async def last_line(backend, server):
    assert (await collect(backend, seed=1)) == ("Cats", Finished("stop", Usage(0, 0), 1, model="cats"))


def test_the_last_line_may_have_no_end():
    last_line()


def test_a_deadline_and_leaving_early_close_the_connection():
    async def stops(exchange):
        exchange.chunked("application/x-ndjson")
        exchange.line(line("Cats"))
        await exchange.gone.wait()

    @with_script(last_line_without_end, stops)
    async def body(backend, server):
        await collect(backend)  # connections take longer the first time
        with pytest.raises(errors.DeadlineExceeded):
            await collect(backend, deadline_ms=300)
        await server.exchanges[-1].gone.wait()
        events = backend.generate(GenerateRequest(prompt="Hi"))
        assert await anext(events) == TextChunk("Cats")
        await events.aclose()
        await server.exchanges[-1].gone.wait()

    body()


def test_a_server_that_hangs_does_not_hold_up_the_end(monkeypatch):
    monkeypatch.setattr("demandport.inference.ollama.UNLOAD_S", 0.05)

    async def answers(exchange):
        exchange.chunked("application/x-ndjson")
        exchange.line(line("Cats", done=True))
        exchange.end()

    async def hangs(exchange):
        await exchange.gone.wait()

    async def main():
        async with scripted(not_running, answers, hangs) as server:
            async with backend_at(server) as backend:
                await collect(backend)
            assert server.exchanges[-1].json == {"model": "cats", "keep_alive": 0, "stream": False}

    run(main())


def test_nobody_there_is_a_typed_error(monkeypatch):
    monkeypatch.setattr(http, "FIRST_RETRY_S", 0.0)

    async def main():
        backend = OllamaBackend(ModelSpec("cats", "ollama", url="http://127.0.0.1:9"))
        with pytest.raises(errors.BackendUnavailable, match="cannot be reached"):
            await backend.load()
        await backend.close()

    run(main())
