"""Logic and data: branches, merging, selecting, checking, templates."""

from __future__ import annotations

import ast
import re
from typing import Annotated, Any

from demandport.engine.node import node
from demandport.errors import MissingInput, TypeMismatch
from demandport.graph.spec import Port, as_text, read_json
from demandport.nodes.schemas import checker

MAX_CHECKED_BYTES = 4 * 1024 * 1024


@node("conditional", runs="inline", category="logic", outputs={"true_out": "any", "false_out": "any"}, branches=True)
def conditional(condition: bool, value: Any) -> dict[str, Any]:
    """Passes the value to the side that the condition names; the other side does not exist."""
    return {"true_out" if condition else "false_out": value}


@node("merge", runs="inline", category="logic", outputs={"merged": "any", "count": "integer"})
def merge(
    inputs: Annotated[list[Any], Port(type="any", multiple=True)] = [],  # noqa: B006 - read only
    separator: str = "\n",
    mode: str = "",
) -> dict[str, Any]:
    """Joins all its inputs in edge order: lists are concatenated, other values joined as text.

    `mode` forces the form: text, list or object (maps merged, later ones win).
    """
    values = inputs if isinstance(inputs, list) else [inputs]
    chosen = mode or ("list" if values and all(isinstance(value, list) for value in values) else "text")
    if chosen == "text":
        merged: Any = separator.join(as_text(value) for value in values)
    elif chosen == "list":
        merged = [item for value in values for item in (value if isinstance(value, list) else [value])]
    elif chosen == "object":
        if not all(isinstance(value, dict) for value in values):
            raise TypeMismatch("merge in mode object takes maps only")
        merged = {key: item for value in values for key, item in value.items()}
    else:
        raise TypeMismatch(f"merge has the modes text, list and object, not {mode!r:.40}")
    return {"merged": merged, "count": len(values)}


@node("json-filter", runs="inline", category="data", outputs={"value": "any", "found": "boolean"})
def json_filter(json: Annotated[Any, Port(type="json")], path: str = "") -> dict[str, Any]:
    """Selects by a path such as `a.b[0]`, or any JMESPath expression; a miss is nil and not found."""
    import jmespath
    from jmespath.exceptions import JMESPathError

    if not path:
        return {"value": json, "found": True}
    try:
        value = jmespath.search(path.removeprefix("$."), json)
    except JMESPathError as wrong:
        raise TypeMismatch(f"path {path!r:.60} is no JMESPath: {wrong}") from None
    return {"value": value, "found": value is not None}


@node("validator", category="logic", outputs={"valid": "boolean", "errors": "json", "value": "any"})
def validator(value: Any, schema: Annotated[Any, Port(type="json")] = None, kind: str = "") -> dict[str, Any]:
    """Checks a value against a JSON Schema, or as one of the kinds json, python and svelte-5."""
    if schema is not None:
        errors = _against_schema(value, schema)
    elif kind in _KINDS:
        text = as_text(value)
        errors = (
            [f"longer than {MAX_CHECKED_BYTES} characters"] if len(text) > MAX_CHECKED_BYTES else _KINDS[kind](text)
        )
    else:
        raise TypeMismatch(f"validator wants data.schema, or data.kind as one of {', '.join(_KINDS)}")
    return {"valid": not errors, "errors": errors, "value": value}


def _against_schema(value: Any, schema: Any) -> list[str]:
    from jsonschema_rs import ValidationError

    try:
        check = checker(schema)
    except ValidationError as wrong:
        raise TypeMismatch(f"data.schema is no JSON Schema: {wrong.message}") from None
    except ValueError as wrong:
        raise TypeMismatch(f"data.schema is no JSON Schema: {wrong}") from None
    try:
        found = sorted((".".join(map(str, error.instance_path)), error.message) for error in check.iter_errors(value))
    except ValueError as wrong:
        raise TypeMismatch(f"validator takes JSON values: {wrong}") from None
    return [f"{path or 'value'}: {message}" for path, message in found[:100]]


def _as_json(text: str) -> list[str]:
    try:
        read_json(text)
    except ValueError as wrong:
        return [str(wrong)]
    return []


def _as_python(text: str) -> list[str]:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as wrong:
        return [str(wrong)]
    return []


_TAGS = re.compile(r"<(/?)(script|style)\b[^>]*>", re.IGNORECASE)
#: What Svelte 5 replaced, and with what.
_LEGACY = (
    (re.compile(r"^\s*export\s+let\s", re.MULTILINE), "`export let`: use $props()"),
    (re.compile(r"^\s*\$:\s", re.MULTILINE), "`$:`: use $derived or $effect"),
    (re.compile(r"\son:[a-z]+[=|\s>]"), "`on:event`: use an event attribute such as onclick"),
    (re.compile(r"<slot\b"), "`<slot>`: use {@render}"),
    (re.compile(r"\bcreateEventDispatcher\b"), "`createEventDispatcher`: use callback props"),
)


def _as_svelte(text: str) -> list[str]:
    errors, open_tag = [], ""
    for match in _TAGS.finditer(text):
        closing, name = bool(match[1]), match[2].lower()
        if closing and open_tag != name:
            errors.append(f"</{name}> closes nothing")
        elif not closing and open_tag:
            errors.append(f"<{name}> inside <{open_tag}>")
        open_tag = "" if closing else name
    if open_tag:
        errors.append(f"<{open_tag}> is not closed")
    return errors + [message for pattern, message in _LEGACY if pattern.search(text)]


_KINDS = {"json": _as_json, "python": _as_python, "svelte-5": _as_svelte}
_NAME = re.compile(r"\{\{\s*([^{}]*?)\s*\}\}")


@node("template", runs="inline", category="data", outputs={"text": "string"})
def template(template: str, **variables: Any) -> str:
    """Fills each `{{name}}` with the value of the port of that name; nothing in it is run."""

    def value_of(match: re.Match[str]) -> str:
        name = match[1]
        if name not in variables:
            raise MissingInput(
                f"the template names {name!r}, which has no value; there are {', '.join(variables) or 'none'}"
            )
        return as_text(variables[name])

    return _NAME.sub(value_of, template)
