"""The node `http-request`: whom it may ask, what it sends, what comes of it. Real servers on real sockets."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from demandport.engine.executor import Executor
from demandport.engine.registry import load_specs
from demandport.engine.session import Session
from demandport.errors import DemandportError, TypeMismatch
from demandport.nodes import BUILT_IN
from demandport.nodes.http import METHODS, OURS, HttpConfig, _allowed
from http_script import Exchange, Script, ScriptedServer, scripted
from sink import TIMEOUT_S, Sink
from support import ServiceProcess, environment

SPECS = load_specs(BUILT_IN)
Ask = Callable[..., Awaitable[Sink]]


async def ok(exchange: Exchange) -> None:
    exchange.whole(200, b"fine", "text/plain")


def with_server(test: Callable[[ScriptedServer, Ask], Awaitable[None]], *scripts: Script, **config: Any) -> None:
    """Run a test with a server that may be asked; it asks by demands on the node `it`."""

    async def main() -> None:
        with anyio.fail_after(TIMEOUT_S):
            async with scripted(*scripts) as server, anyio.create_task_group() as tasks:
                allowed = HttpConfig(**{"allow_hosts": (f"127.0.0.1:{server.port}",)} | config)
                executor = Executor(tasks, {"http": allowed})

                async def ask(path: str = "/", deadline_ms: int | None = None, wait: bool = True, **data: Any) -> Sink:
                    url = path if "//" in path else f"http://127.0.0.1:{server.port}{path}"
                    graph = {"nodes": [{"id": "it", "node_type": "http-request", "data": {"url": url} | data}]}
                    session, sink = Session(graph, SPECS, executor), Sink()
                    sink.demand = session.demand("it", sink, lambda _: None, deadline_ms=deadline_ms)
                    sink.cancel = lambda: session.cancel(sink.demand)  # type: ignore[attr-defined]
                    if wait:
                        await sink.done.wait()
                    return sink

                await test(server, ask)
                while executor.running:
                    await anyio.sleep(0)

    anyio.run(main)


def heard(*scripts: Script, config: dict[str, Any] | None = None, **data: Any) -> tuple[Sink, list[Exchange]]:
    found: list[Any] = []

    async def test(server: ScriptedServer, ask: Ask) -> None:
        found.extend((await ask(**data), server.exchanges))

    with_server(test, *scripts, **(config or {}))
    return found[0], found[1]


def outputs(*scripts: Script, config: dict[str, Any] | None = None, **data: Any) -> dict[str, Any]:
    sink, _ = heard(*scripts, config=config, **data)
    assert sink.failure is None, sink.failure
    return sink.outputs


def refusal(*scripts: Script, config: dict[str, Any] | None = None, **data: Any) -> DemandportError:
    sink, _ = heard(*(scripts or (ok,)), config=config, **data)
    assert sink.failure is not None, sink.outputs
    assert sink.failure.node == "it"
    return sink.failure


# --------------------------------------------------------------------------------------------- asking and answering


def test_a_request_and_its_answer() -> None:
    sink, (exchange,) = heard(ok, path="/a/b?c=d%20e")
    assert (exchange.method, exchange.path, exchange.body) == ("GET", "/a/b?c=d%20e", b"")
    assert exchange.headers["accept-encoding"] == "identity" and "demandport" in exchange.headers["user-agent"]
    assert sink.outputs == {
        "status": 200,
        "headers": {"content-type": "text/plain", "content-length": "4"},
        "body": "fine",
    }


@pytest.mark.parametrize("method", [*METHODS, "get", "Patch"])
def test_methods(method: str) -> None:
    async def script(exchange: Exchange) -> None:
        exchange.head(200, Content_Length="0")

    _, (exchange,) = heard(script, method=method)
    assert exchange.method == method.upper()


SENT: list[Any] = [
    (None, {}, b"", None),
    ("", {}, b"", "text/plain; charset=utf-8"),
    ("hä", {}, "hä".encode(), "text/plain; charset=utf-8"),
    (b"\0\xff", {}, b"\0\xff", "application/octet-stream"),
    ({"a": [1, None, "ä"]}, {}, json.dumps({"a": [1, None, "ä"]}).encode(), "application/json"),
    ([], {}, b"[]", "application/json"),
    (0, {}, b"0", "application/json"),
    (False, {}, b"false", "application/json"),
    ('{"a": 1}', {"Content-Type": "application/json"}, b'{"a": 1}', "application/json"),
    ({"a": 1}, {"CONTENT-type": "application/ld+json"}, b'{"a": 1}', "application/ld+json"),
]


@pytest.mark.parametrize(("body", "headers", "sent", "media_type"), SENT)
def test_what_is_sent(body: Any, headers: dict[str, str], sent: bytes, media_type: str | None) -> None:
    _, (exchange,) = heard(ok, method="POST", body=body, headers=headers)
    assert exchange.body == sent and exchange.headers.get("content-type") == media_type


def test_headers_go_along() -> None:
    _, (exchange,) = heard(ok, headers={"X-Key": " value ", "X-Number": 5, "Accept": "text/html", "X-Empty": ""})
    assert [exchange.headers[n] for n in ("x-key", "x-number", "accept", "x-empty")] == ["value", "5", "text/html", ""]


def answering(body: bytes, media_type: str | None, status: int = 200, **headers: str) -> Script:
    async def script(exchange: Exchange) -> None:
        said = {"Content_Type": media_type} if media_type else {}
        exchange.head(status, Content_Length=str(len(body)), **said, **headers)
        exchange.send(body)

    return script


BODIES: list[Any] = [
    (b'{"a": [1, "\xc3\xa4"]}', "application/json", "auto", {"a": [1, "ä"]}),
    (b'{"a": 1}', "Application/Problem+JSON; charset=utf-8", "auto", {"a": 1}),
    (b'\xef\xbb\xbf"bom"', "application/json", "auto", "bom"),
    (b'{"a": 1}', "text/plain", "auto", '{"a": 1}'),
    (b'{"a": 1}', "text/plain", "json", {"a": 1}),
    (b'{"a": 1}', "application/json", "text", '{"a": 1}'),
    (b'{"a": 1}', "application/json", "bytes", b'{"a": 1}'),
    (b"h\xe4", "text/html; charset=ISO-8859-1", "auto", "hä"),
    (b"h\xe4", "text/html; Charset = 'latin-1'", "auto", "hä"),
    ("hä".encode(), "text/html", "auto", "hä"),
    (b"h\xff", "text/plain", "auto", "h\ufffd"),
    (b"hi", "text/plain; charset=no-such", "auto", "hi"),
    (b"hi", "text/plain; charset=zlib", "auto", "hi"),
    (b"hi", "text/plain; charset=undefined", "auto", "hi"),
    (b"<a/>", "image/svg+xml", "auto", "<a/>"),
    (b"\x89PNG", "image/png", "auto", b"\x89PNG"),
    (b"what", None, "auto", b"what"),
    (b"what", None, "text", "what"),
    (b"", "application/json", "auto", None),
    (b"", "text/plain", "auto", None),
    (b"", None, "json", None),
    (b"", None, "text", ""),
    (b"", None, "bytes", b""),
]


@pytest.mark.parametrize(("body", "media_type", "parse", "expected"), BODIES)
def test_what_a_body_becomes(body: bytes, media_type: str | None, parse: str, expected: Any) -> None:
    found = outputs(answering(body, media_type), parse=parse)["body"]
    assert found == expected and type(found) is type(expected)


def test_a_large_json_answer_is_read_as_well() -> None:
    assert outputs(answering(json.dumps("x" * 2_000_000).encode(), "application/json"))["body"] == "x" * 2_000_000


@pytest.mark.parametrize("body", [b"{", b"NaN", b"\xff", b"[" * 100_000])
def test_json_that_is_none(body: bytes) -> None:
    error = refusal(answering(body, "application/json", status=500))
    assert error.code == "type_mismatch" and "take it with data.parse text" in error.message


def test_what_is_compressed_unasked_comes_as_it_is() -> None:
    packed = gzip.compress(b'{"a": 1}')
    assert outputs(answering(packed, "application/json", Content_Encoding="gzip"))["body"] == packed


@pytest.mark.parametrize("status", [201, 204, 301, 304, 400, 401, 404, 429, 500, 503])
def test_every_status_is_an_output(status: int) -> None:
    async def script(exchange: Exchange) -> None:
        exchange.head(status, **({} if status in (204, 304) else {"Content_Length": "0"}), Location="/elsewhere")

    sink, exchanges = heard(script)
    assert sink.outputs["status"] == status and sink.outputs["body"] is None and len(exchanges) == 1


def test_repeated_headers() -> None:
    async def script(exchange: Exchange) -> None:
        exchange.send(b"HTTP/1.1 200 OK\r\nX-A: 1\r\nx-a: 2\r\nSet-Cookie: a=1, x\r\nSet-Cookie: b=2\r\n")
        exchange.send(b"Content-Length: 0\r\n\r\n")

    headers = outputs(script)["headers"]
    assert headers["x-a"] == "1, 2" and headers["set-cookie"] == ["a=1, x", "b=2"]


def test_a_body_in_many_pieces() -> None:
    whole = "".join(f"{n} ä😀\n" for n in range(2000)).encode()

    async def script(exchange: Exchange) -> None:
        exchange.chunked("text/plain; charset=utf-8")
        for start in range(0, len(whole), 7):
            exchange.chunk(whole[start : start + 7])
            if start % 700 == 0:
                await exchange.writer.drain()
                await asyncio.sleep(0)
        exchange.end()

    assert outputs(script)["body"] == whole.decode()


# ---------------------------------------------------------------------------------------------- who may be asked


def test_nobody_may_be_asked_by_default() -> None:
    sink, exchanges = heard(ok, config={"allow_hosts": ()})
    assert sink.failure and sink.failure.code == "forbidden" and exchanges == []
    assert "name it in `allow_hosts` of the configuration's table [http]" in sink.failure.message


ALLOWED = [
    ("api.example.com", "http://api.example.com/x"),
    ("api.example.com", "https://api.example.com/x"),
    ("api.example.com", "https://API.Example.COM/x"),
    ("API.example.com.", "https://api.example.com/x"),
    ("api.example.com", "https://api.example.com./x"),
    ("api.example.com", "https://api.example.com:443/x"),
    ("api.example.com", "HTTP://api.example.com:80/x"),
    ("api.example.com:443", "https://api.example.com/x"),
    ("api.example.com:8080", "http://api.example.com:8080/x"),
    ("api.example.com:*", "http://api.example.com:8080/x"),
    ("api.example.com:*", "http://api.example.com/x"),
    ("*.example.org", "http://a.example.org/"),
    ("*.example.org", "http://a.b.example.org./"),
    ("*.example.org:81", "http://a.example.org:81/"),
    ("127.0.0.1:8080", "http://127.0.0.1:8080/"),
    ("[::1]", "http://[::1]/"),
    ("[::1]:*", "http://[0:0:0:0:0:0:0:1]:99/"),
    ("[0:0::1]:99", "http://[::1]:99/"),
    ("xn--bcher-kva.example", "https://bücher.example/"),
    ("api.example.com", "https://api.example.com?x=http://evil.test/"),
]


@pytest.mark.parametrize(("pattern", "url"), ALLOWED)
def test_a_url_that_is_allowed(pattern: str, url: str) -> None:
    asked = _allowed(url, HttpConfig(allow_hosts=(pattern,)))
    assert asked.host == httpx.URL(url.lower().replace("./", "/").replace("0:0:0:0:0:0:0:1", "::1")).host


FORBIDDEN = [
    ("api.example.com", "http://evil.test/"),
    ("api.example.com", "http://example.com/"),
    ("api.example.com", "http://x.api.example.com/"),
    ("api.example.com", "http://api.example.com.evil.test/"),
    ("api.example.com", "http://api-example.com/"),
    ("api.example.com", "http://apixexample.com/"),
    ("api.example.com", "http://api.example.com../"),
    ("api.example.com", "http://api.example.com:8080/"),
    ("api.example.com", "http://api.example.com:443/"),
    ("api.example.com", "https://api.example.com:80/"),
    ("api.example.com:443", "http://api.example.com/"),
    ("api.example.com:8080", "http://api.example.com:8081/"),
    ("api.example.com", "http://api%2eexample.com/"),
    ("api.example.com", "http://api.example.com%00.evil.test/"),
    ("api.example.com", "http://evil.test/api.example.com"),
    ("api.example.com", "http://evil.test?api.example.com"),
    ("api.example.com", "http://evil.test#@api.example.com/"),
    ("api.example.com", "http://evil.test;api.example.com/"),
    ("*.example.org", "http://example.org/"),
    ("*.example.org", "http://evilexample.org/"),
    ("*.example.org", "http://.example.org.evil.test/"),
    ("127.0.0.1", "http://2130706433/"),
    ("127.0.0.1", "http://0x7f000001/"),
    ("127.0.0.1", "http://127.1/"),
    ("127.0.0.1", "http://localhost/"),
    ("127.0.0.1", "http://[::ffff:127.0.0.1]/"),
    ("[::1]", "http://[::1%25lo]/"),
    ("[::1]", "http://[::2]/"),
]
#: Users and passwords, which make one host look like another.
DRESSED = [
    "http://api.example.com@evil.test/",
    "http://api.example.com:80@evil.test/",
    "http://evil.test@api.example.com/",
    "http://user:s3cret@api.example.com/",
    "http://user@api.example.com/",
    "http://evil.test\\@api.example.com/",
]
NONE = [
    "", "api.example.com", "//api.example.com/", "/path", "http:api.example.com", "http:///x", "http://:80/",
    "ftp://api.example.com/", "file:///etc/passwd", "javascript:alert(1)", "http://api.example.com\r\nX: y/",
    "http://api.example.com\t/", "http://api.example.com:port/", "http://user:s3cret", "http://[::1/", "http://[x]/",
    "http://ａpi.example.com/", "http://\ud800.test/", "http://0177.0.0.1/",
    "http://" + "x" * 70_000,
]  # fmt: skip


def refused(url: str, pattern: str = "api.example.com") -> DemandportError:
    with pytest.raises(DemandportError) as caught:
        _allowed(url, HttpConfig(allow_hosts=(pattern,)))
    assert "s3cret" not in str(caught.value.to_wire())
    return caught.value


@pytest.mark.parametrize(("pattern", "url"), FORBIDDEN)
def test_a_url_that_is_forbidden(pattern: str, url: str) -> None:
    error = refused(url, pattern)
    assert error.code == "forbidden" and "is not among `allow_hosts` of the configuration's table" in error.message


@pytest.mark.parametrize("url", DRESSED)
def test_a_url_with_a_user_in_it_is_forbidden(url: str) -> None:
    error = refused(url)
    assert error.code == "forbidden" and "must not hold a user or password" in error.message


@pytest.mark.parametrize("url", NONE)
def test_what_is_no_url(url: str) -> None:
    assert refused(url).code == "type_mismatch"


def test_a_host_with_a_trailing_dot_and_capitals_is_really_asked() -> None:
    async def test(server: ScriptedServer, ask: Ask) -> None:
        sink = await ask(f"http://LOCALHOST.:{server.port}/")
        assert sink.outputs["status"] == 200
        assert server.exchanges[0].headers["host"] == f"localhost:{server.port}"

    with_server(test, ok, allow_hosts=("localhost:*",))


@pytest.mark.parametrize("pattern", ["", "*", "*.", "http://x", "x/y", "x:0", "x:70000", "x y", "a..b", "[::1", "[x]"])
def test_a_pattern_that_is_none(pattern: str) -> None:
    with pytest.raises(TypeMismatch, match="parameter allow_hosts must hold hosts such as"):
        HttpConfig(allow_hosts=(pattern,))


# -------------------------------------------------------------------------------------------------------- redirects


def redirecting(location: str, status: int = 302) -> Script:
    async def script(exchange: Exchange) -> None:
        exchange.head(status, Content_Length="0", Location=location)

    return script


def test_a_redirect_is_followed_where_that_is_wanted() -> None:
    sink, (first, second) = heard(
        redirecting("/next?x=1"), ok, follow_redirects=True, method="POST", body="b", headers={"X-Key": "k"}
    )
    assert sink.outputs["body"] == "fine"
    assert (second.method, second.path, second.body) == ("GET", "/next?x=1", b"") and first.body == b"b"
    assert second.headers["x-key"] == "k" and second.headers["accept-encoding"] == "identity"


def test_a_redirect_may_keep_the_body() -> None:
    _, (_, second) = heard(redirecting("/next", 307), ok, follow_redirects=True, method="POST", body="b")
    assert (second.method, second.body) == ("POST", b"b")


@pytest.mark.parametrize(
    ("location", "code"),
    [
        ("http://evil.test/", "forbidden"),
        ("//evil.test/", "forbidden"),
        ("http://127.0.0.1:1/", "forbidden"),
        ("http://127.0.0.1@evil.test/", "forbidden"),
        ("http://user:s3cret@127.0.0.1/", "forbidden"),
        ("file:///etc/passwd", "type_mismatch"),
    ],
)
def test_every_redirect_must_lead_to_an_allowed_host(location: str, code: str) -> None:
    sink, exchanges = heard(redirecting("/once"), redirecting(location), ok, follow_redirects=True)
    assert sink.failure and sink.failure.code == code and len(exchanges) == 2
    assert "s3cret" not in sink.failure.message


def test_no_secret_goes_along_to_another_origin() -> None:
    async def test(server: ScriptedServer, ask: Ask) -> None:
        location = f"http://localhost:{server.port}/there"
        server._scripts = (redirecting(location, 307), ok)
        secrets = {"Authorization": "Bearer s3cret", "X-Api-Key": "s3cret", "Cookie": "a=s3cret"}
        sink = await ask(follow_redirects=True, method="POST", body="b", headers=secrets | {"Accept": "text/html"})
        first, second = server.exchanges
        assert sink.outputs["status"] == 200 and second.headers["host"] == f"localhost:{server.port}"
        assert str(first.headers).count("s3cret") == 3 and "s3cret" not in str(second.headers)
        assert (second.body, second.headers["accept"], second.headers["content-length"]) == (b"b", "text/html", "1")

    with_server(test, ok, allow_hosts=("localhost:*", "127.0.0.1:*"))


def test_redirects_in_a_circle() -> None:
    sink, exchanges = heard(redirecting("/again"), follow_redirects=True)
    assert sink.failure and sink.failure.code == "node_failed" and "more than 10 redirects" in sink.failure.message
    assert len(exchanges) == 11


# --------------------------------------------------------------------------------------------------- what is wrong

BAD: list[Any] = [
    ({"method": "CONNECT"}, "type_mismatch", "method must be one of GET, HEAD"),
    ({"method": "GET / HTTP/1.1\r\nX: y"}, "type_mismatch", "method must be one of"),
    ({"parse": "xml"}, "type_mismatch", "parse must be one of auto, json, text, bytes, not 'xml'"),
    ({"timeout_ms": 0}, "type_mismatch", "timeout_ms must be at least 1"),
    ({"headers": ["a"]}, "type_mismatch", "headers must be a map, not list"),
    ({"headers": {"X-A": "1\r\nX-B: 2"}}, "type_mismatch", "header X-A must be one line of ASCII text"),
    ({"headers": {"X-A": "1\nHost: evil"}}, "type_mismatch", "header X-A must be one line"),
    ({"headers": {"X-A": "1\0"}}, "type_mismatch", "header X-A must be one line"),
    ({"headers": {"X-A": "ä"}}, "type_mismatch", "header X-A must be one line of ASCII text"),
    ({"headers": {"X-A": None}}, "type_mismatch", "header X-A must be one line"),
    ({"headers": {"X-A\r\nX-B": "1"}}, "type_mismatch", "headers cannot have one of the name"),
    ({"headers": {"X A": "1"}}, "type_mismatch", "headers cannot have one of the name"),
    ({"headers": {"": "1"}}, "type_mismatch", "headers cannot have one of the name"),
    ({"headers": {"X:": "1"}}, "type_mismatch", "headers cannot have one of the name"),
    *[({"headers": {name: "evil.test"}}, "forbidden", f"header {name} is not a request's own") for name in OURS],
    ({"headers": {"HOST": "evil.test"}}, "forbidden", "header HOST is not a request's own"),
    ({"body": {"a": float("nan")}}, "type_mismatch", "body holds what JSON cannot say"),
    ({"body": {"a": b"x"}}, "type_mismatch", "body holds what JSON cannot say"),
    ({"body": "x" * 101, "config": {"max_body_bytes": 100}}, "too_large", "body is over the 100 bytes"),
    ({"path": "http://evil.test/"}, "forbidden", "the host evil.test is not among"),
]


@pytest.mark.parametrize(("data", "code", "says"), BAD, ids=[f"{n} {says}" for n, (_, _, says) in enumerate(BAD)])
def test_what_is_wrong_is_said_and_nobody_is_asked(data: dict[str, Any], code: str, says: str) -> None:
    sink, exchanges = heard(ok, **data)
    assert sink.failure and sink.failure.code == code and re.search(says, sink.failure.message)
    assert exchanges == []


# ------------------------------------------------------------------------------------------------ servers that fail


async def hang_up(exchange: Exchange) -> None:
    exchange.abort()


async def die_in_the_body(exchange: Exchange) -> None:
    exchange.head(200, Content_Type="text/plain", Content_Length="100")
    exchange.send(b"half")
    await exchange.writer.drain()
    exchange.writer.close()


async def die_between_chunks(exchange: Exchange) -> None:
    exchange.chunked("text/plain")
    exchange.chunk(b"half")
    await exchange.writer.drain()
    exchange.writer.close()


async def speak_something_else(exchange: Exchange) -> None:
    exchange.send(b"220 smtp.example.com ESMTP\r\n\r\n")


async def endless_headers(exchange: Exchange) -> None:
    exchange.send(b"HTTP/1.1 200 OK\r\n" + b"X-Very: long\r\n" * 100_000)
    await exchange.gone.wait()


@pytest.mark.parametrize(
    "script", [hang_up, die_in_the_body, die_between_chunks, speak_something_else, endless_headers]
)
def test_no_answer_is_an_error_and_never_a_status(script: Script) -> None:
    error = refusal(script, path="/x?key=s3cret")
    assert error.code == "backend_unavailable" and error.retryable
    assert re.match(r"the connection to 127\.0\.0\.1:\d+ broke: ", error.message) and "s3cret" not in error.message


def test_nobody_listens() -> None:
    async def test(server: ScriptedServer, ask: Ask) -> None:
        gone = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        port = gone.sockets[0].getsockname()[1]
        gone.close()
        await gone.wait_closed()
        sink = await ask(f"http://127.0.0.1:{port}/")
        assert sink.failure and sink.failure.code == "backend_unavailable"
        assert re.match(rf"127\.0\.0\.1:{port} cannot be reached", sink.failure.message)

    with_server(test, ok, allow_hosts=("127.0.0.1:*",))


def test_tls_that_is_none() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Speak plainly\r\n\r\n")
        writer.close()

    async def test(_: ScriptedServer, ask: Ask) -> None:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as plain:
            sink = await ask(f"https://127.0.0.1:{plain.sockets[0].getsockname()[1]}/")
        assert (
            sink.failure and sink.failure.code == "backend_unavailable" and "cannot be reached" in sink.failure.message
        )

    with_server(test, ok, allow_hosts=("127.0.0.1:*",))


@pytest.mark.parametrize("stated", [True, False])
def test_an_answer_over_the_limit(stated: bool) -> None:
    async def script(exchange: Exchange) -> None:
        if stated:
            exchange.head(200, Content_Length=str(1 << 40))
        else:
            exchange.chunked()
        while not exchange.gone.is_set():
            (exchange.send if stated else exchange.chunk)(bytes(65536))
            await exchange.writer.drain()
            await asyncio.sleep(0)

    error = refusal(script, config={"max_body_bytes": 1_000_000})
    assert error.code == "too_large" and error.details == {"status": 200, "max_body_bytes": 1_000_000}
    assert outputs(answering(bytes(100), None), config={"max_body_bytes": 100})["body"] == bytes(100)


async def silent(exchange: Exchange) -> None:
    await exchange.gone.wait()


async def slow_body(exchange: Exchange) -> None:
    exchange.chunked("text/plain")
    exchange.chunk(b"half")
    await exchange.gone.wait()


@pytest.mark.parametrize("script", [silent, slow_body])
@pytest.mark.parametrize("how", ["timeout_ms", "configured", "deadline", "cancel"])
def test_whoever_waits_no_longer_hangs_up(script: Script, how: str) -> None:
    async def test(server: ScriptedServer, ask: Ask) -> None:
        data: dict[str, Any] = {"timeout_ms": 300} if how == "timeout_ms" else {}
        if how == "configured":
            data = {"timeout_ms": 1_000_000}
        sink = await ask(deadline_ms=300 if how == "deadline" else None, wait=how != "cancel", **data)
        if how == "cancel":
            await server.arrived.wait()
            sink.cancel()  # type: ignore[attr-defined]
        else:
            await server.arrived.wait()
        assert sink.failure and sink.failure.code == ("cancelled" if how == "cancel" else "deadline_exceeded")
        if how in ("timeout_ms", "configured"):
            assert sink.failure.message == "no answer within 300 ms"
        await server.exchanges[0].gone.wait()

    with_server(test, script, timeout_ms=300 if how == "configured" else 60_000)


# ---------------------------------------------------------------------------------------------------- what is told


def test_no_log_tells_a_url_or_a_header(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    heard(ok, path="/x?key=s3cret", headers={"Authorization": "Bearer s3cret"})
    heard(hang_up, path="/x?key=s3cret", headers={"Authorization": "Bearer s3cret"})
    assert "s3cret" not in caplog.text


def test_proxies_and_passwords_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login user password s3cret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    _, (exchange,) = heard(ok)
    assert "authorization" not in exchange.headers


def test_httpx_is_imported_by_the_first_request_alone() -> None:
    code = "import sys; import demandport.service.main, demandport.nodes.http; print('httpx' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_the_service_honours_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[http]\nallow_hosts = ['127.0.0.1:1']")
    with ServiceProcess("--config", str(tmp_path / "config.toml")) as service:
        urls = {"allowed": "http://127.0.0.1:1/", "other": "http://127.0.0.1:2/"}
        service.open("s", *((name, "http-request", {"url": url}) for name, url in urls.items()))
        codes = [service.request("demand", "s", name, {})[2]["code"] for name in urls]
    assert codes == ["backend_unavailable", "forbidden"]  # nobody listens on port 1
