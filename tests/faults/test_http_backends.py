"""The backends of servers against servers that misbehave in every way: typed errors, in time, and nothing leaked."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from contextlib import aclosing
from functools import partial

import pytest

from demandport import errors
from demandport.inference import http
from demandport.inference.backend import Finished, Progress, TextChunk, ToolCall, Usage
from demandport.inference.config import ModelSpec
from demandport.inference.openai import OpenAIBackend
from demandport.inference.requests import EmbedRequest, GenerateRequest, RerankRequest
from http_script import scripted
from support import read, run_within

LIMIT_S = 60.0
run = partial(run_within, LIMIT_S)
#: For what must come to an end by itself; nothing measures it.
LONG_MS = 50_000
KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(http, "FIRST_RETRY_S", 0.0)


def chunk(text=None, reason=None, **more):
    delta = {} if text is None else {"content": text}
    return {"model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": reason}], **more}


async def answer(exchange):
    """A whole and right answer: "Hé llo"."""
    exchange.chunked()
    exchange.event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": None}}]})
    for piece in (chunk("Hé"), chunk(" llo"), chunk(reason="stop")):
        exchange.event(piece)
    exchange.event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}})
    exchange.event(b"[DONE]")
    exchange.end()


async def forever(exchange):
    await exchange.gone.wait()


def backend_of(server, **options):
    return OpenAIBackend(ModelSpec("m", "openai", url=server.url, **{"timeout_ms": LONG_MS, **options}))


async def collect(backend, **options):
    request = GenerateRequest.from_options({"prompt": "Hi", **options})
    return await read(backend.generate(request))


def with_server(*scripts, **options):
    """Run an async test with a backend and the server whose scripts these are."""

    def decorate(body):
        def test():
            async def main():
                async with scripted(*scripts) as server:
                    backend = backend_of(server, **options)
                    try:
                        await body(backend, server)
                    finally:
                        await backend.close()

            run(main())

        test.__name__ = body.__name__
        return test

    return decorate


# ------------------------------------------------------------------------------------------------- what is right


@with_server(answer)
async def test_text_usage_and_end_come_out(backend, server):
    text, end = await collect(backend, seed=7)
    assert text == "Hé llo"
    assert end == Finished("stop", Usage(3, 2), seed=7, model="m")
    assert backend.health().state == "ready"
    assert backend.health().in_flight == 0


@with_server(answer)
async def test_on_text_gets_the_text_in_place_of_events(backend, server):
    texts, events = [], []
    async with aclosing(backend.generate(GenerateRequest(prompt="Hi"), texts.append)) as stream:
        async for event in stream:
            events.append(event)
    assert texts == ["Hé", " llo"]
    assert [type(event) for event in events] == [Finished]


async def byte_by_byte(exchange):
    whole = []
    exchange.chunk = whole.append
    exchange.end = lambda: None
    await answer(exchange)
    for byte in b"".join(whole).replace(b"\n", b"\r\n"):
        exchange.send(b"1\r\n%c\r\n" % byte)
        await exchange.writer.drain()
        await asyncio.sleep(0)
    exchange.send(b"0\r\n\r\n")


@with_server(byte_by_byte)
async def test_a_stream_split_at_every_byte_is_the_same_stream(backend, server):
    assert await collect(backend) == ("Hé llo", Finished("stop", Usage(3, 2), model="m"))


@with_server(answer)
async def test_the_request_says_what_was_asked_and_nothing_else(backend, server):
    image = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    await collect(
        backend,
        prompt=None,
        messages=[{"role": "user", "content": image}],
        system_prompt="Be kind.",
        max_tokens=5,
        temperature=0.5,
        top_p=0.9,
        stop=["\n"],
        presence_penalty=1.0,
        frequency_penalty=0.5,
        seed=1,
        logprobs=2,
        json_schema={"type": "object"},
        tools=[tool],
        tool_choice="auto",
        priority=3,
    )
    [exchange] = server.exchanges
    assert (exchange.method, exchange.path) == ("POST", "/v1/chat/completions")
    assert "authorization" not in exchange.headers
    assert exchange.json == {
        "model": "m",
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": image}],
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "stop": ["\n"],
        "presence_penalty": 1.0,
        "frequency_penalty": 0.5,
        "seed": 1,
        "logprobs": True,
        "top_logprobs": 2,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": {"type": "object"}, "strict": True},
        },
        "tools": [tool],
        "tool_choice": "auto",
    }


@pytest.mark.parametrize("name", ["top_k", "min_p", "repeat_penalty", "repeat_last_n", "grammar", "adapters"])
def test_what_the_api_has_not_is_refused_before_anything_is_sent(name):
    value = {"grammar": 'root ::= "a"', "adapters": [{"path": "a"}], "top_k": 3, "repeat_last_n": 3}.get(name, 0.5)

    @with_server(answer)
    async def body(backend, server):
        with pytest.raises(errors.TypeMismatch, match=f"{name} is not honoured by model m at 127.0.0.1"):
            await collect(backend, **{name: value})
        assert server.exchanges == []

    body()


async def raw_answer(exchange):
    exchange.chunked()
    first = {"tokens": ["a"], "token_logprobs": [-0.5], "top_logprobs": [{"a": -0.5, "b": -1.0}]}
    exchange.event({"choices": [{"text": "a", "logprobs": first}]})
    exchange.event({"choices": [{"text": "", "finish_reason": "length", "logprobs": None}]})
    exchange.event(b"[DONE]")
    exchange.end()


@with_server(raw_answer)
async def test_a_raw_prompt_goes_to_completions(backend, server):
    text, end = await collect(backend, raw=True, logprobs=1)
    assert (text, end.finish_reason, end.usage) == ("a", "length", None)
    assert end.logprobs == [{"token": "a", "logprob": -0.5, "top": [{"token": "a", "logprob": -0.5}]}]
    [exchange] = server.exchanges
    assert exchange.path == "/v1/completions"
    assert exchange.json["prompt"] == "Hi"
    assert exchange.json["logprobs"] == 1
    with pytest.raises(errors.TypeMismatch, match="json_schema"):
        await collect(backend, raw=True, json_schema={"type": "object"})


async def tool_answer(exchange):
    def calls(*deltas, reason=None):
        exchange.event({"choices": [{"index": 0, "delta": {"tool_calls": list(deltas)}, "finish_reason": reason}]})

    exchange.chunked()
    exchange.event(chunk(""))
    calls({"index": 0, "id": "a", "type": "function", "function": {"name": "add", "arguments": ""}})
    calls({"index": 1, "id": "b", "function": {"name": "sub", "arguments": '{"x"'}})
    calls({"index": 0, "function": {"arguments": '{"y": '}}, {"index": 0, "function": {"arguments": "1}"}})
    calls({"index": 1, "function": {"arguments": ":2}"}})
    exchange.event(chunk(reason="tool_calls"))
    exchange.event(b"[DONE]")
    exchange.end()


@with_server(tool_answer)
async def test_tool_calls_are_put_together_from_their_pieces(backend, server):
    text, end = await collect(backend, tools=[{"type": "function", "function": {"name": "add"}}])
    assert (text, end.finish_reason) == ("", "tool_calls")
    assert end.tool_calls == (ToolCall("a", "add", '{"y": 1}'), ToolCall("b", "sub", '{"x":2}'))


async def progressing(exchange):
    exchange.chunked()
    exchange.event(chunk(prompt_progress={"total": 10, "processed": 4, "cache": 0}))
    exchange.event(chunk("x", "stop", usage={"prompt_tokens": 1, "prompt_tokens_details": {"cached_tokens": 1}}))
    exchange.end()


@with_server(progressing)
async def test_progress_cached_tokens_and_an_end_without_done(backend, server):
    async with aclosing(backend.generate(GenerateRequest(prompt="Hi"))) as events:
        found = [event async for event in events]
    assert found == [Progress(4, 10, "prompt_tokens"), TextChunk("x"), Finished("stop", Usage(1, 0, 1), model="m")]


async def vectors(exchange):
    data = [{"index": 1, "embedding": [3.0, 4.0]}, {"index": 0, "embedding": [1.0, 0.0]}]
    exchange.whole(200, {"data": data, "model": "e", "usage": {"prompt_tokens": 9}})


@with_server(vectors)
async def test_vectors_come_in_the_order_of_the_texts(backend, server):
    found = await backend.embed(EmbedRequest(("a", "b")))
    assert (found.dimensions, found.usage, found.model) == (2, Usage(9, 0), "e")
    assert [memoryview(vector).cast("f").tolist() for vector in found.vectors] == [[1, 0], pytest.approx([0.6, 0.8])]
    plain = await backend.embed(EmbedRequest(("a", "b"), normalize=False))
    assert memoryview(plain.vectors[1]).cast("f").tolist() == [3, 4]
    with pytest.raises(errors.BackendUnavailable, match="one vector per text"):
        await backend.embed(EmbedRequest(("a", "b", "c")))


async def scores(exchange):
    exchange.whole(200, {"results": [{"index": 1, "relevance_score": 0.9}, {"index": 0, "relevance_score": -1}]})


@with_server(scores)
async def test_scores_come_in_the_order_of_the_documents(backend, server):
    assert await backend.rerank(RerankRequest("q", ("a", "b"))) == [-1.0, 0.9]
    assert server.exchanges[0].json == {"model": "m", "query": "q", "documents": ["a", "b"], "top_n": 2}
    with pytest.raises(errors.BackendUnavailable, match="score per document"):
        await backend.rerank(RerankRequest("q", ("a", "b", "c")))


async def models(exchange):
    exchange.whole(200, {"data": [{"id": "m"}, {"id": "n"}]})


@with_server(models)
async def test_load_asks_for_the_models(backend, server):
    assert backend.health().state == "stopped"
    assert await backend.load() == backend.info == {"models": ["m", "n"]}
    assert (server.exchanges[0].method, server.exchanges[0].path) == ("GET", "/v1/models")
    assert backend.health().state == "ready"


# ---------------------------------------------------------------------------------------------------- the key


def test_the_key_comes_from_its_variable_and_is_sent(monkeypatch):
    monkeypatch.setenv("DEMANDPORT_TEST_KEY", f" {KEY}\n")

    @with_server(answer, api_key_env="DEMANDPORT_TEST_KEY")
    async def body(backend, server):
        await collect(backend)
        assert server.exchanges[0].headers["authorization"] == f"Bearer {KEY}"

    body()


@pytest.mark.parametrize("value", [None, "", "a\nb", "clé"])
def test_a_missing_or_odd_key_is_a_clear_error_that_does_not_show_it(monkeypatch, value):
    monkeypatch.delenv("DEMANDPORT_TEST_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("DEMANDPORT_TEST_KEY", value)

    @with_server(answer, api_key_env="DEMANDPORT_TEST_KEY")
    async def body(backend, server):
        with pytest.raises(errors.Forbidden, match="DEMANDPORT_TEST_KEY") as failed:
            await collect(backend)
        assert not value or value not in failed.value.message
        assert server.exchanges == []

    body()


def test_no_error_shows_the_key_and_long_ones_are_cut(monkeypatch):
    monkeypatch.setenv("DEMANDPORT_TEST_KEY", KEY)

    async def refused(exchange):
        exchange.whole(401, {"error": {"message": f"Incorrect API key: {KEY} " + "x" * 100_000}})

    async def odd_type(exchange):
        exchange.whole(200, b"", media_type=f"text/{KEY}")

    async def moved(exchange):
        exchange.head(302, Location=f"http://elsewhere/{KEY}", Content_Length="0")

    @with_server(refused, odd_type, moved, api_key_env="DEMANDPORT_TEST_KEY")
    async def body(backend, server):
        for cls in (errors.Forbidden, errors.BackendUnavailable, errors.BackendUnavailable):
            with pytest.raises(cls) as failed:
                await collect(backend)
            assert KEY not in json.dumps(failed.value.to_wire())
            assert failed.value.__cause__ is None
            assert len(failed.value.message) < 1000

    body()


def test_a_redirect_is_not_followed(monkeypatch):
    monkeypatch.setenv("DEMANDPORT_TEST_KEY", KEY)

    async def main():
        async with scripted(answer) as other:

            async def moved(exchange):
                exchange.head(307, Location=f"{other.url}/chat/completions", Content_Length="0")

            async with scripted(moved) as server:
                backend = backend_of(server, api_key_env="DEMANDPORT_TEST_KEY")
                with pytest.raises(errors.BackendUnavailable, match="redirects"):
                    await collect(backend)
                await backend.close()
                assert len(server.exchanges) == 1
            assert other.exchanges == []

    run(main())


def test_a_proxy_is_not_asked_for_this_machine(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)

    @with_server(answer)
    async def body(backend, server):
        assert (await collect(backend))[0] == "Hé llo"

    body()


# ------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (400, {"error": {"message": "bad temperature"}}, errors.TypeMismatch),
        (422, {"detail": [{"loc": ["body", "messages"], "msg": "field required"}]}, errors.TypeMismatch),
        (400, {"error": {"message": "too many", "code": "context_length_exceeded"}}, errors.ContextOverflow),
        (400, {"error": {"message": "x", "type": "exceed_context_size_error"}}, errors.ContextOverflow),
        (500, {"error": {"message": "input (9 tokens) is too large to process."}}, errors.ContextOverflow),
        (400, {"error": {"message": "The model `x` does not exist", "code": "model_not_found"}}, errors.ModelNotFound),
        (401, {"error": {"message": "Invalid API key"}}, errors.Forbidden),
        (403, b"nope", errors.Forbidden),
        (404, {"error": "model 'x' not found"}, errors.ModelNotFound),
        (404, {"detail": "Not Found"}, errors.BackendUnavailable),
        (405, b"", errors.BackendUnavailable),
        (413, b"<html>", errors.TooLarge),
        (501, {"error": {"message": "not supported"}}, errors.BackendUnavailable),
    ],
)
def test_a_refusal_is_an_error_of_its_kind_and_is_not_tried_again(status, body, expected):
    async def refuse(exchange):
        exchange.whole(status, body)

    @with_server(refuse)
    async def test(backend, server):
        with pytest.raises(errors.DemandportError) as failed:
            await collect(backend)
        assert type(failed.value) is expected
        assert failed.value.details == {"status": status}
        assert len(server.exchanges) == 1

    test()


async def broken(exchange):
    exchange.whole(500, {"error": {"message": "CUDA is gone"}})


@with_server(broken)
async def test_a_server_that_stays_broken_is_tried_a_few_times(backend, server):
    with pytest.raises(errors.BackendUnavailable, match="CUDA is gone") as failed:
        await collect(backend)
    assert failed.value.details == {"status": 500}
    assert len(server.exchanges) == 1 + http.RETRIES
    assert backend.health().state == "stopped"


async def busy(exchange):
    exchange.whole(429, {"error": {"message": "slow down"}}, Retry_After="0")


@with_server(busy, broken, answer)
async def test_what_may_pass_is_tried_again_before_the_first_token(backend, server):
    assert (await collect(backend))[0] == "Hé llo"
    assert len(server.exchanges) == 3


@with_server(busy, busy, vectors)
async def test_embeddings_are_tried_again_too(backend, server):
    assert (await backend.embed(EmbedRequest(("a", "b")))).dimensions == 2


@pytest.mark.parametrize(
    ("wait", "deadline_ms"), [("3600", None), ("29", 20_000), ("Sat, 01 Jan 2100 00:00:00 GMT", 20_000)]
)
def test_a_wait_that_is_too_long_is_told_and_not_waited_for(wait, deadline_ms):
    async def limited(exchange):
        exchange.whole(429, {"error": {"message": "slow down"}}, Retry_After=wait)

    @with_server(limited)
    async def body(backend, server):
        with pytest.raises(errors.QueueFull) as failed:
            await collect(backend, deadline_ms=deadline_ms)
        assert failed.value.retryable
        assert failed.value.details["retry_after_ms"] >= 29_000
        assert len(server.exchanges) == 1

    body()


async def dies_before_the_first_token(exchange):
    exchange.chunked()
    exchange.event({"choices": [{"index": 0, "delta": {"role": "assistant"}}]})
    await exchange.writer.drain()
    exchange.abort()


async def dies_after_the_first_token(exchange):
    exchange.chunked()
    exchange.event(chunk("Hé"))
    await exchange.writer.drain()
    exchange.abort()


async def ends_in_the_middle(exchange):
    exchange.chunked()
    exchange.event(chunk("Hé"))
    exchange.end()


async def says_done_in_the_middle(exchange):
    exchange.chunked()
    exchange.event(chunk("Hé"))
    exchange.event(b"[DONE]")
    exchange.end()


async def cuts_a_chunk_off(exchange):
    exchange.chunked()
    exchange.event(chunk("Hé"))
    exchange.send(b"ff\r\ndata: {")
    await exchange.writer.drain()
    exchange.writer.close()


async def sends_no_chunk(exchange):
    exchange.chunked()
    exchange.event(chunk("Hé"))
    exchange.send(b"zz\r\n")


@with_server(dies_before_the_first_token, answer)
async def test_a_server_that_dies_before_the_first_token_is_asked_again(backend, server):
    assert (await collect(backend))[0] == "Hé llo"


@pytest.mark.parametrize(
    "script",
    [
        dies_after_the_first_token,
        ends_in_the_middle,
        says_done_in_the_middle,
        cuts_a_chunk_off,
        sends_no_chunk,
    ],
)
def test_a_server_that_breaks_off_after_the_first_token_is_not_asked_again(script):
    @with_server(script)
    async def body(backend, server):
        texts = []
        with pytest.raises(errors.BackendUnavailable) as failed:
            async with aclosing(backend.generate(GenerateRequest(prompt="Hi"), texts.append)) as events:
                async for _ in events:
                    pass
        assert failed.value.retryable
        assert texts == ["Hé"]
        assert len(server.exchanges) == 1

    body()


@pytest.mark.parametrize(
    "data", [b"{", b"[1", b"3", b"[]", b'{"choices": 3}', b'{"choices": [{"delta": 3}]}', b"[" * 99_999]
)
def test_what_is_no_chunk_is_a_typed_error(data):
    async def odd(exchange):
        exchange.chunked()
        exchange.event(data)
        exchange.end()

    @with_server(odd)
    async def body(backend, server):
        with pytest.raises(errors.BackendUnavailable, match="no chunk"):
            await collect(backend)

    body()


@pytest.mark.parametrize(("code", "expected"), [(500, errors.BackendUnavailable), (400, errors.TypeMismatch)])
def test_an_error_within_the_stream_is_raised(code, expected):
    async def fails(exchange):
        exchange.chunked()
        exchange.event(chunk("Hé"))
        exchange.event({"error": {"code": code, "message": "out of slots"}})
        exchange.end()

    @with_server(fails)
    async def body(backend, server):
        with pytest.raises(expected, match="out of slots"):
            await collect(backend)

    body()


async def web_page(exchange):
    exchange.whole(200, b"<html>", media_type="text/html")


@with_server(web_page)
async def test_a_wrong_content_type_is_told(backend, server):
    with pytest.raises(errors.BackendUnavailable, match="text/html"):
        await collect(backend)
    with pytest.raises(errors.BackendUnavailable, match="text/html"):
        await backend.load()


async def broken_json(exchange):
    exchange.whole(200, b'{"data": [')


@with_server(broken_json)
async def test_broken_json_is_told(backend, server):
    for call in (backend.load(), backend.embed(EmbedRequest(("a",))), backend.rerank(RerankRequest("q", ("a",)))):
        with pytest.raises(errors.BackendUnavailable, match="broken JSON"):
            await call


async def no_http(exchange):
    exchange.send(b"220 mail.example ESMTP\r\n\r\n")


async def endless_headers(exchange):
    exchange.send(b"HTTP/1.1 200 OK\r\n")
    while not exchange.gone.is_set():
        exchange.send(b"X: " + b"x" * 65_536)
        await exchange.writer.drain()


@pytest.mark.parametrize("script", [no_http, endless_headers])
def test_what_is_no_http_is_a_typed_error(script):
    @with_server(script)
    async def body(backend, server):
        with pytest.raises(errors.BackendUnavailable):
            await collect(backend)

    body()


async def endless_line(exchange):
    exchange.chunked()
    exchange.chunk(b"data: ")
    while not exchange.gone.is_set():
        exchange.chunk(b"x" * 65_536)
        await exchange.writer.drain()


@with_server(endless_line)
async def test_a_line_without_end_is_too_large_and_is_left(backend, server):
    with pytest.raises(errors.TooLarge):
        await collect(backend)
    await server.exchanges[0].gone.wait()


def test_an_answer_without_end_is_too_large(monkeypatch):
    monkeypatch.setattr(http, "MAX_BODY_BYTES", 1 << 20)

    async def endless(exchange):
        exchange.chunked("application/json")
        while not exchange.gone.is_set():
            exchange.chunk(b" " * 65_536)
            await exchange.writer.drain()

    @with_server(endless)
    async def body(backend, server):
        with pytest.raises(errors.TooLarge):
            await backend.load()

    body()


async def never_ends_its_headers(exchange):
    exchange.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n")
    await exchange.gone.wait()


async def stops_in_the_middle(exchange):
    exchange.chunked()
    exchange.event(chunk("Hé"))
    await exchange.gone.wait()


SILENT = [forever, never_ends_its_headers, stops_in_the_middle]


@pytest.mark.parametrize("script", SILENT)
def test_a_server_that_falls_silent_is_given_up(script):
    @with_server(script, timeout_ms=50)
    async def body(backend, server):
        with pytest.raises(errors.BackendUnavailable, match="silent for 50 ms"):
            await collect(backend)
        await server.arrived.wait()
        await server.exchanges[0].gone.wait()
        assert len(server.exchanges) == 1

    body()


async def pings(exchange):
    exchange.chunked()
    while not exchange.gone.is_set():
        exchange.chunk(b": ping\n\n")
        await exchange.writer.drain()
        await asyncio.sleep(0.001)


async def floods(exchange):
    exchange.chunked()
    while not exchange.gone.is_set():
        exchange.event(chunk("x"))
        await exchange.writer.drain()


@pytest.mark.parametrize("script", [*SILENT, pings, floods])
def test_the_deadline_holds_whatever_the_server_does(script):
    @with_server(answer, script)
    async def body(backend, server):
        await collect(backend)  # connections take longer the first time
        with pytest.raises(errors.DeadlineExceeded, match="300 ms"):
            await collect(backend, deadline_ms=300)
        await server.exchanges[1].gone.wait()
        if script is forever:
            with pytest.raises(errors.DeadlineExceeded):
                await backend.embed(EmbedRequest(("a",), deadline_ms=50))
            with pytest.raises(errors.DeadlineExceeded):
                await backend.rerank(RerankRequest("q", ("a",), deadline_ms=50))

    body()


@with_server(stops_in_the_middle)
async def test_leaving_early_closes_the_connection(backend, server):
    events = backend.generate(GenerateRequest(prompt="Hi"))
    assert await anext(events) == TextChunk("Hé")
    assert backend.health().in_flight == 1
    await events.aclose()
    await server.exchanges[0].gone.wait()
    assert backend.health().in_flight == 0


@pytest.mark.parametrize("script", SILENT)
def test_cancelling_closes_the_connection(script):
    @with_server(script)
    async def body(backend, server):
        task = asyncio.create_task(collect(backend))
        await server.arrived.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await server.exchanges[0].gone.wait()
        assert backend.health().in_flight == 0

    body()


@pytest.mark.parametrize("script", SILENT)
def test_closing_the_backend_ends_what_runs(script):
    @with_server(script)
    async def body(backend, server):
        task = asyncio.create_task(collect(backend))
        await server.arrived.wait()
        await backend.close()
        with pytest.raises(errors.BackendUnavailable, match="unloaded"):
            await task
        with pytest.raises(errors.BackendUnavailable, match="unloaded"):
            await collect(backend)
        assert backend.health().state == "closed"
        assert len(server.exchanges) == 1

    body()


def test_closing_the_backend_ends_a_wait_for_the_next_attempt():
    async def later(exchange):
        exchange.whole(503, b"", Retry_After="25")

    @with_server(later)
    async def body(backend, server):
        task = asyncio.create_task(collect(backend))
        await server.arrived.wait()
        await backend.close()
        with pytest.raises(errors.BackendUnavailable, match="unloaded"):
            await task

    body()


def test_nobody_listening_is_a_typed_error():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # not listening: connections are refused
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"

        async def main():
            backend = OpenAIBackend(ModelSpec("m", "openai", url=url))
            with pytest.raises(errors.BackendUnavailable, match="cannot be reached"):
                await collect(backend)
            await backend.close()

        run(main())


def test_a_url_without_a_host_is_refused():
    for url in ("http://", "http://[::", "http://host:port/v1"):
        with pytest.raises(errors.TypeMismatch, match="url"):
            OpenAIBackend(ModelSpec("m", "openai", url=url))


def test_more_requests_than_a_backend_takes_are_refused(monkeypatch):
    monkeypatch.setattr(http, "MAX_IN_FLIGHT", 1)

    @with_server(forever)
    async def body(backend, server):
        task = asyncio.create_task(collect(backend))
        await server.arrived.wait()
        with pytest.raises(errors.QueueFull):
            await collect(backend)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    body()


def test_a_service_without_such_a_model_does_not_import_httpx():
    code = (
        "import sys, demandport.inference.openai as one; "
        "from demandport.inference.config import ModelSpec; "
        "one.OpenAIBackend(ModelSpec('m', 'openai', url='http://127.0.0.1:1/v1')); "
        "assert 'httpx' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
