"""An HTTP server on a raw socket that does exactly what a test's script says, byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

Script = Callable[["Exchange"], Awaitable[None]]


@dataclass
class Exchange:
    """One request and the connection it came on.

    Attributes:
        gone: set once the client has closed its side.
    """

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    writer: asyncio.StreamWriter
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    def head(self, status: int = 200, **headers: str) -> None:
        lines = [f"HTTP/1.1 {status} Said", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
        self.send(("\r\n".join(lines) + "\r\n\r\n").encode())

    def whole(self, status: int, body: Any, media_type: str = "application/json", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.head(status, Content_Type=media_type, Content_Length=str(len(data)), **headers)
        self.send(data)

    def chunked(self, media_type: str = "text/event-stream") -> None:
        self.head(200, Content_Type=media_type, Transfer_Encoding="chunked")

    def chunk(self, data: bytes) -> None:
        self.send(b"%x\r\n%s\r\n" % (len(data), data))

    def event(self, value: Any) -> None:
        self.chunk(b"data: %s\n\n" % (value if isinstance(value, bytes) else json.dumps(value).encode()))

    def line(self, value: Any) -> None:
        self.chunk(json.dumps(value).encode() + b"\n")

    def end(self) -> None:
        self.send(b"0\r\n\r\n")

    def abort(self) -> None:
        """A reset, as of a server that is killed."""
        self.writer.transport.abort()


class ScriptedServer:
    """Runs `script` for each request; more scripts serve the first requests, one each.

    Attributes:
        exchanges: the requests, in order.
    """

    def __init__(self, *scripts: Script) -> None:
        self._scripts = scripts
        self.exchanges: list[Exchange] = []
        self.arrived = asyncio.Event()
        self.port = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                while True:
                    await self._exchange(reader, writer)
        finally:
            writer.close()
            self._tasks.discard(task)

    async def stop(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # what was closed is let go in the next turn

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        exchange = await self._read(reader, writer)
        script = self._scripts[min(len(self.exchanges), len(self._scripts) - 1)]
        self.exchanges.append(exchange)
        self.arrived.set()
        watch = asyncio.create_task(self._watch(reader, exchange))
        try:
            await script(exchange)
            await writer.drain()
        finally:
            watch.cancel()
            if reader.at_eof() or reader.exception():
                exchange.gone.set()

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Exchange:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        method, path, _ = first.split(" ")
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        return Exchange(method, path, headers, body, writer)

    async def _watch(self, reader: asyncio.StreamReader, exchange: Exchange) -> None:
        # The client sends nothing while it waits for an answer: what ends the read is its end.
        while not reader.at_eof() and not reader.exception():
            await asyncio.sleep(0.001)
        exchange.gone.set()


@contextlib.asynccontextmanager
async def scripted(*scripts: Script) -> AsyncIterator[ScriptedServer]:
    """A server on a free port, running while the block does."""
    server = ScriptedServer(*scripts)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0, limit=1 << 24)
    server.port = listening.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listening.close()
        await server.stop()
