"""What a backend is: one way to run a model. Requests, events and their rules; no vendor."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol

from demandport.errors import TooLarge, TypeMismatch

FinishReason = Literal["stop", "length"]
#: Drawing a seed: llama.cpp keeps the largest 32-bit value for "any".
MAX_SEED = 2**32 - 2
DEFAULT_MAX_TOKENS = 512
MAX_GRAMMAR_BYTES = 64 * 1024
MAX_STOPS = 64
MAX_STOP_CHARACTERS = 1024
_ROLES = ("system", "user", "assistant", "tool")

# ---------------------------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class TextChunk:
    """A piece of the answer; the pieces joined are the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the work before the first token is.

    Attributes:
        unit: what `done` and `total` count, e.g. ``prompt_tokens``.
    """

    done: int
    total: int
    unit: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of every generation that did not fail.

    Attributes:
        finish_reason: ``stop`` for an end-of-text token or a stop string, ``length`` for `max_tokens` or a
            full context.
        seed: the seed that was used; the same request with it gives the same text.
    """

    finish_reason: FinishReason
    usage: Usage
    seed: int


Event = TextChunk | Progress | Finished

# -------------------------------------------------------------------------------------------------------- requests


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One text to generate. Made valid or not at all.

    Attributes:
        prompt: the user's text; exactly one of `prompt` and `messages` is given.
        messages: a conversation, maps of ``role`` (system, user, assistant, tool) and ``content``.
        system_prompt: put before the conversation as a system message; not with `raw`.
        raw: send `prompt` as it stands, without the model's chat template; special tokens in it are read as such.
        max_tokens: most tokens to generate; None: `DEFAULT_MAX_TOKENS`, or fewer when the context holds fewer.
        stop: strings that end the text and are not part of it.
        temperature: 0 is greedy, the most likely token always; up to 10.
        top_k: choose among the k most likely tokens; 0: all.
        top_p: choose among the most likely tokens that make up this share, over 0 up to 1 (1: all).
        min_p: leave out tokens less likely than this share of the most likely one, 0 (none) to 1.
        repeat_penalty: over 1 makes tokens of the last `repeat_last_n` less likely; 1: off; over 0 up to 10.
        repeat_last_n: how many tokens back the three penalties look; 0: off; -1: the whole context.
        frequency_penalty, presence_penalty: -2 to 2, 0: off; subtracted per occurrence, and once per token
            that occurred.
        seed: 0 to 2**32 - 2; None: a fresh one, reported in `Finished`.
        grammar: GBNF that the text must follow, its start rule ``root``.
        json_schema: JSON schema that the text must follow; not with `grammar`.
        deadline_ms: milliseconds after which the generation ends with `deadline_exceeded`; None: no limit.
    """

    prompt: str | None = None
    messages: tuple[Mapping[str, str], ...] | None = None
    system_prompt: str | None = None
    raw: bool = False
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    grammar: str | None = None
    json_schema: Mapping[str, Any] | None = None
    deadline_ms: int | None = None

    def __post_init__(self) -> None:
        _check_text(self)
        _check_numbers(self)
        _check_constraint(self)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> GenerateRequest:
        """The request that a map of parameters describes; nil stands for the default.

        Raises:
            TypeMismatch: a parameter is unknown, or of the wrong type or range; the message names it.
            TooLarge: a grammar or schema is over the limit.
        """
        known = {field.name for field in fields(cls)}
        for name in options:
            if name not in known:
                raise _wrong(str(name), f"is not known; known are {', '.join(sorted(known))}")
        given = {name: value for name, value in options.items() if value is not None}
        stop = given.get("stop")
        if isinstance(stop, str):
            given["stop"] = (stop,)
        elif isinstance(stop, list):
            given["stop"] = tuple(stop)
        if isinstance(given.get("messages"), list):
            given["messages"] = tuple(given["messages"])
        return cls(**given)

    def to_options(self) -> dict[str, Any]:
        """The map that `from_options` reads back, of plain data, defaults left out."""
        options: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                options[field.name] = list(value) if isinstance(value, tuple) else value
        return options


def _wrong(parameter: str, what: str) -> TypeMismatch:
    return TypeMismatch(f"parameter {parameter} {what}", details={"parameter": parameter})


def _require(name: str, value: Any, kind: type, word: str) -> None:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise _wrong(name, f"must be {word}, not {type(value).__name__}")


def _check_text(request: GenerateRequest) -> None:
    if (request.prompt is None) == (request.messages is None):
        raise _wrong("prompt", "or messages: exactly one of them must be given")
    for name in ("prompt", "system_prompt"):
        if getattr(request, name) is not None:
            _require(name, getattr(request, name), str, "a string")
    _require("raw", request.raw, bool, "true or false")
    if request.raw and (request.prompt is None or request.system_prompt is not None):
        raise _wrong("raw", "goes with prompt alone: there is no template for messages or system_prompt")
    if request.messages is not None:
        _check_messages(request.messages)
    _require("stop", request.stop, tuple, "a string or a list of strings")
    if len(request.stop) > MAX_STOPS:
        raise _wrong("stop", f"has {len(request.stop)} strings, at most {MAX_STOPS} are allowed")
    for stop in request.stop:
        _require("stop", stop, str, "a string or a list of strings")
        if not 0 < len(stop) <= MAX_STOP_CHARACTERS:
            raise _wrong("stop", f"must hold strings of 1 to {MAX_STOP_CHARACTERS} characters")


def _check_messages(messages: Sequence[Any]) -> None:
    _require("messages", messages, tuple, "a list of maps")
    if not messages:
        raise _wrong("messages", "must not be empty")
    for position, message in enumerate(messages):
        name = f"messages[{position}]"
        _require(name, message, dict, "a map of role and content")
        if set(message) != {"role", "content"}:
            raise _wrong(name, "must have role and content, and nothing else")
        if message["role"] not in _ROLES:
            raise _wrong(f"{name}.role", f"must be one of {', '.join(_ROLES)}")
        _require(f"{name}.content", message["content"], str, "a string")


def _check_numbers(request: GenerateRequest) -> None:
    _whole(request, "max_tokens", 1, 2**31 - 1)
    _whole(request, "top_k", 0, 2**31 - 1)
    _whole(request, "repeat_last_n", -1, 2**20)
    _whole(request, "seed", 0, MAX_SEED)
    _whole(request, "deadline_ms", 1, 2**53)
    _real(request, "temperature", 0.0, 10.0)
    _real(request, "top_p", 0.0, 1.0, above=True)
    _real(request, "min_p", 0.0, 1.0)
    _real(request, "repeat_penalty", 0.0, 10.0, above=True)
    _real(request, "frequency_penalty", -2.0, 2.0)
    _real(request, "presence_penalty", -2.0, 2.0)


def _whole(request: GenerateRequest, name: str, low: int, high: int) -> None:
    value = getattr(request, name)
    if value is None and name in ("max_tokens", "seed", "deadline_ms"):
        return
    _require(name, value, int, "an integer")
    if not low <= value <= high:
        raise _wrong(name, f"must be {low} to {high}, not {value}")


def _real(request: GenerateRequest, name: str, low: float, high: float, *, above: bool = False) -> None:
    value = getattr(request, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _wrong(name, f"must be a number, not {value!r}")
    if not low <= value <= high or (above and value == low):
        raise _wrong(name, f"must be {'over ' if above else ''}{low:g} up to {high:g}, not {value:g}")


def _check_constraint(request: GenerateRequest) -> None:
    if request.grammar is not None:
        _require("grammar", request.grammar, str, "a string")
        if request.json_schema is not None:
            raise _wrong("grammar", "and json_schema exclude each other")
        if len(request.grammar.encode(errors="replace")) > MAX_GRAMMAR_BYTES:
            raise TooLarge(f"parameter grammar is over {MAX_GRAMMAR_BYTES} bytes", details={"parameter": "grammar"})
    if request.json_schema is not None:
        _require("json_schema", request.json_schema, dict, "a map")


# ---------------------------------------------------------------------------------------------------------- models


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Which model, and how it is to be loaded.

    Attributes:
        model: ``tiny`` (the packaged one) or the path of a GGUF file.
        context_length: tokens of context; None: what the model was trained with, at most 4096.
        gpu_layers: layers to put on a GPU; 0: none, -1: all.
        threads: threads that compute; None: one per core (one alone for a model too small to share out).
    """

    model: str
    context_length: int | None = None
    gpu_layers: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        _require("model", self.model, str, "a string")
        if not self.model or "\0" in self.model:
            raise _wrong("model", "must be a name or a path")
        for name, low, high in (
            ("context_length", 8, 2**22),
            ("gpu_layers", -1, 10_000),
            ("threads", 1, 512),
        ):
            value = getattr(self, name)
            if value is None and name != "gpu_layers":
                continue
            _require(name, value, int, "an integer")
            if not low <= value <= high:
                raise _wrong(name, f"must be {low} to {high}, not {value}")

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> ModelSpec:
        """The spec that a map describes; nil stands for the default.

        Raises:
            TypeMismatch: a field is unknown, missing, or of the wrong type or range; the message names it.
        """
        known = {field.name for field in fields(cls)}
        for name in options:
            if name not in known:
                raise _wrong(str(name), f"is not known; known are {', '.join(sorted(known))}")
        if options.get("model") is None:
            raise _wrong("model", "must be given")
        return cls(**{name: value for name, value in options.items() if value is not None})


# -------------------------------------------------------------------------------------------------------- interface


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can do."""

    streaming: bool = True
    grammar: bool = False
    json_schema: bool = False
    chat: bool = True
    cancel: bool = True


BackendState = Literal["stopped", "loading", "ready", "closed"]


@dataclass(frozen=True, slots=True)
class BackendHealth:
    """How a backend stands.

    Attributes:
        in_flight: generations that run or wait in it.
        os_pid: its worker's process id, if it has one.
        restarts: how often its worker had to be started again.
    """

    state: BackendState
    in_flight: int
    os_pid: int | None = None
    restarts: int = 0


class Backend(Protocol):
    """One loaded model, however it is run."""

    def generate(
        self, request: GenerateRequest, on_text: Callable[[str], None] | None = None
    ) -> AsyncGenerator[Event, None]:
        """Generate: any number of `TextChunk` and `Progress`, then one `Finished`.

        Closing or cancelling the generator stops the model.

        Args:
            on_text: gets the text, as it comes and at once, in place of `TextChunk` events; must not raise.

        Raises:
            DemandportError: what failed, when the first or a later event is asked for.
        """
        ...

    def capabilities(self) -> Capabilities:
        """What it can do; the same for as long as it lives."""
        ...

    def health(self) -> BackendHealth:
        """How it stands now; does not block."""
        ...

    async def close(self) -> None:
        """End it; what still runs in it ends with `backend_unavailable`."""
        ...
