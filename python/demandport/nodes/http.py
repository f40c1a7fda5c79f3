"""Requests to hosts of the operator's choice (the table ``[http]`` of the configuration); none by default.

A host is allowed by the name that stands in the URL. What address that name has is not looked at: whoever answers for
an allowed name in the DNS decides where a request goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import json
import logging
import os
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

from demandport.engine.node import Context, node
from demandport.errors import BackendUnavailable, DeadlineExceeded, Forbidden, NodeFailed, TooLarge, TypeMismatch
from demandport.graph.spec import Port, read_json
from demandport.settings import Tables, known_options, placed, strings, whole, wrong

if TYPE_CHECKING:
    import ssl

    import httpx

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
PARSES = ("auto", "json", "text", "bytes")
MAX_REDIRECTS = 10
_PORTS = {"http": 80, "https": 443}
#: Headers that say to whom a request goes and how it is framed: a request's own would be a way around the allow-list.
# fmt: off
OURS = frozenset((
    "host", "content-length", "transfer-encoding", "connection", "keep-alive", "upgrade", "te", "trailer", "expect",
    "accept-encoding", "proxy-connection", "proxy-authorization",
))
#: Headers that go along when a redirect leads to another origin; any other may be a secret of the first one.
_PUBLIC = frozenset((
    "host", "accept", "accept-encoding", "accept-language", "connection", "content-type", "content-length",
    "transfer-encoding", "user-agent",
))
# fmt: on
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"[\t\x20-\x7e]*")
_CHARSET = re.compile(r"""charset\s*=\s*["']?([^\s;"']+)""", re.IGNORECASE)
_TEXTS = ("application/xml", "application/javascript", "application/x-www-form-urlencoded", "application/yaml")
# Parsing more than this would hold up the loop.
_PARSE_ON_THREAD_BYTES = 1 << 20


# ------------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True, slots=True)
class Rule:
    """Hosts that may be asked.

    Attributes:
        host: a name or an address. below: the names under it instead, at any depth.
        port: the one port; None: the scheme's own, 80 or 443; 0: any.
    """

    host: str
    below: bool = False
    port: int | None = None

    def allows(self, url: httpx.URL) -> bool:
        """Whether this URL, its host in the form of `_allowed`, may be asked."""
        host = url.raw_host.decode("ascii")  # as it goes to the DNS: other letters than ASCII's are spelled so
        same = host.endswith("." + self.host) if self.below else host == self.host
        if self.port is None:
            return same and url.port is None
        return same and self.port in (0, url.port or _PORTS[url.scheme])


@dataclass(frozen=True, slots=True)
class HttpConfig:
    """Whom `http-request` may ask, and how much.

    Attributes:
        allow_hosts: ``api.example.com`` (on the port of the scheme), ``127.0.0.1:8080``, ``[::1]:*`` (any port),
            ``*.example.org`` (the names below it, not itself).
        max_body_bytes: largest body, of a request and of an answer.
        timeout_ms: most that a request may take, with all its redirects.
        rules: `allow_hosts`, read.
    """

    allow_hosts: tuple[str, ...] = ()
    max_body_bytes: int = 16 << 20
    timeout_ms: int = 30_000
    rules: tuple[Rule, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        whole(self, "max_body_bytes", 1, 1 << 30)
        whole(self, "timeout_ms", 1, 2**31)
        object.__setattr__(self, "rules", tuple(_rule(pattern) for pattern in self.allow_hosts))


def load_config(tables: Tables, environment: Mapping[str, str] = os.environ) -> HttpConfig:
    """What the table ``[http]`` says, and above it ``DEMANDPORT_HTTP_ALLOW_HOSTS`` (separated by commas).

    Raises:
        TypeMismatch: a key is unknown or has a wrong value; the message names it.
    """
    with placed(tables.place("http")):
        table = tables.take("http")
        if not isinstance(table, dict):
            raise TypeMismatch("must be a table")
        options = known_options(HttpConfig, table)
        config = HttpConfig(**options | {"allow_hosts": strings(options, "allow_hosts")})
    if (hosts := environment.get("DEMANDPORT_HTTP_ALLOW_HOSTS")) is not None:
        with placed("DEMANDPORT_HTTP_ALLOW_HOSTS"):
            config = replace(config, allow_hosts=tuple(part.strip() for part in hosts.split(",") if part.strip()))
    return config


_PATTERN = re.compile(
    r"(?P<below>\*\.)?(?P<name>[a-z0-9_-]+(\.[a-z0-9_-]+)*)\.?(:(?P<port>\d{1,5}|\*))?"
    r"|\[(?P<v6>[0-9a-f:.]+)\](:(?P<v6port>\d{1,5}|\*))?"
)


def _rule(pattern: str) -> Rule:
    found = _PATTERN.fullmatch(pattern.lower())
    try:
        host = found and (found["name"] or str(ipaddress.IPv6Address(found["v6"])))
    except ValueError:
        host = None
    port = found and (found["port"] or found["v6port"])
    if not found or not host or (port and port != "*" and not 0 < int(port) < 1 << 16):
        says = "must hold hosts such as api.example.com, *.example.org, 127.0.0.1:8080 or [::1]:*"
        raise wrong("allow_hosts", f"{says}, not {pattern!r:.80}")
    return Rule(host, bool(found["below"]), None if port is None else 0 if port == "*" else int(port))


# ------------------------------------------------------------------------------------------------------- the node


_OUTPUTS = {
    "status": Port(type="integer", description="Of the last answer, whatever it is."),
    "headers": Port(type="json", description="By name in lower case; repeated ones joined, `set-cookie` a list."),
    "body": Port(type="any", description="nil if empty, else the value of JSON, text by its charset, or bytes."),
}


@node("http-request", category="data", outputs=_OUTPUTS)
async def http_request(
    ctx: Context,
    url: str,
    method: str = "GET",
    headers: Annotated[dict[str, Any] | None, Port(type="json", description="A map of texts; numbers will do.")] = None,
    body: Annotated[Any, Port(description="Text, bytes, or a value that is sent as JSON.")] = None,
    timeout_ms: Annotated[int | None, Port(type="integer", description="At most the configured limit.")] = None,
    follow_redirects: Annotated[bool, Port(type="boolean", description="Each must lead to an allowed host.")] = False,
    parse: Annotated[str, Port(type="string", description="What body is: auto, json, text or bytes.")] = "auto",
) -> dict[str, Any]:
    """Asks a host that the configuration allows. Every status is an output; no answer is an error.

    By its content type a JSON answer becomes its value, text becomes text by its charset, anything else bytes, and an
    empty one nil; with `parse` it is what that says. Cancel closes the connection.
    """
    config: HttpConfig | None = ctx.resources.get("http")
    if config is None or not config.rules:
        raise Forbidden("no host may be asked; name it in `allow_hosts` of the configuration's table [http]")
    if parse not in PARSES:
        raise TypeMismatch(f"parse must be one of {', '.join(PARSES)}, not {parse!r:.40}")
    if method.upper() not in METHODS:
        raise TypeMismatch(f"method must be one of {', '.join(METHODS)}, not {method!r:.40}")
    if timeout_ms is not None and timeout_ms < 1:
        raise TypeMismatch(f"timeout_ms must be at least 1, not {timeout_ms}")
    content, media_type = _content(body, config.max_body_bytes)
    asked = _Request(method.upper(), url, _headers(headers, media_type), content, follow_redirects)
    async with _limited(config.timeout_ms if timeout_ms is None else min(timeout_ms, config.timeout_ms)):
        answer = await _ask(asked, config)
        return answer | {"body": await _body(answer["body"], answer["headers"], parse)}


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    url: str
    headers: Mapping[str, str]
    content: bytes | None
    follow_redirects: bool


@contextlib.asynccontextmanager
async def _limited(limit_ms: int) -> AsyncIterator[None]:
    limit = asyncio.timeout(limit_ms / 1000)
    try:
        async with limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise DeadlineExceeded(f"no answer within {limit_ms} ms", details={"timeout_ms": limit_ms}) from None


def _headers(given: Any, media_type: str | None) -> dict[str, str]:
    """What goes out, names in lower case."""
    if given is not None and not isinstance(given, dict):
        raise TypeMismatch(f"headers must be a map, not {type(given).__name__}")
    headers = {"accept": "*/*", "user-agent": "demandport"} | ({"content-type": media_type} if media_type else {})
    for name, value in (given or {}).items():
        text = value if isinstance(value, str) else json.dumps(value) if type(value) in (int, float) else None
        if not _TOKEN.fullmatch(name):
            raise TypeMismatch(f"headers cannot have one of the name {name!r:.40}")
        if text is None or not _VALUE.fullmatch(text):  # the value is told to nobody: it may be a key
            raise TypeMismatch(f"the header {name:.40} must be one line of ASCII text")
        if name.lower() in OURS:
            raise Forbidden(f"the header {name:.40} is not a request's own to set")
        headers[name.lower()] = text.strip()
    return headers


def _content(body: Any, limit_bytes: int) -> tuple[bytes | None, str | None]:
    """The bytes to send, and what they are."""
    if body is None:
        return None, None
    if isinstance(body, bytes):
        content, media_type = body, "application/octet-stream"
    elif isinstance(body, str):
        content, media_type = body.encode(), "text/plain; charset=utf-8"
    else:
        try:
            content, media_type = json.dumps(body, allow_nan=False).encode(), "application/json"
        except (TypeError, ValueError, RecursionError) as failed:
            raise TypeMismatch(f"body holds what JSON cannot say: {failed}") from None
    if len(content) > limit_bytes:
        raise TooLarge(f"body is over the {limit_bytes} bytes that max_body_bytes of [http] allows")
    return content, media_type


# -------------------------------------------------------------------------------------------------- on the network


async def _ask(asked: _Request, config: HttpConfig) -> dict[str, Any]:
    """Status, headers and the bytes of the body that the last of the hosts answered with."""
    tls = await asyncio.to_thread(_tls)
    import httpx

    # Neither proxies nor passwords of the environment: they would stand between a request and its allow-list.
    async with httpx.AsyncClient(verify=tls, trust_env=False, timeout=None, limits=_one_connection()) as client:
        request = client.build_request(
            asked.method, _allowed(asked.url, config), headers=_plain(asked.headers), content=asked.content
        )
        for _ in range(MAX_REDIRECTS + 1):
            with _failures(request.url):
                response = await client.send(request, stream=True)
                async with contextlib.aclosing(response):
                    if response.next_request is None or not asked.follow_redirects:
                        return await _read(response, config.max_body_bytes)
            request = _next(request, response.next_request, config)
    raise NodeFailed(f"more than {MAX_REDIRECTS} redirects; the last host was {_shown(request.url)}")


def _plain(headers: Mapping[str, str]) -> dict[str, str]:
    # What is compressed may be a thousand times what it seems.
    return {**headers, "accept-encoding": "identity"}


def _next(before: httpx.Request, request: httpx.Request, config: HttpConfig) -> httpx.Request:
    """The request that a redirect asks for; another origin gets no header that may be a secret."""
    url = _allowed(request.url, config)
    request.url = url
    if (url.scheme, url.host, url.port) != (before.url.scheme, before.url.host, before.url.port):
        for name in [name for name in request.headers if name.lower() not in _PUBLIC]:
            del request.headers[name]
    return request


async def _read(response: httpx.Response, limit_bytes: int) -> dict[str, Any]:
    data = bytearray()
    async for chunk in response.aiter_raw():
        data += chunk
        if len(data) > limit_bytes:
            raise TooLarge(
                f"{_shown(response.url)} answers with more than the {limit_bytes} bytes of max_body_bytes in [http]",
                details={"status": response.status_code, "max_body_bytes": limit_bytes},
            )
    headers: dict[str, Any] = {name.lower(): response.headers[name] for name in response.headers}
    if "set-cookie" in headers:
        headers["set-cookie"] = response.headers.get_list("set-cookie")
    return {"status": response.status_code, "headers": headers, "body": bytes(data)}


def _allowed(url: str | httpx.URL, config: HttpConfig) -> httpx.URL:
    """The URL as it is asked: that which was read is what was checked, and no text is read twice."""
    import httpx

    try:
        read = httpx.URL(url)
        host = read.raw_host.decode("ascii").lower().removesuffix(".")
    except (httpx.InvalidURL, ValueError, TypeError):
        raise TypeMismatch("url is none; give one such as https://api.example.com/path") from None
    if read.scheme not in _PORTS or not host:
        raise TypeMismatch("url must begin with http:// or https:// and name a host")
    if read.userinfo:
        raise Forbidden("url must not hold a user or password; give them as a header")
    with contextlib.suppress(ValueError):
        host = str(ipaddress.ip_address(host))
    read = read.copy_with(host=host)
    if not any(rule.allows(read) for rule in config.rules):
        raise Forbidden(f"the host {_shown(read)} is not among `allow_hosts` of the configuration's table [http]")
    return read


@contextlib.contextmanager
def _failures(url: httpx.URL) -> Iterator[None]:
    """Turn what httpx raises into errors of ours; the path and query of a URL may hold a key, and are not told."""
    import httpx

    try:
        yield
    except httpx.ConnectError as failed:
        raise BackendUnavailable(f"{_shown(url)} cannot be reached: {failed}") from None
    except (httpx.TransportError, httpx.StreamError) as failed:
        raise BackendUnavailable(f"the connection to {_shown(url)} broke: {failed or type(failed).__name__}") from None


def _shown(url: httpx.URL) -> str:
    return url.netloc.decode("ascii", "replace").rpartition("@")[2][:200]


@functools.cache
def _tls() -> ssl.SSLContext:
    """What servers' certificates are checked against. Blocks: it imports httpx and reads them."""
    import httpx

    # They log every URL, with the keys that some have in them.
    for name in ("httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return httpx.create_ssl_context()


def _one_connection() -> httpx.Limits:
    import httpx

    return httpx.Limits(max_keepalive_connections=0)


# ------------------------------------------------------------------------------------------------------- the body


async def _body(data: bytes, headers: Mapping[str, Any], parse: str) -> Any:
    """The body of an answer, as `parse` wants it."""
    stated = headers.get("content-type", "")
    media_type = stated.partition(";")[0].strip().lower()
    if parse == "bytes":
        return data
    if parse == "text":
        return _text(data, stated)
    if not data:
        return None
    if parse == "auto" and headers.get("content-encoding", "identity").lower() != "identity":
        return data
    if parse == "json" or media_type == "application/json" or media_type.endswith("+json"):
        return await _json(data)
    if media_type.startswith("text/") or media_type.endswith("+xml") or media_type in _TEXTS:
        return _text(data, stated)
    return data


async def _json(data: bytes) -> Any:
    def parsed() -> Any:
        return read_json(data.decode(json.detect_encoding(data)))

    try:
        return await asyncio.to_thread(parsed) if len(data) > _PARSE_ON_THREAD_BYTES else parsed()
    except ValueError as failed:
        raise TypeMismatch(f"the answer is no JSON ({failed}); take it with data.parse text") from None


def _text(data: bytes, content_type: str) -> str:
    stated = _CHARSET.search(content_type)
    try:
        return data.decode(stated[1] if stated else "utf-8", "replace")
    except (LookupError, ValueError):  # no such charset
        return data.decode("utf-8", "replace")
