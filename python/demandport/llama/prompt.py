"""From a request to the tokens of its prompt, with the model's own chat template.

User text must not become a control token: ``<|end|>`` typed by a user is text. The template needs to see the
text, since it may trim or compare it, and cutting the rendered prompt at every message would tokenise
differently from what the model was trained on. So:

1. The first character of every control token's text is replaced in the messages by a private-use character that occurs
   nowhere in them. No control token can then be found in user text, whatever the template does around it.
2. The template is rendered, and the result is cut at the control tokens that are found now: these are the template's.
3. The private characters become again what they were, and the pieces between are tokenised as plain text.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from demandport.errors import ContextOverflow, ModelLoadFailed, TypeMismatch
from demandport.inference.requests import GenerateRequest
from demandport.llama.model import Model

RENDER_TIMEOUT_S = 5.0
#: No vocabulary has a longer token.
MOST_CHARACTERS_PER_TOKEN = 256
_PRIVATE = range(0x10F000, 0x10FFFD)


class PromptBuilder:
    """Makes prompts for one model; its template is compiled once. Use it on the process's main thread.

    Raises:
        ModelLoadFailed: the model's template is no Jinja.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._pattern = _special_pattern(model.special_texts)
        self._firsts = sorted({text[0] for text in model.special_texts})
        source = model.chat_template
        self._template = None if source is None else _compile(source)

    def tokens(self, request: GenerateRequest) -> list[int]:
        """The prompt's tokens, the one that begins every text included, unless it goes on from a KV cache.

        Raises:
            TypeMismatch: the template refuses the messages, or the model has none and needs one for them.
        """
        tokens = self._unbegun(request)
        if request.kv_cache is None:
            return self._begun(tokens)
        return tokens[1:] if tokens[:1] == [self._model.begin] else tokens

    def turn_end(self, request: GenerateRequest) -> list[int]:
        """The tokens that the template puts after an answer, before the next message; none without a template."""
        return [] if request.raw or self._template is None else self._turn_end

    @functools.cached_property
    def _turn_end(self) -> list[int]:
        answer = chr(_PRIVATE.start)
        try:
            rendered = self._render(
                [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}], answered=True
            )
        except TypeMismatch:
            return []
        return list(self._pieces(rendered.rpartition(answer)[2], {}))

    def _unbegun(self, request: GenerateRequest) -> list[int]:
        if request.raw:
            return self._model.tokenize(self._short_enough(request.prompt or ""), special=True)
        if self._template is None:
            return self._model.tokenize(self._short_enough(_without_template(request)), special=False)
        messages = [_flat(message) for message in request.conversation()]
        masks = self._masks(list(_texts(messages)))
        rendered = self._short_enough(self._render(_mapped(messages, lambda text: text.translate(masks))))
        unmask = {ord(private): chr(plain) for plain, private in masks.items()}
        return list(self._pieces(rendered, unmask))

    def _short_enough(self, text: str) -> str:
        """Refuse what cannot fit before it is tokenised, which takes long for very long texts."""
        room = self._model.context_length
        if len(text) > room * MOST_CHARACTERS_PER_TOKEN:
            facts = {"characters": len(text), "context_length": room}
            raise ContextOverflow(f"a prompt of {len(text)} characters does not fit {room} tokens", details=facts)
        return text

    def _begun(self, tokens: list[int]) -> list[int]:
        model = self._model
        if (model.adds_begin and tokens[:1] != [model.begin]) or (not tokens and model.begin >= 0):
            return [model.begin, *tokens]
        return tokens

    def _masks(self, texts: list[str]) -> dict[int, str]:
        used = {character for text in texts for character in text if character >= "\U0010f000"}
        free = (chr(code) for code in _PRIVATE if chr(code) not in used)
        masks = {ord(first): private for first, private in zip(self._firsts, free, strict=False)}
        if len(masks) < len(self._firsts):
            raise TypeMismatch("the messages hold too many private-use characters to be told from control tokens")
        return masks

    def _render(self, messages: list[dict[str, Any]], answered: bool = False) -> str:
        assert self._template is not None
        try:
            with _time_limit(RENDER_TIMEOUT_S):
                return str(
                    self._template.render(
                        messages=messages,
                        add_generation_prompt=not answered,
                        bos_token=self._model.begin_text,
                        eos_token=self._model.end_text,
                    )
                )
        except TimeoutError:
            raise TypeMismatch(f"the model's chat template takes over {RENDER_TIMEOUT_S:g} s for them") from None
        except Exception as failed:  # a template can raise anything
            raise TypeMismatch(f"the model's chat template refuses the messages: {failed}") from None

    def _pieces(self, rendered: str, unmask: Mapping[int, str]) -> Iterator[int]:
        position = 0
        for found in self._pattern.finditer(rendered) if self._pattern else ():
            yield from self._plain(rendered[position : found.start()], unmask)
            yield from self._model.tokenize(found.group(), special=True)
            position = found.end()
        yield from self._plain(rendered[position:], unmask)

    def _plain(self, text: str, unmask: Mapping[int, str]) -> list[int]:
        return self._model.tokenize(text.translate(unmask), special=False) if text else []


def _special_pattern(texts: frozenset[str]) -> re.Pattern[str] | None:
    """What finds any of `texts`, the longest first as llama.cpp does; None when there are none."""
    if not texts:
        return None
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=lambda text: (-len(text), text))))


def _flat(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its parts of text as one: templates of models without vision know no parts."""
    content = message["content"]
    return message if isinstance(content, str) else {**message, "content": "".join(part["text"] for part in content)}


def _mapped(value: Any, change: Callable[[str], str], key: str = "") -> Any:
    """`value` with every text in it changed, but for roles and types, which the template compares."""
    if isinstance(value, str):
        return value if key in ("role", "type") else change(value)
    if isinstance(value, list):
        return [_mapped(one, change) for one in value]
    return {name: _mapped(one, change, name) for name, one in value.items()} if isinstance(value, dict) else value


def _texts(messages: list[dict[str, Any]]) -> list[str]:
    found: list[str] = []

    def keep(text: str) -> str:
        found.append(text)
        return text

    _mapped(messages, keep)
    return found


def _without_template(request: GenerateRequest) -> str:
    if request.messages is not None or request.system_prompt is not None:
        raise TypeMismatch("the model has no chat template: give it a prompt alone, not messages or system_prompt")
    return request.prompt or ""


def _compile(source: str) -> Any:
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols"],
        optimized=False,  # which would work out constants before any time is taken
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        with _time_limit(RENDER_TIMEOUT_S):
            return environment.from_string(source)
    except (TemplateError, RecursionError, TimeoutError) as failed:
        raise ModelLoadFailed(f"the model's chat template cannot be read: {failed}") from None


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block once `seconds` have passed. Main thread only."""

    def expire(_: int, __: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
