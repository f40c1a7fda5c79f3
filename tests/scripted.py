"""A backend that answers what a test has written down, for nodes that ask models; every other part is the real one."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import fields
from typing import Any

from demandport.inference.backend import (
    BackendHealth,
    Capabilities,
    Embeddings,
    Event,
    Finished,
    FinishReason,
    TextChunk,
    ToolCall,
    Usage,
)
from demandport.inference.requests import EmbedRequest, GenerateRequest, RerankRequest


class ScriptedBackend:
    """Answers each generation with the next of its answers, the last one again and again.

    Args:
        answers: texts, or tool calls (one, or a tuple of them), or functions from the request to one of these, which
            may raise.
        vision: it takes images.
        reason: why a text has ended.
        honours: the parameters that it honours; None: all.
    """

    kind = "scripted"

    def __init__(
        self, *answers: Any, vision: bool = False, reason: FinishReason = "stop", honours: set[str] | None = None
    ) -> None:
        self.answers, self.vision, self.reason = list(answers), vision, reason
        self.honours = {field.name for field in fields(GenerateRequest)} if honours is None else honours
        self.asked: list[GenerateRequest] = []
        self.info: dict[str, Any] = {}
        self.closed = False

    async def generate(
        self, request: GenerateRequest, on_text: Callable[[str], None] | None = None
    ) -> AsyncIterator[Event]:
        self.capabilities().check(request, "the scripted backend")
        self.asked.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if callable(answer):
            answer = answer(request)
        if isinstance(answer, ToolCall | tuple):
            calls = answer if isinstance(answer, tuple) else (answer,)
            yield Finished("tool_calls", Usage(3, 2), tool_calls=calls, model="scripted-1")
            return
        for piece in (answer[:2], answer[2:]):
            if on_text is not None:
                on_text(piece)
            else:
                yield TextChunk(piece)
        yield Finished(self.reason, Usage(3, 2), model="scripted-1")

    async def embed(self, request: EmbedRequest) -> Embeddings:
        vectors = [struct.pack("<2f", len(text), 1.0) for text in request.texts]
        return Embeddings(vectors, 2, Usage(len(vectors), 0), "scripted-1")

    async def rerank(self, request: RerankRequest) -> list[float]:
        return [float(document.count(request.query)) for document in request.documents]

    async def load(self) -> dict[str, Any]:
        return self.info

    def capabilities(self) -> Capabilities:
        return Capabilities(frozenset({"generate", "embed", "rerank"}), frozenset(self.honours), self.vision)

    def health(self) -> BackendHealth:
        return BackendHealth("closed" if self.closed else "ready", 0)

    async def close(self) -> None:
        self.closed = True
