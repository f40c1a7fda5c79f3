"""Grammars (GBNF): made from JSON schemas, and looked at before llama.cpp sees them.

llama.cpp parses them recursively, writes repetitions out, and keeps a stack for every place that the text may be at.
Some grammars bring the process down by that, or hold it up for ever; what can be seen beforehand is refused here.

Source: grammars/README.md and src/llama-grammar.cpp of llama.cpp.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from demandport.errors import TooLarge, TypeMismatch
from demandport.inference.requests import MAX_GRAMMAR_BYTES, GenerateRequest

MAX_NESTING = 64
MAX_REPETITION = 1000
#: Places at which a text may be at once.
MAX_PLACES = 20_000
#: Repetitions within repetitions, multiplied.
MAX_PRODUCT = 1_000_000
MAX_SCHEMA_BYTES = 64 * 1024

_TOKENS = re.compile(
    r"""\s+ | \#[^\n]* | (?P<rule>[A-Za-z0-9_-]+)\s*::= | (?P<name>[A-Za-z0-9_-]+) | (?P<text>"(?:[^"\\]|\\.)*")
    | \[(?P<range>(?:[^\]\\]|\\.)*)\] | (?P<any>\.) | (?P<token>!?<\[?) | (?P<times>[*+?]|\{[^}]*\})
    | (?P<open>\() | (?P<close>\)) | (?P<or>\|) | .""",
    re.DOTALL | re.VERBOSE,
)
_COUNT = re.compile(r"\{\s*(\d*)\s*(,?)\s*(\d*)\s*\}")
_RANGE = re.compile(r"(\\?.)-(\\?.)", re.DOTALL)
_COUNTED = {"maxLength", "minLength", "maxItems", "minItems", "maxProperties", "minProperties"}


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
            for name in _COUNTED & item.keys():
                count = item[name]
                if isinstance(count, int | float) and count > MAX_REPETITION:
                    raise TooLarge(f"parameter json_schema has {name} over {MAX_REPETITION}")
            if isinstance(item.get("pattern"), str):
                _check_pattern(item["pattern"])
        elif isinstance(item, list):
            waiting += item


def _check_pattern(pattern: str) -> None:
    for times in _COUNT.finditer(pattern):
        _check_times(times.group(), "json_schema")
    # Written nearly like a grammar: groups and repetitions are.
    _check_repeats(_measured(_rules(_read(pattern)))[1], "json_schema")


def _check_repeats(repeats: int, parameter: str) -> None:
    if repeats > MAX_PRODUCT:
        raise TooLarge(f"parameter {parameter} repeats repetitions, over {MAX_PRODUCT} times together")


def _refused(parameter: str, what: str) -> TypeMismatch:
    return TypeMismatch(f"parameter {parameter} {what}", details={"parameter": parameter})


# ------------------------------------------------------------------------------------------------------ the grammar


def _check_grammar(grammar: str, parameter: str, nesting: int) -> None:
    if "\0" in grammar:
        raise _refused(parameter, "holds a NUL character")
    if len(grammar.encode(errors="replace")) > MAX_GRAMMAR_BYTES:
        raise TooLarge(f"parameter {parameter} makes a grammar over {MAX_GRAMMAR_BYTES} bytes")
    depth, tokens = 0, list(_read(grammar))
    for kind, text in tokens:
        if kind == "token":
            raise _refused(parameter, "names tokens by number, which differ from model to model")
        if kind == "range":
            _check_range(text, parameter)
        elif kind == "times":
            _check_times(text, parameter)
        depth += (kind == "open") - (kind == "close")
        if depth > nesting:
            raise TooLarge(f"parameter {parameter} is nested deeper than {nesting}")
    places, repeats = _measured(_rules(tokens))
    if places > MAX_PLACES:
        raise TooLarge(f"parameter {parameter} is ambiguous: a text may be at over {MAX_PLACES} places in it at once")
    _check_repeats(repeats, parameter)


def _read(grammar: str) -> Iterator[tuple[str, str]]:
    """The grammar's tokens, kind and text; what is none is left to llama.cpp to refuse."""
    for found in _TOKENS.finditer(grammar):
        if found.lastgroup is not None:
            yield found.lastgroup, found[found.lastgroup]


def _check_range(characters: str, parameter: str) -> None:
    """llama.cpp ends the process over a range that runs backwards."""
    for low, high in _RANGE.findall(characters):
        if len(low) == len(high) == 1 and low > high:
            raise _refused(parameter, f"has the range {low}-{high}, which runs backwards")


def _check_times(text: str, parameter: str) -> None:
    count = _COUNT.fullmatch(text)
    if count is None:
        return
    low, comma, high = count.groups()
    if max(int(low or 0), int(high or 0)) > MAX_REPETITION:
        raise TooLarge(f"parameter {parameter} repeats more than {MAX_REPETITION} times")
    if comma and high and int(low or 0) > int(high):
        raise _refused(parameter, f"repeats at least {low} and at most {high} times")


class _Element(NamedTuple):
    """What stands in an alternative: a rule, or, without a name, characters; how often it comes."""

    rule: str | None
    optional: bool = False
    times: int = 1


#: The alternatives of each rule; groups are rules without a name of their own.
_Rules = dict[str, list[list[_Element]]]


def _rules(tokens: Iterable[tuple[str, str]]) -> _Rules:
    rules: _Rules = {"": [[]]}
    #: The rule that is being read, and the groups around it.
    within = [""]
    for kind, text in tokens:
        current = rules[within[-1]][-1]
        if kind == "rule":
            within = [text]
            rules.setdefault(text, []).append([])
        elif kind == "or":
            rules[within[-1]].append([])
        elif kind == "open":
            group = f"({len(rules)}"
            current.append(_Element(group))
            rules[group] = [[]]
            within.append(group)
        elif kind == "close" and len(within) > 1:
            within.pop()
        elif kind == "times" and current:
            count = _COUNT.fullmatch(text)
            least = int(count[1] or 0) if count else int(text == "+")
            most = int(count[3] or count[1] or 1) if count else 1
            current[-1] = current[-1]._replace(optional=least == 0, times=max(most, 1))
        elif kind in ("name", "text", "range", "any"):
            current.append(_Element(text if kind == "name" else None))
    return rules


class _Measure(NamedTuple):
    """Of a rule: at how many places a text may be where it begins, before any character is read; how often a thing in
    it may come, repetitions within repetitions multiplied; and whether all of it may be left out."""

    places: int = 0
    repeats: int = 1
    empty: bool = False


def _measured(rules: _Rules) -> tuple[int, int]:
    """The most places and the most repetitions of any rule. Rules that begin with themselves, which llama.cpp refuses,
    count as nothing there."""
    known: dict[str, _Measure] = {}
    opened: set[str] = set()
    for name in rules:
        waiting = [name]
        while waiting:
            rule = waiting[-1]
            below = [element.rule for alternative in rules.get(rule, ()) for element in alternative if element.rule]
            if rule not in opened:
                opened.add(rule)
                waiting += [one for one in below if one not in opened]
            else:
                waiting.pop()
                if rule not in known:
                    known[rule] = _measure(rules.get(rule, []), known)
    return max(one.places for one in known.values()), max(one.repeats for one in known.values())


def _measure(alternatives: list[list[_Element]], known: Mapping[str, _Measure]) -> _Measure:
    places, repeats, empty = 0, 1, False
    for alternative in alternatives:
        begins = True  # what may be left out adds the places after it
        for element in alternative:
            below = _Measure(places=1) if element.rule is None else known.get(element.rule, _Measure())
            repeats = max(repeats, min(below.repeats * element.times, MAX_PRODUCT + 1))
            if begins:
                places = min(places + below.places * (element.times if below.empty else 1), MAX_PLACES + 1)
                begins = below.empty or element.optional
        empty = empty or begins
    return _Measure(places, repeats, empty)
