"""What is asked of a model, as plain data that is valid or not made at all. No vendor, no loop."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from demandport.errors import TooLarge
from demandport.settings import known_options, require, whole, wrong

#: Drawing a seed: llama.cpp keeps the largest 32-bit value for "any".
MAX_SEED = 2**32 - 2
DEFAULT_MAX_TOKENS = 512
MAX_GRAMMAR_BYTES = 64 * 1024
MAX_STOPS = 64
MAX_STOP_CHARACTERS = 1024
MAX_LOGPROBS = 20
MAX_ADAPTERS = 16
_ROLES = ("system", "user", "assistant", "tool")
_MESSAGE_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id"}
_TOOL_CHOICES = ("auto", "none", "required")


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One text to generate. None stands for "not said": the backend's own default then holds.

    Attributes:
        prompt: the user's text; exactly one of `prompt` and `messages` is given.
        messages: a conversation in the form of OpenAI's chat API: maps of ``role`` (system, user, assistant, tool) and
            ``content``, which is a text or a list of parts, ``{"type": "text", "text"}`` and
            ``{"type": "image_url", "image_url": {"url": "data:…"}}``; an assistant's may have ``tool_calls``, a tool's
            has ``tool_call_id``.
        system_prompt: put before the conversation as a system message; not with `raw`.
        raw: send `prompt` as it stands, without the model's chat template; special tokens in it are read as such.
        max_tokens: most tokens to generate.
        stop: strings that end the text and are not part of it.
        temperature: 0 is greedy, the most likely token always; up to 10.
        top_k: choose among the k most likely tokens; 0: all.
        top_p: choose among the most likely tokens that make up this share, over 0 up to 1 (1: all).
        min_p: leave out tokens less likely than this share of the most likely one, 0 (none) to 1.
        repeat_penalty: over 1 makes tokens of the last `repeat_last_n` less likely; 1: off; over 0 up to 10.
        repeat_last_n: how many tokens back the three penalties look; 0: off; -1: the whole context.
        frequency_penalty, presence_penalty: -2 to 2, 0: off; subtracted per occurrence, and once per token
            that occurred.
        seed: 0 to 2**32 - 2; None: a fresh one, reported in `Finished` where the backend can.
        grammar: GBNF that the text must follow, its start rule ``root``.
        json_schema: JSON schema that the text must follow; not with `grammar`.
        tools: what the model may call, in the form of OpenAI's API: ``{"type": "function", "function": {…}}``.
        tool_choice: ``auto``, ``none`` or ``required``; with `tools` only.
        logprobs: report the log-probability of each token and of this many others, 0 to 20.
        adapters: LoRA adapters to apply, maps of ``path`` and ``scale`` (1.0).
        kv_cache: what `Finished.kv_cache` of an earlier generation was, or a part of it: the text goes on there.
        priority: of the requests that wait for a place in the batch, those of the highest start first; -100 to 100.
        deadline_ms: milliseconds after which the generation ends with `deadline_exceeded`; None: no limit.
    """

    prompt: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    system_prompt: str | None = None
    raw: bool = False
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    grammar: str | None = None
    json_schema: Mapping[str, Any] | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    tool_choice: str | None = None
    logprobs: int | None = None
    adapters: tuple[Mapping[str, Any], ...] = ()
    kv_cache: Mapping[str, Any] | None = None
    priority: int = 0
    deadline_ms: int | None = None

    def __post_init__(self) -> None:
        _check_text(self)
        _check_numbers(self)
        _check_constraint(self)
        _check_tools(self)
        _check_adapters(self.adapters)
        if self.kv_cache is not None:
            require("kv_cache", self.kv_cache, dict, "a map")

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> GenerateRequest:
        """The request that a map of parameters describes; nil stands for the default.

        Raises:
            TypeMismatch: a parameter is unknown, or of the wrong type or range; the message names it.
            TooLarge: a grammar or schema is over the limit.
        """
        given = known_options(cls, options)
        if isinstance(given.get("stop"), str):
            given["stop"] = (given["stop"],)
        return cls(**_with_tuples(given, "stop", "messages", "tools", "adapters"))

    def to_options(self) -> dict[str, Any]:
        """The map that `from_options` reads back, of plain data, defaults left out."""
        return to_options(self)

    def given(self) -> list[str]:
        """Names of the parameters that differ from their defaults."""
        return list(to_options(self))

    def conversation(self) -> list[dict[str, Any]]:
        """The request as messages, the system prompt first."""
        messages = [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]
        if self.messages is not None:
            return [*messages, *(dict(message) for message in self.messages)]
        return [*messages, {"role": "user", "content": self.prompt or ""}]

    @property
    def images(self) -> bool:
        """Some message has an image."""
        return any(
            part["type"] == "image_url"
            for message in self.messages or ()
            if isinstance(message["content"], list)
            for part in message["content"]
        )


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """Texts to turn into vectors.

    Attributes:
        texts: at least one.
        normalize: scale each vector to length 1.
        deadline_ms: as for `GenerateRequest`.
    """

    texts: tuple[str, ...]
    normalize: bool = True
    deadline_ms: int | None = None

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> EmbedRequest:
        """The request that a map describes. Raises `TypeMismatch` that names what is wrong."""
        return cls(**_with_tuples(known_options(cls, options), "texts"))

    def __post_init__(self) -> None:
        _require_texts("texts", self.texts)
        require("normalize", self.normalize, bool, "true or false")
        whole(self, "deadline_ms", 1, 2**53, optional=True)


@dataclass(frozen=True, slots=True)
class RerankRequest:
    """Documents to score by how well they answer a query.

    Attributes:
        query: the question. documents: at least one text.
        deadline_ms: as for `GenerateRequest`.
    """

    query: str
    documents: tuple[str, ...]
    deadline_ms: int | None = None

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> RerankRequest:
        """The request that a map describes. Raises `TypeMismatch` that names what is wrong."""
        return cls(**_with_tuples(known_options(cls, options), "documents"))

    def __post_init__(self) -> None:
        require("query", self.query, str, "a string")
        _require_texts("documents", self.documents)
        whole(self, "deadline_ms", 1, 2**53, optional=True)


def draw_seed() -> int:
    """A fresh seed, from the operating system."""
    return secrets.randbelow(MAX_SEED + 1)


# ---------------------------------------------------------------------------------------------------------- checks


def to_options(request: Any) -> dict[str, Any]:
    """The fields of a request that differ from their defaults, as plain data."""
    options: dict[str, Any] = {}
    for field in fields(request):
        value = getattr(request, field.name)
        if value != field.default:
            options[field.name] = list(value) if isinstance(value, tuple) else value
    return options


def _with_tuples(options: dict[str, Any], *names: str) -> dict[str, Any]:
    """The options with the lists of those names as tuples, which cannot be changed."""
    return {
        name: tuple(value) if name in names and isinstance(value, list) else value for name, value in options.items()
    }


def _real(name: str, value: Any, low: float, high: float, *, above: bool = False) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise wrong(name, f"must be a number, not {value!r}")
    if not low <= value <= high or (above and value == low):
        raise wrong(name, f"must be {'over ' if above else ''}{low:g} up to {high:g}, not {value:g}")


def _require_texts(name: str, texts: Any) -> None:
    require(name, texts, tuple, "a list of strings")
    if not texts:
        raise wrong(name, "must not be empty")
    for position, text in enumerate(texts):
        require(f"{name}[{position}]", text, str, "a string")


def _check_text(request: GenerateRequest) -> None:
    if (request.prompt is None) == (request.messages is None):
        raise wrong("prompt", "or messages: exactly one of them must be given")
    for name in ("prompt", "system_prompt"):
        if getattr(request, name) is not None:
            require(name, getattr(request, name), str, "a string")
    require("raw", request.raw, bool, "true or false")
    if request.raw and (request.prompt is None or request.system_prompt is not None):
        raise wrong("raw", "goes with prompt alone: there is no template for messages or system_prompt")
    if request.messages is not None:
        _check_messages(request.messages)
    require("stop", request.stop, tuple, "a string or a list of strings")
    if len(request.stop) > MAX_STOPS:
        raise wrong("stop", f"has {len(request.stop)} strings, at most {MAX_STOPS} are allowed")
    for stop in request.stop:
        require("stop", stop, str, "a string or a list of strings")
        if not 0 < len(stop) <= MAX_STOP_CHARACTERS:
            raise wrong("stop", f"must hold strings of 1 to {MAX_STOP_CHARACTERS} characters")


def _check_messages(messages: Sequence[Any]) -> None:
    require("messages", messages, tuple, "a list of maps")
    if not messages:
        raise wrong("messages", "must not be empty")
    for position, message in enumerate(messages):
        name = f"messages[{position}]"
        require(name, message, dict, "a map of role and content")
        if not {"role", "content"} <= set(message) <= _MESSAGE_KEYS:
            raise wrong(name, "must have role and content, and besides only name, tool_calls and tool_call_id")
        role = message["role"]
        if role not in _ROLES:
            raise wrong(f"{name}.role", f"must be one of {', '.join(_ROLES)}")
        if ("tool_calls" in message and role != "assistant") or (("tool_call_id" in message) != (role == "tool")):
            raise wrong(name, "has tool_calls with role assistant only, and tool_call_id with role tool")
        _check_content(f"{name}.content", message["content"])


def _check_content(name: str, content: Any) -> None:
    require(name, content, (str, list), "a string or a list of parts")
    if isinstance(content, str):
        return
    for position, part in enumerate(content):
        place = f"{name}[{position}]"
        require(place, part, dict, "a map of type and text or image_url")
        if part.get("type") == "text":
            require(f"{place}.text", part.get("text"), str, "a string")
        elif part.get("type") == "image_url":
            image = part.get("image_url")
            require(f"{place}.image_url", image, dict, "a map with the url")
            require(f"{place}.image_url.url", image.get("url"), str, "a string")
        else:
            raise wrong(f"{place}.type", "must be text or image_url")


def _check_numbers(request: GenerateRequest) -> None:
    whole(request, "max_tokens", 1, 2**31 - 1, optional=True)
    whole(request, "top_k", 0, 2**31 - 1, optional=True)
    whole(request, "repeat_last_n", -1, 2**20, optional=True)
    whole(request, "seed", 0, MAX_SEED, optional=True)
    whole(request, "logprobs", 0, MAX_LOGPROBS, optional=True)
    whole(request, "priority", -100, 100)
    whole(request, "deadline_ms", 1, 2**53, optional=True)
    _real("temperature", request.temperature, 0.0, 10.0)
    _real("top_p", request.top_p, 0.0, 1.0, above=True)
    _real("min_p", request.min_p, 0.0, 1.0)
    _real("repeat_penalty", request.repeat_penalty, 0.0, 10.0, above=True)
    _real("frequency_penalty", request.frequency_penalty, -2.0, 2.0)
    _real("presence_penalty", request.presence_penalty, -2.0, 2.0)


def _check_constraint(request: GenerateRequest) -> None:
    if request.grammar is not None:
        require("grammar", request.grammar, str, "a string")
        if request.json_schema is not None:
            raise wrong("grammar", "and json_schema exclude each other")
        if not request.grammar.strip():
            raise wrong("grammar", "is empty")
        if len(request.grammar.encode(errors="replace")) > MAX_GRAMMAR_BYTES:
            raise TooLarge(f"parameter grammar is over {MAX_GRAMMAR_BYTES} bytes", details={"parameter": "grammar"})
    if request.json_schema is not None:
        require("json_schema", request.json_schema, dict, "a map")


def _check_tools(request: GenerateRequest) -> None:
    require("tools", request.tools, tuple, "a list of maps")
    for position, tool in enumerate(request.tools):
        require(f"tools[{position}]", tool, dict, "a map of type and function")
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict) or not function.get("name"):
            raise wrong(f"tools[{position}]", 'must be {"type": "function", "function": {"name", …}}')
    if request.tool_choice is not None and (request.tool_choice not in _TOOL_CHOICES or not request.tools):
        raise wrong("tool_choice", f"must be one of {', '.join(_TOOL_CHOICES)}, and goes with tools")


def _check_adapters(adapters: Any) -> None:
    require("adapters", adapters, tuple, "a list of maps")
    if len(adapters) > MAX_ADAPTERS:
        raise wrong("adapters", f"are {len(adapters)}, at most {MAX_ADAPTERS} are allowed")
    for position, adapter in enumerate(adapters):
        name = f"adapters[{position}]"
        require(name, adapter, dict, "a map of path and scale")
        if not {"path"} <= set(adapter) <= {"path", "scale"}:
            raise wrong(name, "must have path, and besides only scale")
        require(f"{name}.path", adapter["path"], str, "a string")
        _real(f"{name}.scale", adapter.get("scale"), -100.0, 100.0)
