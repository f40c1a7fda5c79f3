"""The sampler chain of one generation, made from its parameters, each of which is honoured or refused."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from demandport.errors import Internal, TooLarge, TypeMismatch
from demandport.inference.requests import MAX_GRAMMAR_BYTES, MAX_SEED, GenerateRequest

# Beyond these llama.cpp's recursive parser, or the grammar it unrolls, can take the process down.
MAX_NESTING = 64
MAX_REPETITION = 1000
MAX_SCHEMA_BYTES = 64 * 1024

#: What a request leaves open; those of llama.cpp's own programs.
_DEFAULTS: dict[str, float] = {
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.05,
    "repeat_penalty": 1.0,
    "repeat_last_n": 64,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
}

_OPEN, _CLOSE = "([{", ")]}"
_LITERAL = re.compile(r'"(?:[^"\\]|\\.)*"|\[(?:[^\]\\]|\\.)*\]|#[^\n]*', re.DOTALL)
_REPETITION = re.compile(r"\{\s*(\d*)\s*(,?)\s*(\d*)\s*\}")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"|#[^\n]*', re.DOTALL)
_CLASS = re.compile(r"\[((?:[^\]\\]|\\.)*)\]", re.DOTALL)
_RANGE = re.compile(r"(\\?.)-(\\?.)", re.DOTALL)
_TOKEN = re.compile(r"<\[")
_COUNTS = {"maxLength", "minLength", "maxItems", "minItems", "maxProperties", "minProperties"}


def draw_seed() -> int:
    """A fresh seed, from the operating system."""
    return secrets.randbelow(MAX_SEED + 1)


def grammar_text(request: GenerateRequest) -> str | None:
    """The GBNF that the request asks for, from its `grammar` or its `json_schema`; None when it asks for none.

    Raises:
        TypeMismatch: it cannot be turned into a grammar.
        TooLarge: it is over the limits of size, nesting or repetition.
    """
    if request.json_schema is not None:
        grammar = _from_schema(request.json_schema)
        # `maxLength` and `maxItems` become that many optional groups, one in the other.
        _check_grammar(grammar, "json_schema", MAX_NESTING + MAX_REPETITION)
        return grammar
    if request.grammar is not None:
        _check_grammar(request.grammar, "grammar", MAX_NESTING)
    return request.grammar


def _from_schema(schema: Mapping[str, Any]) -> str:
    _check_depth(schema)
    _check_counts(schema)
    try:
        text = json.dumps(schema)
    except (TypeError, ValueError) as failed:
        raise _refused("json_schema", f"is no JSON: {failed}") from None
    if len(text) > MAX_SCHEMA_BYTES:
        raise TooLarge(f"parameter json_schema is over {MAX_SCHEMA_BYTES} bytes", details={"parameter": "json_schema"})
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    try:
        return str(json_schema_to_gbnf(text))
    except RecursionError:
        raise _refused("json_schema", "refers to itself without end") from None
    except Exception as failed:  # the converter raises whatever the odd schema makes it stumble over
        raise _refused("json_schema", f"cannot be made a grammar: {type(failed).__name__} {failed}") from None


def _check_depth(schema: Any) -> None:
    level = [schema]
    for _ in range(MAX_NESTING):
        level = [
            item
            for outer in level
            if isinstance(outer, dict | list)
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise TooLarge(f"parameter json_schema is nested deeper than {MAX_NESTING}", details={"parameter": "json_schema"})


def _check_counts(schema: Any) -> None:
    """The converter writes out whatever is counted, before anybody can look at the result."""
    waiting = [schema]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting += item.values()
            for name in _COUNTS & item.keys():
                count = item[name]
                if isinstance(count, int | float) and count > MAX_REPETITION:
                    raise TooLarge(f"parameter json_schema has {name} over {MAX_REPETITION}")
            if isinstance(item.get("pattern"), str):
                _check_repetitions(item["pattern"], "json_schema")
        elif isinstance(item, list):
            waiting += item


def _check_repetitions(text: str, parameter: str) -> None:
    for low, comma, high in _REPETITION.findall(text):
        if max(int(low or 0), int(high or 0)) > MAX_REPETITION:
            raise TooLarge(f"parameter {parameter} repeats more than {MAX_REPETITION} times")
        if comma and high and int(low or 0) > int(high):
            raise _refused(parameter, f"repeats at least {low} and at most {high} times")


def _check_ranges(grammar: str, parameter: str) -> None:
    """llama.cpp ends the process over a character range that runs backwards."""
    for characters in _CLASS.findall(_QUOTED.sub(" ", grammar)):
        for low, high in _RANGE.findall(characters):
            if len(low) == len(high) == 1 and low > high:
                raise _refused(parameter, f"has the range {low}-{high}, which runs backwards")


def _check_grammar(grammar: str, parameter: str, nesting: int) -> None:
    if "\0" in grammar:
        raise _refused(parameter, "holds a NUL character")
    if len(grammar.encode(errors="replace")) > MAX_GRAMMAR_BYTES:
        raise TooLarge(f"parameter {parameter} makes a grammar over {MAX_GRAMMAR_BYTES} bytes")
    if _TOKEN.search(_QUOTED.sub(" ", grammar)):
        raise _refused(parameter, "names tokens by number, which differ from model to model")
    _check_ranges(grammar, parameter)
    plain = _LITERAL.sub(" ", grammar)
    _check_repetitions(plain, parameter)
    depth = 0
    for character in plain:
        depth += (character in _OPEN) - (character in _CLOSE)
        if depth > nesting:
            raise TooLarge(f"parameter {parameter} is nested deeper than {nesting}")


def _refused(parameter: str, what: str) -> TypeMismatch:
    return TypeMismatch(f"parameter {parameter} {what}", details={"parameter": parameter})


class Sampler:
    """Chooses the next token of one sequence. Belongs to the thread that owns the context; free it with `close`.

    Args:
        vocabulary: llama.cpp's handle of the model's vocabulary.
        tokens: number of tokens in the vocabulary.
        context_length: tokens of context, what `repeat_last_n` = -1 stands for.
        request: the parameters.
        seed: used when `temperature` is over 0.
        prompt: tokens of the prompt, which count for the penalties.

    Raises:
        TypeMismatch: the grammar is not valid.
        TooLarge: the grammar is over a limit.
    """

    def __init__(
        self,
        vocabulary: Any,
        tokens: int,
        context_length: int,
        request: GenerateRequest,
        seed: int,
        prompt: Sequence[int] = (),
    ) -> None:
        import llama_cpp

        self._llama = llama_cpp
        grammar = grammar_text(request)
        chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        if not chain:
            raise Internal("llama.cpp gives no sampler chain")
        self.handle: Any = chain
        try:
            if grammar is not None:
                self._add_grammar(vocabulary, grammar, "grammar" if request.json_schema is None else "json_schema")
            self._add_penalties(request, tokens, context_length, prompt)
            self._add_choice(request, seed)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Free it; harmless when it is freed."""
        handle, self.handle = self.handle, None
        if handle:
            self._llama.llama_sampler_free(handle)

    def _add(self, sampler: Any) -> None:
        if not sampler:
            raise Internal("llama.cpp gives no sampler")
        self._llama.llama_sampler_chain_add(self.handle, sampler)

    def _add_grammar(self, vocabulary: Any, grammar: str, parameter: str) -> None:
        made = self._llama.llama_sampler_init_grammar(vocabulary, grammar.encode(errors="replace"), b"root")
        if not made:
            raise _refused(parameter, "is no valid grammar with a rule named root")
        self._add(made)

    def _add_penalties(self, request: GenerateRequest, tokens: int, context_length: int, prompt: Sequence[int]) -> None:
        last = int(_said(request, "repeat_last_n"))
        if last < 0:
            last = context_length
        repeat, frequency, presence = (
            _said(request, name) for name in ("repeat_penalty", "frequency_penalty", "presence_penalty")
        )
        if last == 0 or (repeat == 1 and frequency == 0 and presence == 0):
            return
        penalties = self._llama.llama_sampler_init_penalties(tokens, last, repeat, frequency, presence)
        for token in prompt[-last:]:
            self._llama.llama_sampler_accept(penalties, token)
        self._add(penalties)

    def _add_choice(self, request: GenerateRequest, seed: int) -> None:
        llama = self._llama
        temperature, top_k, top_p, min_p = (_said(request, name) for name in ("temperature", "top_k", "top_p", "min_p"))
        if temperature == 0:  # the most likely token survives top_k, top_p and min_p whatever they are
            self._add(llama.llama_sampler_init_greedy())
            return
        if top_k > 0:
            self._add(llama.llama_sampler_init_top_k(int(top_k)))
        if top_p < 1:
            self._add(llama.llama_sampler_init_top_p(top_p, 1))
        if min_p > 0:
            self._add(llama.llama_sampler_init_min_p(min_p, 1))
        self._add(llama.llama_sampler_init_temp(temperature))
        self._add(llama.llama_sampler_init_dist(seed))


def _said(request: GenerateRequest, name: str) -> float:
    value: float | None = getattr(request, name)
    return _DEFAULTS[name] if value is None else value
