"""What a backend is: one way to run a model. The interface, its events, and what each kind can do; no vendor."""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from demandport.errors import BackendUnavailable
from demandport.inference.requests import EmbedRequest, GenerateRequest, RerankRequest
from demandport.settings import wrong

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]

# ---------------------------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens read and written.

    Attributes:
        cached_tokens: of the prompt's, those that did not have to be computed; None where that is not known.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class TextChunk:
    """A piece of the answer; the pieces joined are the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the work before the first token is.

    Attributes:
        unit: what `done` and `total` count: ``load_bytes`` or ``prompt_tokens``.
    """

    done: int
    total: int
    unit: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool that the model wants called.

    Attributes:
        id: names the call in the message that answers it. arguments: JSON text, as the model wrote it.
    """

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of every generation that did not fail.

    Attributes:
        finish_reason: ``stop`` for an end-of-text token or a stop string, ``length`` for `max_tokens` or a
            full context, ``tool_calls`` when the model waits for tools, ``content_filter`` when a server cut it off.
        usage: None where a server does not tell.
        seed: the same request with it gives the same text; None where the backend does not tell.
        logprobs: per token ``{token, logprob, top: [{token, logprob}]}``, where asked for.
        kv_cache: what a later request gives as its `kv_cache` to go on from here; None where there is none.
        model: what the backend says it ran.
        model_ref: what names the loaded model, ``{id, model, backend}``; the gateway says it.
    """

    finish_reason: FinishReason
    usage: Usage | None = None
    seed: int | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: list[dict[str, Any]] | None = None
    kv_cache: dict[str, Any] | None = None
    model: str | None = None
    model_ref: dict[str, Any] | None = None


Event = TextChunk | Progress | Finished


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Vectors in the order of the texts.

    Attributes:
        vectors: each one the little-endian 32-bit floats of its `dimensions` numbers.
    """

    vectors: list[bytes]
    dimensions: int
    usage: Usage
    model: str | None = None


def packed(numbers: Sequence[float], *, normalize: bool) -> bytes:
    """A vector in the form of `Embeddings`, scaled to length 1 if `normalize`; one of zeros stays what it is."""
    length = math.hypot(*numbers) if normalize else 0.0
    floats = array("f", (number / length for number in numbers) if length else numbers)
    if sys.byteorder == "big":
        floats.byteswap()
    return floats.tobytes()


# ------------------------------------------------------------------------------------------------------- interface

Operation = Literal["generate", "embed", "rerank"]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can do.

    Attributes:
        operations: of ``generate``, ``embed``, ``rerank``.
        parameters: fields of `GenerateRequest` that it honours, besides prompt, messages,
            system_prompt and deadline_ms.
        vision: it takes images in messages.
    """

    operations: frozenset[Operation]
    parameters: frozenset[str] = frozenset()
    vision: bool = False

    def check(self, request: GenerateRequest, backend: str) -> None:
        """Refuse what would have to be ignored: every parameter is honoured or refused.

        Raises:
            BackendUnavailable: it generates no text, or takes no images.
            TypeMismatch: a parameter is not honoured; the message names it and the backend.
        """
        if "generate" not in self.operations:
            raise BackendUnavailable(f"{backend} generates no text; it can {', '.join(sorted(self.operations))}")
        if request.images and not self.vision:
            raise BackendUnavailable(f"{backend} takes no images: name a model with vision")
        for name in request.given():
            if name not in self.parameters and name not in _ALWAYS:
                raise wrong(name, f"is not honoured by {backend}, so leave it out")


#: `priority` orders what waits, where something waits; it asks nothing of the result.
_ALWAYS = frozenset({"prompt", "messages", "system_prompt", "deadline_ms", "priority"})

#: Gets (level, logger, text) of what a worker logs.
LogSink = Callable[[str, str, str], None]
BackendState = Literal["stopped", "loading", "ready", "quarantined", "closed"]


@dataclass(frozen=True, slots=True)
class BackendHealth:
    """How a backend stands.

    Attributes:
        in_flight: requests that run or wait in it.
        os_pid: its process's id, if it has one.
        restarts: how often its process had to be started again.
        crashed: its process died and no new one is ready yet.
    """

    state: BackendState
    in_flight: int
    os_pid: int | None = None
    restarts: int = 0
    crashed: bool = False


class Backend(Protocol):
    """One model, however it is run. Belongs to the event loop's thread; nothing in it blocks."""

    @property
    def kind(self) -> str:
        """What runs the model, as `ModelSpec.backend` names it."""
        ...

    @property
    def info(self) -> dict[str, Any]:
        """Facts about the model, once they are known."""
        ...

    def generate(
        self, request: GenerateRequest, on_text: Callable[[str], None] | None = None
    ) -> AsyncGenerator[Event, None]:
        """Generate: any number of `TextChunk` and `Progress`, then one `Finished`.

        Closing or cancelling the generator stops the model.

        Args:
            on_text: gets the text, as it comes and at once, in place of `TextChunk` events; must not raise.

        Raises:
            DemandportError: what failed, when the first or a later event is asked for; past `deadline_ms`, which
                counts from the start and includes loading, `DeadlineExceeded`.
        """
        ...

    async def embed(self, request: EmbedRequest) -> Embeddings:
        """The vectors of some texts; cancelling the call stops the work.

        Raises:
            ContextOverflow: a text is longer than the model reads at once.
            DemandportError: what else failed.
        """
        ...

    async def rerank(self, request: RerankRequest) -> list[float]:
        """A score per document, in their order; higher is better. Raises as `embed`."""
        ...

    async def load(self) -> dict[str, Any]:
        """Have the model ready, once however many ask; facts about it (for a server: that it answers).

        Raises:
            DemandportError: it cannot be loaded, or the server cannot be reached.
        """
        ...

    def capabilities(self) -> Capabilities:
        """What it can do; the same for as long as it lives."""
        ...

    def health(self) -> BackendHealth:
        """How it stands now."""
        ...

    async def close(self) -> None:
        """End it; what still runs in it ends with `backend_unavailable`."""
        ...
