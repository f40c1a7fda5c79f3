"""What the backends that speak to servers share: requests that are bounded and timed, and failures as errors of ours.

A request is tried again only before the first token, only for what may pass (no connection, 408, 429, 5xx), and only
while the deadline allows it. No redirect is followed: it would carry the key to another host.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from demandport.errors import (
    BackendUnavailable,
    ContextOverflow,
    DeadlineExceeded,
    DemandportError,
    Forbidden,
    ModelNotFound,
    QueueFull,
    TooLarge,
    TypeMismatch,
)
from demandport.inference.backend import (
    BackendHealth,
    BackendState,
    Capabilities,
    Embeddings,
    Event,
    Finished,
    Progress,
    TextChunk,
)
from demandport.inference.config import ModelSpec
from demandport.inference.requests import EmbedRequest, GenerateRequest, RerankRequest
from demandport.settings import wrong

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")

#: Requests that may run or wait in one backend.
MAX_IN_FLIGHT = 1024
#: Largest answer that is read whole.
MAX_BODY_BYTES = 256 << 20
#: How often a request is tried again, and the waits between.
RETRIES = 2
FIRST_RETRY_S = 0.2
#: A server that wants a longer wait than this is not waited for.
MOST_RETRY_S = 30.0
_ERROR_BYTES = 64 << 10
_ERROR_CHARACTERS = 500
# Parsing more than this would hold up the loop.
_PARSE_ON_THREAD_BYTES = 1 << 20
#: What reading a JSON value of another shape than expected raises.
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError)
_TRANSIENT = {408, 429, 500, 502, 503, 504}
_OVERFLOW = (
    "context_length_exceeded",
    "exceed_context_size",
    "maximum context length",
    "exceeds the context length",
    "exceed context window",
    "available context size",
    "too large to process",
)


class Again(Exception):
    """A request failed so that trying it again may help.

    Attributes:
        error: what is raised when it is not. after_s: how long the server asks to be left alone; None: it does not.
    """

    def __init__(self, error: DemandportError, after_s: float | None = None) -> None:
        super().__init__(error.message)
        self.error, self.after_s = error, after_s


@dataclass(frozen=True, slots=True)
class Deadline:
    """Until when a request may take, on the loop's clock.

    Attributes:
        limit_ms: what was asked for; None: no limit. at: when that is over.
    """

    limit_ms: int | None
    at: float | None

    @classmethod
    def after(cls, limit_ms: int | None) -> Deadline:
        """The deadline `limit_ms` milliseconds from now."""
        return cls(limit_ms, None if limit_ms is None else asyncio.get_running_loop().time() + limit_ms / 1000)

    def left_s(self) -> float:
        """Seconds that are left; infinite without a limit."""
        return float("inf") if self.at is None else self.at - asyncio.get_running_loop().time()

    async def wait(self, start: Callable[[], Awaitable[T]]) -> T:
        """Await what `start` makes, no longer than the deadline.

        Raises:
            DeadlineExceeded: it has passed; what was awaited is cancelled.
        """
        if self.at is None:
            return await start()
        if self.left_s() <= 0:
            raise self._exceeded()
        limit = asyncio.timeout_at(self.at)
        try:
            async with limit:
                return await start()
        except TimeoutError:
            if limit.expired():
                raise self._exceeded() from None
            raise

    def _exceeded(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"the deadline of {self.limit_ms} ms has passed")


class HttpServer:
    """One server: its address, its key, and a pool of connections that is opened at the first request.

    Belongs to the event loop's thread. httpx is imported at the first request, on a thread.

    Args:
        url: what every path is appended to.
        name: what messages call it.
        timeout_ms: how long it may be silent.
        key: bearer token; None: none is sent.
    """

    def __init__(self, url: str, *, name: str, timeout_ms: int, key: str | None = None) -> None:
        self.name = name
        self._url, self._timeout_ms, self._key = url.rstrip("/") + "/", timeout_ms, key
        self._made: httpx.AsyncClient | None = None
        self._closed = False

    async def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON value that the server answers with; tried once.

        Raises:
            Again: it failed, and may pass.
            DemandportError: it failed.
        """
        chunks: list[bytes] = []
        async with self._answer(method, path, body, ("application/json",)) as response:
            size = 0
            async for chunk in response.aiter_bytes():
                size += len(chunk)
                if size > MAX_BODY_BYTES:
                    raise TooLarge(f"{self.name} answers with more than {MAX_BODY_BYTES} bytes")
                chunks.append(chunk)
        try:
            if size > _PARSE_ON_THREAD_BYTES:
                return await asyncio.to_thread(json.loads, b"".join(chunks))
            return json.loads(b"".join(chunks))
        except (ValueError, RecursionError):
            raise BackendUnavailable(f"{self.name} answers {path} with broken JSON") from None

    async def stream(
        self, path: str, body: Mapping[str, Any], media_types: tuple[str, ...]
    ) -> AsyncGenerator[bytes, None]:
        """The bytes of the answer as they come; tried once. Closing or cancelling it closes the connection.

        Raises as `ask`.
        """
        async with self._answer("POST", path, body, media_types) as response:
            async for chunk in response.aiter_bytes():
                yield chunk

    async def close(self) -> None:
        """Close every connection; what still runs fails."""
        self._closed = True
        client, self._made = self._made, None
        if client is not None:
            await client.aclose()

    @contextlib.asynccontextmanager
    async def _answer(
        self, method: str, path: str, body: Mapping[str, Any] | None, media_types: tuple[str, ...]
    ) -> AsyncIterator[httpx.Response]:
        """The server's answer, its status and media type seen to be right."""
        client = await self._client()
        content = None if body is None else _encoded(body)
        headers = {} if body is None else {"Content-Type": "application/json"}
        with self._failures(path):
            async with client.stream(method, path, content=content, headers=headers) as response:
                if response.status_code != 200:
                    raise await self._refused(path, response)
                found = response.headers.get("Content-Type", "")
                if found.partition(";")[0].strip().lower() not in media_types:
                    raise BackendUnavailable(
                        f"{self.name} answers {path} with {self._shown(found) or 'no content type'} "
                        f"where {media_types[0]} is expected; is its url right?"
                    )
                yield response

    async def _client(self) -> httpx.AsyncClient:
        if self._made is None and not self._closed:
            made = await asyncio.to_thread(_new_client, self._url, self._key, self._timeout_ms)
            self._made = self._made or made
        if self._closed or self._made is None:
            raise BackendUnavailable(f"the connection to {self.name} is closed")
        return self._made

    @contextlib.contextmanager
    def _failures(self, path: str) -> Iterator[None]:
        """Turn what httpx raises into errors of ours."""
        import httpx

        try:
            yield
        except httpx.TimeoutException:
            raise BackendUnavailable(
                f"{self.name} was silent for {self._timeout_ms} ms", details={"timeout_ms": self._timeout_ms}
            ) from None
        except httpx.ConnectError as failed:
            raise Again(BackendUnavailable(f"{self.name} cannot be reached: {self._shown(str(failed))}")) from None
        except httpx.DecodingError:
            raise BackendUnavailable(f"{self.name} answers {path} with bytes that cannot be decompressed") from None
        except (httpx.TransportError, httpx.StreamError) as failed:
            what = self._shown(str(failed)) or type(failed).__name__
            raise Again(BackendUnavailable(f"the connection to {self.name} broke: {what}")) from None

    async def _refused(self, path: str, response: httpx.Response) -> Exception:
        """The error that a status other than 200 stands for."""
        status = response.status_code
        if 300 <= status < 400:
            place = self._shown(response.headers.get("Location", "another place"))
            return BackendUnavailable(f"{self.name} redirects {path} to {place}, which is not followed: mend its url")
        body = b""
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > _ERROR_BYTES:
                break
        after_s = _retry_after_s(response.headers.get("Retry-After"))
        return self.failure(status, _json_or_text(body[:_ERROR_BYTES]), path, after_s)

    def failure(self, status: int, said: Any, path: str, after_s: float | None = None) -> Exception:
        """What to raise for an HTTP status and what the server said with it, be it in the body or within a stream."""
        error = self._error(status, said, path, after_s)
        return Again(error, after_s) if status in _TRANSIENT and not isinstance(error, ContextOverflow) else error

    def _error(self, status: int, said: Any, path: str, after_s: float | None) -> DemandportError:
        message, code = _error_text(said)
        message, details = self._shown(message) or f"HTTP status {status}", {"status": status}
        if after_s is not None:
            details["retry_after_ms"] = round(after_s * 1000)
        evidence = f"{code} {message}".lower()
        cls: type[DemandportError] = BackendUnavailable
        if status in (400, 422, 500) and any(sign in evidence for sign in _OVERFLOW):
            cls = ContextOverflow
        elif status in (401, 403):
            cls = Forbidden
        elif status in (400, 404) and ("model_not_found" in evidence or (status == 404 and "model" in evidence)):
            cls = ModelNotFound
        elif status == 404:
            message = f"it has no {path}; is its url right?"
        elif status == 413:
            cls = TooLarge
        elif status == 429:
            cls = QueueFull
        elif status in (400, 422):
            cls = TypeMismatch
        return cls(f"{self.name}: {message}", details=details)

    def _shown(self, text: str) -> str:
        """A foreign text as it may stand in a message: short, and without the key."""
        if self._key:
            text = text.replace(self._key, "***")
        text = " ".join(text.split())
        return text if len(text) <= _ERROR_CHARACTERS else text[:_ERROR_CHARACTERS] + "…"


class ServerBackend:
    """A backend whose model runs in a server. What differs stands in `_generate`, `_embed`, `_rerank` and `_close`.

    Args:
        spec: the model and its server.
        name: what messages call it.
        retries: how often a request is tried again.
    """

    kind: str

    def __init__(self, spec: ModelSpec, name: str, *, retries: int = RETRIES) -> None:
        self.spec, self.name = spec, name
        self.info: dict[str, Any] = {}
        self._retries = retries
        self._entered = 0
        self._answered = False
        self._closing = asyncio.Event()

    async def generate(
        self, request: GenerateRequest, on_text: Callable[[str], None] | None = None
    ) -> AsyncGenerator[Event, None]:
        """Generate; see `Backend.generate`. Closing or cancelling the generator closes the connection.

        Raises:
            TypeMismatch: a parameter that the server does not know, or whose value it refuses.
            BackendUnavailable: the server cannot be reached, breaks off, is silent for `ModelSpec.timeout_ms`, or
                answers with what is none of its format.
            Forbidden, ModelNotFound, ContextOverflow, QueueFull, TooLarge: as the server says; `details` has the HTTP
                status, and `retry_after_ms` where it says that.
        """
        self.capabilities().check(request, self.name)
        deadline = Deadline.after(request.deadline_ms)
        with self._running():
            async with aclosing(self._attempts(request, deadline)) as events:
                while True:
                    event = await deadline.wait(events.__anext__)
                    if on_text is not None and isinstance(event, TextChunk):
                        on_text(event.text)
                        continue
                    yield event
                    if isinstance(event, Finished):
                        return

    async def embed(self, request: EmbedRequest) -> Embeddings:
        """The vectors of some texts; see `Backend.embed`. Raises as `generate`."""
        self._require("embed")
        return await self._called(lambda: self._embed(request), request.deadline_ms)

    async def rerank(self, request: RerankRequest) -> list[float]:
        """A score per document; see `Backend.rerank`. Raises as `generate`."""
        self._require("rerank")
        return await self._called(lambda: self._rerank(request), request.deadline_ms)

    def capabilities(self) -> Capabilities:
        """What it can do."""
        raise NotImplementedError

    def health(self) -> BackendHealth:
        """How it stands: ready once the server has answered, until it fails to."""
        return BackendHealth(self._state(), self._entered)

    async def close(self) -> None:
        """Close every connection; what still runs ends with `backend_unavailable`."""
        self._closing.set()
        await self._close()

    def _generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        raise NotImplementedError

    async def _embed(self, request: EmbedRequest) -> Embeddings:
        raise NotImplementedError

    async def _rerank(self, request: RerankRequest) -> list[float]:
        raise NotImplementedError

    async def _close(self) -> None:
        raise NotImplementedError

    def _state(self) -> BackendState:
        if self._closing.is_set():
            return "closed"
        return "ready" if self._answered else "stopped"

    def _require(self, operation: str) -> None:
        operations = self.capabilities().operations
        if operation not in operations:
            raise BackendUnavailable(f"{self.name} does not {operation}; it can {', '.join(sorted(operations))}")

    async def _called(self, attempt: Callable[[], Awaitable[T]], deadline_ms: int | None = None) -> T:
        """What `attempt` answers, tried again where that may help."""
        deadline = Deadline.after(deadline_ms)

        async def attempts() -> T:
            tried = 0
            while True:
                try:
                    return await attempt()
                except Again as failed:
                    await self._wait(failed, tried, deadline)
                    tried += 1

        with self._running():
            return await deadline.wait(attempts)

    async def _attempts(self, request: GenerateRequest, deadline: Deadline) -> AsyncGenerator[Event, None]:
        tried, begun = 0, False
        while True:
            try:
                async with aclosing(self._generate(request)) as events:
                    async for event in events:
                        begun = begun or not isinstance(event, Progress)
                        yield event
                return
            except Again as failed:
                if begun:
                    raise failed.error from None
                await self._wait(failed, tried, deadline)
                tried += 1

    async def _wait(self, failed: Again, tried: int, deadline: Deadline) -> None:
        """Wait before the next attempt; raises what failed when there is none."""
        wait_s = FIRST_RETRY_S * 2**tried * (1 + random.random() / 4) if failed.after_s is None else failed.after_s
        if tried >= self._retries or wait_s > MOST_RETRY_S or wait_s >= deadline.left_s() or self._closing.is_set():
            raise failed.error from None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._closing.wait()

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """Counts a request, remembers whether the server answered it, and says what closing did to it."""
        if self._closing.is_set():
            raise self._unloaded()
        if self._entered >= MAX_IN_FLIGHT:
            raise QueueFull(f"{self.name} has {MAX_IN_FLIGHT} requests running or waiting")
        self._entered += 1
        try:
            yield
            self._answered = True
        except DemandportError as failed:
            if self._closing.is_set():
                raise self._unloaded() from None
            self._answered = not isinstance(failed, BackendUnavailable | DeadlineExceeded)
            raise
        finally:
            self._entered -= 1

    def _unloaded(self) -> BackendUnavailable:
        return BackendUnavailable(f"model {self.spec.model} has been unloaded")


def display_host(url: str) -> str:
    """Host and port of a URL: without the user and password that it may hold.

    Raises:
        TypeMismatch: there is no host, or the port is none.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host:
        raise wrong("url", "must be that of a server, as in http://127.0.0.1:8000/v1")
    return host if port is None else f"{host}:{port}"


def _new_client(url: str, key: str | None, timeout_ms: int) -> httpx.AsyncClient:
    """A client for one server. Takes a while the first time: it imports httpx and reads certificates."""
    import httpx

    headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})
    try:
        return httpx.AsyncClient(
            base_url=url,
            headers=headers,
            timeout=httpx.Timeout(timeout_ms / 1000, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=8),
            follow_redirects=False,
            # A proxy that the environment names is for the world outside, not for this machine.
            trust_env=not _is_loopback(url),
        )
    except (httpx.InvalidURL, ValueError) as failed:
        raise wrong("url", f"cannot be used: {failed}") from None


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _encoded(body: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(body, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as failed:
        raise TypeMismatch(f"the request holds what JSON cannot say: {failed}") from None


def _json_or_text(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return body.decode("utf-8", "replace")


def _error_text(said: Any) -> tuple[str, str]:
    """Message and code of an error body: ``{"error": {"message", "code", "type"}}`` (OpenAI, llama-server),
    ``{"error": text}`` (Ollama), ``{"message"}``, ``{"detail"}`` (FastAPI), or a text."""
    found = said
    if isinstance(found, dict):
        found = next((found[name] for name in ("error", "message", "detail") if name in found), found)
    if isinstance(found, dict):
        code = f"{found.get('code')} {found.get('type')}"
        return str(found.get("message", json.dumps(found))), code
    return found if isinstance(found, str) else json.dumps(found), ""


def _retry_after_s(value: str | None) -> float | None:
    """Seconds of a Retry-After header (RFC 9110, section 10.2.3): a number of them, or a date."""
    if value is None:
        return None
    with contextlib.suppress(ValueError):
        return max(0.0, min(float(value), 86_400.0))
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
