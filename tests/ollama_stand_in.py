"""An Ollama in a test's own process: its routes, its JSON lines, its errors, and what keep_alive does.

Written after Ollama's API documentation and the behaviour of its server: a request without a prompt loads, one with
`keep_alive` 0 and no prompt unloads, a duration is a text with a unit or a number of seconds.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from http_script import Exchange, ScriptedServer, scripted

CREATED = "2026-01-01T00:00:00.000000Z"
DURATIONS = {"total_duration": 9, "load_duration": 3, "prompt_eval_duration": 2, "eval_duration": 4}


class Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


@dataclass
class StandIn:
    """
    Attributes:
        models: capabilities by full name. loaded: how long each is kept, as asked; None: not asked.
        words: what every answer consists of. calls: tool calls that every answer makes.
        fail_after: words after which an answer ends with an error. num_ctx: words that a prompt may have.
    """

    models: dict[str, list[str]] = field(
        default_factory=lambda: {
            "cats:latest": ["completion", "tools"],
            "eyes:7b": ["completion", "vision"],
            "vectors:latest": ["embedding"],
        }
    )
    loaded: dict[str, Any] = field(default_factory=dict)
    words: tuple[str, ...] = ("Cats", " are", " smäll", " 🐈")
    calls: tuple[dict[str, Any], ...] = ()
    fail_after: int | None = None
    num_ctx: int = 100
    server: ScriptedServer | None = None

    @property
    def requests(self) -> list[tuple[str, Any]]:
        """Paths and bodies, in order."""
        assert self.server is not None
        return [(one.path, one.json if one.body else None) for one in self.server.exchanges]

    async def __call__(self, exchange: Exchange) -> None:
        try:
            await getattr(self, exchange.path.removeprefix("/api/"))(exchange)
        except Refused as refused:
            exchange.whole(refused.status, {"error": refused.message}, "application/json; charset=utf-8")

    async def tags(self, exchange: Exchange) -> None:
        exchange.whole(200, {"models": [self._described(name) for name in self.models]})

    async def ps(self, exchange: Exchange) -> None:
        exchange.whole(200, {"models": [self._described(name) for name in self.loaded]})

    async def show(self, exchange: Exchange) -> None:
        exchange.whole(200, {"capabilities": self.models[self._name(exchange.json)], "details": {}})

    async def generate(self, exchange: Exchange) -> None:
        body = exchange.json
        name = self._name(body)
        if not body.get("prompt") and body.get("keep_alive") == 0:
            self.loaded.pop(name, None)
            answer = {"model": body["model"], "created_at": CREATED, "response": "", "done": True}
            exchange.whole(200, answer | {"done_reason": "unload"})
            return
        self._load(name, body, "completion", "generate")
        if not body.get("prompt"):
            answer = {"model": body["model"], "created_at": CREATED, "response": "", "done": True}
            exchange.whole(200, answer | {"done_reason": "load"})
            return
        self._check_length(body, body["prompt"])
        self._stream(exchange, body, lambda text: {"response": text}, {"response": "", "context": [1, 2]})

    async def chat(self, exchange: Exchange) -> None:
        body = exchange.json
        name = self._name(body)
        self._load(name, body, "completion", "chat")
        if body.get("tools") and "tools" not in self.models[name]:
            raise Refused(400, f'"{body["model"]}" does not support tools')
        for message in body["messages"]:
            for image in message.get("images", ()):
                with contextlib.suppress(binascii.Error):
                    base64.b64decode(image, validate=True)
                    continue
                raise Refused(400, "illegal base64 data at input byte 4")
        self._check_length(body, " ".join(message["content"] for message in body["messages"]))

        def message(text: str) -> dict[str, Any]:
            return {"message": {"role": "assistant", "content": text}}

        self._stream(exchange, body, message, message(""))

    async def embed(self, exchange: Exchange) -> None:
        body = exchange.json
        self._load(self._name(body), body, "embedding", "embed")
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        texts = [text for text in texts if text]
        for text in texts:
            self._check_length(body, text)
        found = {"model": body["model"], "embeddings": [[0.6, 0.8] for _ in texts], "prompt_eval_count": len(texts)}
        exchange.whole(200, found | DURATIONS)

    def _described(self, name: str) -> dict[str, Any]:
        facts = {"size": 42, "digest": "abc", "details": {"family": "llama", "quantization_level": "Q8_0"}}
        return {"name": name, "model": name, **facts}

    def _name(self, body: dict[str, Any]) -> str:
        name = body["model"] if ":" in body["model"] else f"{body['model']}:latest"
        if name not in self.models:
            raise Refused(404, f"model '{body['model']}' not found")
        return name

    def _load(self, name: str, body: dict[str, Any], capability: str, what: str) -> None:
        if capability not in self.models[name]:
            raise Refused(400, f'"{body["model"]}" does not support {what}')
        keep = body.get("keep_alive")
        if isinstance(keep, str) and not re.fullmatch(r"-?(\d+(\.\d+)?(ns|us|ms|s|m|h))+", keep):
            raise Refused(400, f'time: missing unit in duration "{keep}"')
        self.loaded[name] = keep

    def _check_length(self, body: dict[str, Any], text: str) -> None:
        if len(text.split()) > self.num_ctx and body.get("truncate") is False:
            raise Refused(400, "the input length exceeds the context length")

    def _stream(self, exchange: Exchange, body: dict[str, Any], form: Any, end: dict[str, Any]) -> None:
        common = {"model": body["model"], "created_at": CREATED}
        most = body["options"].get("num_predict", len(self.words))
        exchange.chunked("application/x-ndjson")
        for position, word in enumerate(self.words[:most]):
            if position == self.fail_after:
                exchange.line({"error": "an error was encountered while running the model: CUDA error"})
                exchange.end()
                return
            # Its encoder writes < > & as escapes and everything else as it is; lines may arrive in any pieces.
            line = json.dumps(common | form(word) | {"done": False}, ensure_ascii=False).encode() + b"\n"
            for byte in line:
                exchange.chunk(bytes([byte]))
        for call in self.calls:
            exchange.line(
                common | {"message": {"role": "assistant", "content": "", "tool_calls": [call]}, "done": False}
            )
        reason = "length" if most < len(self.words) else "stop"
        counts = {"prompt_eval_count": 7, "eval_count": min(most, len(self.words))}
        exchange.line(common | end | {"done": True, "done_reason": reason} | counts | DURATIONS)
        exchange.end()


@contextlib.asynccontextmanager
async def ollama(**options: Any) -> AsyncIterator[StandIn]:
    """A stand-in on a free port, running while the block does."""
    stand_in = StandIn(**options)
    async with scripted(stand_in) as server:
        stand_in.server = server
        yield stand_in
