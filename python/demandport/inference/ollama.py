"""Models that an Ollama server runs.

Source of the wire format: Ollama's API documentation (``docs/api.md``: chat, generate, embed, tags, ps, show) and
``api/types.go`` of its source for `truncate` and `shift`: JSON lines, errors as ``{"error": text}``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from array import array
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from demandport.errors import BackendUnavailable, DemandportError, ModelNotFound, TypeMismatch
from demandport.inference.backend import (
    Capabilities,
    Embeddings,
    Event,
    Finished,
    TextChunk,
    ToolCall,
    Usage,
)
from demandport.inference.config import OLLAMA_URL, ModelSpec
from demandport.inference.http import MALFORMED, Again, HttpServer, ServerBackend, display_host
from demandport.inference.openai import embeddings, vector
from demandport.inference.requests import EmbedRequest, GenerateRequest, RerankRequest, draw_seed
from demandport.inference.sse import Lines
from demandport.settings import wrong

#: Ollama's names of parameters, each an entry of ``options``.
OPTIONS = {
    "max_tokens": "num_predict",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repeat_penalty": "repeat_penalty",
    "repeat_last_n": "repeat_last_n",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "seed": "seed",
}
#: What of a `GenerateRequest` Ollama has.
PARAMETERS = frozenset({*OPTIONS, "raw", "stop", "json_schema", "tools", "tool_choice"})
#: How long `close` may take to have the model unloaded.
UNLOAD_S = 1.0
_MEDIA_TYPES = ("application/x-ndjson", "application/json")


class OllamaBackend(ServerBackend):
    """A model of an Ollama server. Methods, errors and cancelling: `ServerBackend`.

    A prompt that does not fit the context is `context_overflow`, where Ollama would drop its beginning (servers older
    than 0.12.4 do so in spite of being asked not to). Where no seed is given one is drawn and told. A model's
    thinking is left out. Reranking, grammars, log-probabilities and adapters are not offered.

    **Who unloads.** Ollama is shared: other programs may use the same model. So `close` has it unloaded
    (``keep_alive: 0``) only when it was not loaded before this backend first used it, and only when the configuration
    does not say how long to keep it (`ModelSpec.keep_alive`): that then holds beyond the service's end. `unload`
    unloads in this latter case too.

    Args:
        spec: `url` is the server's, without a path; None: Ollama's own default.

    Raises:
        TypeMismatch: the url is none.
    """

    kind = "ollama"

    def __init__(self, spec: ModelSpec) -> None:
        url = spec.url or OLLAMA_URL
        super().__init__(spec, f"Ollama at {display_host(url)}")
        self._server = HttpServer(url, name=self.name, timeout_ms=spec.timeout_ms)
        self._loaded_here: bool | None = None
        self._sees: bool | None = None

    def capabilities(self) -> Capabilities:
        """What Ollama has; whether this model can do it, only Ollama knows."""
        return Capabilities(frozenset({"generate", "embed"}), PARAMETERS, vision=True)

    async def load(self) -> dict[str, Any]:
        """Have Ollama load the model; what it says of it: `size_bytes`, `digest`, `details`.

        Raises:
            ModelNotFound: it has none of that name; the message lists those it has.
            BackendUnavailable: it cannot be reached, or does not say anything for `ModelSpec.timeout_ms`.
        """
        return await self._called(self._load)

    async def unload(self) -> bool:
        """Have Ollama unload the model now, unless it was loaded before this backend first used it; True if it did."""
        if not self._loaded_here:
            return False
        await self._server.ask("POST", "api/generate", {"model": self.spec.model, "keep_alive": 0, "stream": False})
        self._loaded_here = None
        return True

    async def _load(self) -> dict[str, Any]:
        tags = await self._server.ask("GET", "api/tags")
        found = _named(self.spec.model, self._models(tags))
        if found is None:
            names = ", ".join(sorted(str(model.get("name")) for model in self._models(tags))) or "none"
            raise ModelNotFound(f"{self.name} has no model {self.spec.model}; it has {names}")
        await self._remember()
        await self._load_empty()
        self.info = {"size_bytes": found.get("size"), "digest": found.get("digest"), "details": found.get("details")}
        return self.info

    async def _load_empty(self) -> None:
        """A request without a prompt loads the model; one that only embeds has a way of its own for that."""
        body = {"model": self.spec.model} | self._keep_alive()
        try:
            await self._server.ask("POST", "api/generate", body | {"stream": False})
        except TypeMismatch:
            await self._server.ask("POST", "api/embed", body | {"input": ""})

    async def _remember(self) -> None:
        """Look, before the model's first use, whether somebody else had it loaded."""
        if self._loaded_here is None:
            running = self._models(await self._server.ask("GET", "api/ps"))
            if self._loaded_here is None:  # meanwhile another request may have looked, and had it loaded since
                self._loaded_here = _named(self.spec.model, running) is None

    async def _generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        seed = draw_seed() if request.seed is None else request.seed
        body = (_completion if request.raw else _chat)(request) | self._keep_alive()
        body |= {"model": self.spec.model, "options": _options(request, seed), "stream": True}
        if request.images:
            await self._require_vision()
        await self._remember()
        lines, reply = Lines(), _Reply(request, self._server, self.spec.model, seed)
        path = "api/generate" if request.raw else "api/chat"
        async with aclosing(self._server.stream(path, body, _MEDIA_TYPES)) as chunks:
            async for chunk in chunks:
                for line in lines.feed(chunk):
                    for event in reply.read(line):
                        yield event
        for event in reply.read(lines.rest()):
            yield event
        yield reply.finished()

    async def _embed(self, request: EmbedRequest) -> Embeddings:
        if not request.normalize:
            raise wrong("normalize", "cannot be false: Ollama scales every vector to length 1")
        await self._remember()
        body = {"model": self.spec.model, "input": list(request.texts), "truncate": False} | self._keep_alive()
        found = await self._server.ask("POST", "api/embed", body)
        try:
            vectors = await asyncio.to_thread(
                lambda: [vector(array("f", numbers), normalize=True) for numbers in found["embeddings"]]
            )
            usage = Usage(int(found.get("prompt_eval_count") or 0), 0)
            return embeddings(vectors, len(request.texts), usage, found.get("model"))
        except MALFORMED:
            raise BackendUnavailable(f"{self.name} answers api/embed with what is not one vector per text") from None

    async def _rerank(self, request: RerankRequest) -> list[float]:
        raise NotImplementedError  # not among its operations, so never asked for

    async def _close(self) -> None:
        try:
            if self.spec.keep_alive is None:
                with contextlib.suppress(TimeoutError, Again, DemandportError):
                    async with asyncio.timeout(UNLOAD_S):
                        await self.unload()
        finally:
            await self._server.close()

    async def _require_vision(self) -> None:
        if self._sees is None:
            shown = await self._server.ask("POST", "api/show", {"model": self.spec.model})
            # Older servers do not say what a model can do: then its answer shows it.
            named = shown.get("capabilities") if isinstance(shown, dict) else None
            self._sees = "vision" in named if isinstance(named, list) else True
        if not self._sees:
            raise BackendUnavailable(f"model {self.spec.model} of {self.name} takes no images: name one with vision")

    def _models(self, answer: Any) -> list[dict[str, Any]]:
        try:
            return [dict(model) for model in answer["models"]]
        except MALFORMED:
            raise BackendUnavailable(f"{self.name} answers with what is no list of models") from None

    def _keep_alive(self) -> dict[str, Any]:
        value = self.spec.keep_alive
        if value is None:
            return {}
        # Ollama takes a duration as text, but seconds only as a number.
        with contextlib.suppress(ValueError):
            return {"keep_alive": float(value) if "." in value else int(value)}
        return {"keep_alive": value}


class _Reply:
    """What the lines of one answer have said so far."""

    def __init__(self, request: GenerateRequest, server: HttpServer, model: str, seed: int) -> None:
        self._raw, self._server, self._seed, self._model = request.raw, server, seed, model
        self._calls: list[ToolCall] = []
        self._end: Finished | None = None

    def read(self, line: bytes) -> list[Event]:
        """The events of one line; an empty line has none."""
        if not line.strip():
            return []
        try:
            found = json.loads(line)
            if "error" in found:
                # Ollama tells no status within a stream.
                raise self._server.failure(500, found, "its answer")
            return self._read(found)
        except MALFORMED:
            raise BackendUnavailable(f"{self._server.name} streams what is no line of an answer") from None

    def finished(self) -> Finished:
        """The end.

        Raises:
            Again: the stream ended before the answer did.
        """
        if self._end is None:
            raise Again(BackendUnavailable(f"{self._server.name} broke off in the middle of the answer"))
        return self._end

    def _read(self, found: dict[str, Any]) -> list[Event]:
        message = {} if self._raw else found.get("message") or {}
        text = found.get("response") if self._raw else message.get("content")
        for call in message.get("tool_calls") or ():
            function = call["function"]
            id = call.get("id") or f"call_{secrets.token_hex(4)}"
            arguments = json.dumps(function.get("arguments") or {}, ensure_ascii=False)
            self._calls.append(ToolCall(str(id), str(function["name"]), arguments))
        if found.get("done"):
            self._end = self._ended(found)
        if text and not isinstance(text, str):
            raise TypeError("not a text")
        return [TextChunk(text)] if text else []

    def _ended(self, last: dict[str, Any]) -> Finished:
        # What lies in its prompt cache, Ollama leaves out of the count, or the count out of the answer.
        usage = Usage(int(last.get("prompt_eval_count") or 0), int(last.get("eval_count") or 0))
        calls, reason = tuple(self._calls), last.get("done_reason")
        return Finished(
            "tool_calls" if calls else "length" if reason == "length" else "stop",
            usage,
            self._seed,
            calls,
            model=str(last.get("model") or self._model),
        )


def _named(model: str, models: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The one of `models` that Ollama means by `model`: a name without a tag is that of ``latest``."""
    wanted = model if ":" in model.rpartition("/")[2] else f"{model}:latest"
    return next((one for one in models if wanted in (one.get("name"), one.get("model"))), None)


def _options(request: GenerateRequest, seed: int) -> dict[str, Any]:
    given = {name: getattr(request, name) for name in OPTIONS}
    options = {OPTIONS[name]: value for name, value in (given | {"seed": seed}).items() if value is not None}
    return options | ({"stop": list(request.stop)} if request.stop else {})


def _completion(request: GenerateRequest) -> dict[str, Any]:
    if request.tools:
        raise wrong("tools", "do not go with raw: Ollama has them for chats alone")
    return {"prompt": request.prompt, "raw": True, **_whole_prompt(), **_format(request.json_schema)}


def _chat(request: GenerateRequest) -> dict[str, Any]:
    if request.tool_choice == "required":
        raise wrong("tool_choice", "cannot be required: Ollama leaves the choice to the model")
    tools = list(request.tools) if request.tool_choice != "none" else []
    body = {"messages": _messages(request.conversation()), **_whole_prompt(), **_format(request.json_schema)}
    return body | ({"tools": tools} if tools else {})


def _whole_prompt() -> dict[str, bool]:
    return {"truncate": False, "shift": False}


def _format(schema: Mapping[str, Any] | None) -> dict[str, Any]:
    return {} if schema is None else {"format": schema}


def _messages(conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation in Ollama's form: images beside the text, arguments as objects, tools by name."""
    called: dict[str, str] = {}
    found = []
    for message in conversation:
        text, images = _content(message["content"])
        made: dict[str, Any] = {"role": message["role"], "content": text}
        if images:
            made["images"] = images
        if message.get("tool_calls"):
            made["tool_calls"] = [_call(call, called) for call in message["tool_calls"]]
        if message["role"] == "tool":
            id = message["tool_call_id"]
            made |= {"tool_call_id": id, "tool_name": message.get("name") or called.get(id, "")}
        found.append(made)
    return found


def _content(content: str | list[dict[str, Any]]) -> tuple[str, list[str]]:
    """Text and images (base64) of a message."""
    if isinstance(content, str):
        return content, []
    texts = [part["text"] for part in content if part["type"] == "text"]
    return "\n".join(texts), [_image(part["image_url"]["url"]) for part in content if part["type"] == "image_url"]


def _image(url: str) -> str:
    head, comma, data = url.partition(",")
    if not (head.startswith("data:") and head.endswith(";base64") and comma):
        raise wrong("messages", "has an image that is no data: URL in base64, which is all that Ollama takes")
    return data


def _call(call: Any, called: dict[str, str]) -> dict[str, Any]:
    """A tool call of the conversation in Ollama's form; notes its name under its id."""
    try:
        function, id = call["function"], call.get("id")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        called[str(id)] = function["name"]
        made = {"function": {"name": function["name"], "arguments": arguments}}
        return made | ({"id": id} if id else {})
    except MALFORMED:
        raise wrong("messages", "has a tool call without a name, or whose arguments are no JSON") from None
