"""Servers of the OpenAI API: chat completions, completions, embeddings, and reranking where the server has it.

Source of the wire format: OpenAI API reference, "Chat" (`chat.completion.chunk`), "Completions (legacy)", "Embeddings",
"Models"; reranking as Jina, Cohere and llama-server offer it (``POST /rerank``).
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
import os
import sys
from array import array
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, NoReturn

from demandport.errors import BackendUnavailable, Forbidden, TooLarge
from demandport.inference.backend import (
    Capabilities,
    Embeddings,
    Event,
    Finished,
    FinishReason,
    Progress,
    TextChunk,
    ToolCall,
    Usage,
    packed,
)
from demandport.inference.config import ModelSpec
from demandport.inference.http import MALFORMED, Again, HttpServer, ServerBackend, display_host
from demandport.inference.requests import EmbedRequest, GenerateRequest, RerankRequest
from demandport.inference.sse import EventStream
from demandport.settings import wrong

#: Parameters that the API calls what `GenerateRequest` calls them.
_SAME = ("max_tokens", "temperature", "top_p", "frequency_penalty", "presence_penalty", "seed")
#: What of a `GenerateRequest` the API has.
PARAMETERS = frozenset({*_SAME, "raw", "stop", "json_schema", "tools", "tool_choice", "logprobs"})
#: Most text of tool calls in one answer.
MAX_TOOL_CHARACTERS = 8 << 20
# Of the models that a server lists, a hosted one's can be hundreds.
_MODELS_SHOWN = 1000
_FINISH: Mapping[str, FinishReason] = {
    "length": "length",
    "max_tokens": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "content_filter",
}
_MEDIA_TYPES = ("text/event-stream",)

Extras = Callable[[GenerateRequest], dict[str, Any]]


class OpenAIBackend(ServerBackend):
    """A model of a server that speaks OpenAI's API. Methods, errors and cancelling: `ServerBackend`.

    What the API has no parameter for is refused: top_k, min_p, the repetition penalties, grammar, adapters, kv_cache.
    Where no seed is given the server draws one and does not tell it. A model's reasoning, where a server sends that
    apart from the answer, is left out.

    Args:
        spec: `url` is the server's, up to and including ``/v1``.

    Raises:
        TypeMismatch: the url is none.
    """

    kind = "openai"

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec, f"model {spec.model} at {display_host(spec.url or '')}")
        self._client: OpenAIClient | None = None

    def capabilities(self) -> Capabilities:
        """What the API has; whether this model can do it, only its server knows."""
        return Capabilities(frozenset({"generate", "embed", "rerank"}), PARAMETERS, vision=True)

    async def load(self) -> dict[str, Any]:
        """Ask the server for its models, which shows that it answers; ``{"models": [id…]}``.

        Raises:
            Forbidden: the variable that `api_key_env` names is not set, or the server takes no such key.
            BackendUnavailable: the server cannot be reached, or has no list of models.
        """
        self.info = {"models": await self._called(lambda: self._server().models())}
        return self.info

    def _generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        return self._server().generate(request)

    async def _embed(self, request: EmbedRequest) -> Embeddings:
        return await self._server().embed(request)

    async def _rerank(self, request: RerankRequest) -> list[float]:
        return await self._server().rerank(request)

    async def _close(self) -> None:
        if self._client is not None:
            await self._client.close()

    def _server(self) -> OpenAIClient:
        if self._client is None:
            key = _key(self.spec.api_key_env)
            server = HttpServer(self.spec.url or "", name=self.name, timeout_ms=self.spec.timeout_ms, key=key)
            self._client = OpenAIClient(server, self.spec.model)
        return self._client


class OpenAIClient:
    """The API itself, each request tried once. Raises `Again` for what may pass, else what `ServerBackend` says.

    Args:
        server: where it is.
        model: what the server calls the model.
        extras: what a server knows besides the API, as fields to add to the body of a generation.
    """

    def __init__(self, server: HttpServer, model: str, extras: Extras = lambda request: {}) -> None:
        self._server, self._model, self._extras = server, model, extras

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """The events of one generation, the last one `Finished`."""
        body = (_completion if request.raw else _chat)(request)
        body |= {"model": self._model, "stream": True, "stream_options": {"include_usage": True}}
        path = "completions" if request.raw else "chat/completions"
        events, answer = EventStream(), _Answer(request, self._server, path)
        async with aclosing(self._server.stream(path, body | self._extras(request), _MEDIA_TYPES)) as chunks:
            async for chunk in chunks:
                for event in events.feed(chunk):
                    if event.data == "[DONE]":
                        yield answer.finished()
                        return
                    for found in answer.read(event.data):
                        yield found
        yield answer.finished()

    async def embed(self, request: EmbedRequest, extras: Mapping[str, Any] | None = None) -> Embeddings:
        """Vectors, scaled to length 1 where `normalize` asks for it, else as the server gives them."""
        body = {"model": self._model, "input": list(request.texts), "encoding_format": "float", **(extras or {})}
        found = await self._server.ask("POST", "embeddings", body)
        # A thousand vectors take long enough to hold up every stream.
        return await asyncio.to_thread(self._embeddings, found, request)

    async def rerank(self, request: RerankRequest) -> list[float]:
        """The scores in the order of the documents."""
        documents = list(request.documents)
        body = {"model": self._model, "query": request.query, "documents": documents, "top_n": len(documents)}
        found = await self._server.ask("POST", "rerank", body)
        try:
            results = found["results"] if isinstance(found, dict) else found
            scores = {result["index"]: float(result.get("relevance_score", result.get("score"))) for result in results}
            return [scores[index] for index in range(len(documents))]
        except MALFORMED:
            raise BackendUnavailable(f"{self._server.name} answers rerank with what is no score per document") from None

    async def models(self) -> list[str]:
        """Ids of the server's models."""
        found = await self._server.ask("GET", "models")
        try:
            return [str(model["id"]) for model in found["data"][:_MODELS_SHOWN]]
        except MALFORMED:
            raise BackendUnavailable(f"{self._server.name} answers models with what is no list of them") from None

    async def close(self) -> None:
        """Close every connection."""
        await self._server.close()

    def _embeddings(self, found: Any, request: EmbedRequest) -> Embeddings:
        try:
            entries = sorted(found["data"], key=lambda entry: entry["index"])
            vectors = [vector(_numbers(entry["embedding"]), normalize=request.normalize) for entry in entries]
            usage = Usage(int((found.get("usage") or {}).get("prompt_tokens") or 0), 0)
            return embeddings(vectors, len(request.texts), usage, found.get("model"))
        except MALFORMED:
            raise BackendUnavailable(
                f"{self._server.name} answers embeddings with what is not one vector per text; does it pool?"
            ) from None


class _Answer:
    """What the chunks of one answer have said so far."""

    def __init__(self, request: GenerateRequest, server: HttpServer, path: str) -> None:
        self._request, self._server, self._path = request, server, path
        self._reason: str | None = None
        self._usage: Usage | None = None
        self._model: str | None = None
        self._logprobs: list[dict[str, Any]] = []
        self._calls: dict[int, dict[str, str]] = {}
        self._call_characters = 0

    def read(self, data: str) -> Iterable[Event]:
        """The events of one chunk."""
        try:
            chunk = json.loads(data)
            if "error" in chunk:
                self._failed(chunk)
            return self._read(chunk)
        except MALFORMED:
            raise BackendUnavailable(f"{self._server.name} streams what is no chunk of an answer") from None

    def finished(self) -> Finished:
        """The end.

        Raises:
            Again: the stream ended before the answer did.
        """
        if self._reason is None:
            raise Again(BackendUnavailable(f"{self._server.name} broke off in the middle of the answer"))
        calls = tuple(ToolCall(call["id"], call["name"], call["arguments"]) for _, call in sorted(self._calls.items()))
        reason = "tool_calls" if calls and self._reason == "stop" else _FINISH.get(self._reason, "stop")
        logprobs = None if self._request.logprobs is None else self._logprobs
        return Finished(reason, self._usage, self._request.seed, calls, logprobs, model=self._model)

    def _failed(self, chunk: dict[str, Any]) -> NoReturn:
        said = chunk["error"]
        status = said.get("code") if isinstance(said, dict) else None
        raise self._server.failure(status if isinstance(status, int) else 500, chunk, self._path)

    def _read(self, chunk: dict[str, Any]) -> list[Event]:
        found: list[Event] = []
        self._model = _text(chunk.get("model") or "") or self._model
        if usage := chunk.get("usage"):
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
            self._usage = Usage(
                int(usage["prompt_tokens"]),
                int(usage.get("completion_tokens") or 0),
                None if cached is None else int(cached),
            )
        if progress := chunk.get("prompt_progress"):
            found.append(Progress(int(progress["processed"]), int(progress["total"]), "prompt_tokens"))
        for choice in (chunk.get("choices") or ())[:1]:
            delta = choice.get("delta") or {}
            text = choice.get("text") if self._request.raw else delta.get("content")
            if text:
                found.append(TextChunk(_text(text)))
            for call in delta.get("tool_calls") or ():
                self._call(call)
            if choice.get("logprobs") and self._request.logprobs is not None:
                self._logprobs += _logprobs(choice["logprobs"], self._request.logprobs)
            self._reason = _text(choice.get("finish_reason") or "") or self._reason
        return found

    def _call(self, delta: dict[str, Any]) -> None:
        """Add a piece of a tool call. A server that gives no index sends each call whole, with an id."""
        index = delta.get("index")
        if index is None:
            index = len(self._calls) if delta.get("id") else len(self._calls) - 1
        call = self._calls.setdefault(int(index), {"id": "", "name": "", "arguments": ""})
        function = delta.get("function") or {}
        arguments = function.get("arguments") or ""
        pieces = {
            "id": _text(delta.get("id") or ""),
            "name": _text(function.get("name") or ""),
            "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments),
        }
        self._call_characters += sum(map(len, pieces.values()))
        if self._call_characters > MAX_TOOL_CHARACTERS:
            raise TooLarge(f"{self._server.name} calls tools with more than {MAX_TOOL_CHARACTERS} characters")
        call["id"] = pieces["id"] or call["id"]
        call["name"] += pieces["name"]
        call["arguments"] += pieces["arguments"]


# ------------------------------------------------------------------------------------------------- what is asked


def _common(request: GenerateRequest) -> dict[str, Any]:
    body = {name: getattr(request, name) for name in _SAME if getattr(request, name) is not None}
    if request.stop:
        body["stop"] = list(request.stop)
    return body


def _chat(request: GenerateRequest) -> dict[str, Any]:
    body = _common(request) | {"messages": request.conversation()}
    if request.tools:
        body["tools"] = list(request.tools)
    if request.tool_choice is not None:
        body["tool_choice"] = request.tool_choice
    if request.json_schema is not None:
        schema = {"name": "answer", "schema": request.json_schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    if request.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": request.logprobs}
    return body


def _completion(request: GenerateRequest) -> dict[str, Any]:
    for name in ("tools", "json_schema"):
        if getattr(request, name):
            raise wrong(name, "does not go with raw: the API has it for chats alone")
    body = _common(request) | {"prompt": request.prompt}
    if request.logprobs is not None:
        body["logprobs"] = request.logprobs
    return body


def _key(variable: str | None) -> str | None:
    """The key that a variable of the environment holds."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise Forbidden(f"the environment variable {variable}, which api_key_env names, is not set")
    if not (key.isascii() and key.isprintable()):
        raise Forbidden(f"the environment variable {variable}, which api_key_env names, holds no key")
    return key


# --------------------------------------------------------------------------------------------- what is answered


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value


def _logprobs(found: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Per token ``{token, logprob, top}``, from the form of chats, or from the parallel lists of completions."""
    if found.get("content") is not None:
        return [
            {
                "token": entry["token"],
                "logprob": entry["logprob"],
                "top": [{"token": top["token"], "logprob": top["logprob"]} for top in entry["top_logprobs"][:count]],
            }
            for entry in found["content"]
        ]
    tops = found.get("top_logprobs") or [{}] * len(found["tokens"])
    return [
        {
            "token": token,
            "logprob": logprob,
            "top": [{"token": other, "logprob": value} for other, value in (top or {}).items()][:count],
        }
        for token, logprob, top in zip(found["tokens"], found["token_logprobs"], tops, strict=True)
    ]


def _numbers(embedding: Any) -> array[float]:
    """A vector, given as numbers or as base64 of little-endian 32-bit floats."""
    if not isinstance(embedding, str):
        return array("f", embedding)
    numbers = array("f", base64.b64decode(embedding))
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def vector(numbers: Sequence[float], *, normalize: bool) -> bytes:
    """The vector of a server's answer, packed.

    Raises:
        ValueError: it is empty or holds what is no number.
    """
    if not numbers or not math.isfinite(math.hypot(*numbers)):
        raise ValueError("no vector")
    return packed(numbers, normalize=normalize)


def embeddings(vectors: list[bytes], count: int, usage: Usage, model: str | None) -> Embeddings:
    """The answer, once it is seen that there is a vector per text and that all are of one size.

    Raises:
        ValueError: they are not.
    """
    if len(vectors) != count or len({len(vector) for vector in vectors}) != 1:
        raise ValueError("not one vector of one size per text")
    return Embeddings(vectors, len(vectors[0]) // 4, usage, model)
