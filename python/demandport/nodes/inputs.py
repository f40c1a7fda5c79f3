"""Inputs and outputs: values that the host gives, and values as it wants to see them."""

from __future__ import annotations

import math
from typing import Annotated, Any

from demandport.engine.node import Context, node
from demandport.errors import MissingInput, TypeMismatch
from demandport.graph.spec import Port, as_text, read_json
from demandport.nodes.media import read_media


@node("text-input", runs="inline", category="input", outputs={"text": "string"})
def text_input(text: str = "") -> str:
    """A text."""
    return text


@node("number-input", runs="inline", category="input", outputs={"value": "number"})
def number_input(value: Annotated[Any, Port(type="any")] = 0) -> int | float:
    """A number; numeric text is read as one, and integers stay integers."""
    if isinstance(value, bool):
        raise TypeMismatch("number-input takes a number, not true or false")
    if isinstance(value, int):
        return value
    try:
        number = _number_of(value)
    except (TypeError, ValueError):
        raise TypeMismatch(f"number-input takes a number, not {value!r:.60}") from None
    if not math.isfinite(number):
        raise TypeMismatch("number-input takes a finite number")
    return number


def _number_of(value: Any) -> int | float:
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            return float(value)
    if not isinstance(value, int | float):
        raise TypeError
    return float(value)


@node("boolean-input", runs="inline", category="input", outputs={"value": "boolean"})
def boolean_input(value: Annotated[Any, Port(type="any")] = False) -> bool:
    """True or false; the texts "true" and "false" are read as such."""
    if isinstance(value, bool):
        return value
    if value in ("true", "false"):
        return bool(value == "true")
    raise TypeMismatch(f"boolean-input takes true or false, not {value!r:.60}")


@node("selection-input", runs="inline", category="input", outputs={"value": "any"})
def selection_input(value: Any = None, options: list[Any] = []) -> Any:  # noqa: B006 - read only
    """One of `data.options`, each a value or a map with `value`; the first when none is chosen."""
    if not isinstance(options, list):
        raise TypeMismatch(f"selection-input takes a list of options, not {options!r:.60}")
    values = [option.get("value") if isinstance(option, dict) else option for option in options]
    if value is None and values:
        return values[0]
    if value not in values:
        raise TypeMismatch(f"selection-input takes one of {values!r:.200}, not {value!r:.60}")
    return value


@node("vector-input", runs="inline", category="input", outputs={"vector": "vector"})
def vector_input(vector: Annotated[Any, Port(type="any")] = []) -> list[float]:  # noqa: B006 - read only
    """A list of finite numbers, or JSON text of one."""
    if isinstance(vector, str):
        try:
            vector = read_json(vector)
        except ValueError as failed:
            raise TypeMismatch(f"vector-input takes a list of numbers, and the text does not parse: {failed}") from None
    if not isinstance(vector, list) or not all(_is_finite(item) for item in vector):
        raise TypeMismatch("vector-input takes a list of finite numbers")
    return vector


def _is_finite(item: Any) -> bool:
    try:
        return isinstance(item, int | float) and not isinstance(item, bool) and math.isfinite(item)
    except OverflowError:  # an integer too large for a float
        return False


@node("masked-text-input", runs="inline", category="input", outputs={"masked_prompt": "json"})
def masked_text_input(segments: list[Any] = [], text: str = "") -> dict[str, Any]:  # noqa: B006 - read only
    """Text in segments, `{text, masked}` each."""
    found = segments or ([{"text": text, "masked": False}] if text else [])
    if not isinstance(found, list):
        raise TypeMismatch(f"masked-text-input takes a list of segments, not {found!r:.60}")
    for segment in found:
        if not isinstance(segment, dict) or not isinstance(segment.get("text"), str):
            raise TypeMismatch("masked-text-input takes segments of {text, masked}")
    kept = [{"text": segment["text"], "masked": bool(segment.get("masked"))} for segment in found]
    return {"segments": kept, "text": "".join(segment["text"] for segment in kept)}


@node("image-input", runs="inline", category="input", outputs={"image": "image", "bounds": "json"})
def image_input(image_base64: str, bounds: dict[str, Any] | None = None) -> dict[str, Any]:
    """An image as base64 or data URL; its media type is read from its first bytes."""
    found = read_media(image_base64, "image")
    return {"image": found, "bounds": bounds}


@node("audio-input", runs="inline", category="input", outputs={"audio": "audio"})
def audio_input(audio_data: str) -> dict[str, Any]:
    """Audio as base64 or data URL; its media type is read from its first bytes."""
    return read_media(audio_data, "audio")


@node("linked-input", runs="inline", category="input", outputs={"value": "any"})
def linked_input(value: Any = None, linked_value: Any = None) -> Any:
    """A value linked from another element."""
    return linked_value if value is None else value


@node("human-input", category="input", outputs={"value": "any"})
async def human_input(
    ctx: Context, prompt: str = "", default: Any = None, auto_accept: bool = False, user_response: Any = None
) -> Any:
    """Waits for a person: sends `waiting_for_input`, and goes on when `user_response` is set."""
    if user_response is not None:
        return user_response
    if auto_accept:
        if default is None:
            raise MissingInput("auto_accept needs a default")
        return default
    ctx.event("waiting_for_input", prompt=prompt, default=default)
    return await ctx.wait_input("user_response")


@node("text-output", runs="inline", category="output", outputs={"text": "string"})
def text_output(text: Any = None, stream: Any = None) -> str:
    """Shows any value as text; maps and lists as JSON."""
    shown = stream if text is None else text
    return "" if shown is None else as_text(shown)


@node("vector-output", runs="inline", category="output", outputs={"vector": "vector"})
def vector_output(vector: Annotated[Any, Port(type="vector")]) -> Any:
    """Shows a vector."""
    return vector


@node("image-output", runs="inline", category="output", outputs={"image": "image"})
def image_output(image: Annotated[Any, Port(type="image")]) -> Any:
    """Shows an image."""
    return image


@node("audio-output", runs="inline", category="output", outputs={"audio": "audio"})
def audio_output(audio: Annotated[Any, Port(type="audio")]) -> Any:
    """Shows audio."""
    return audio


@node("component-preview", runs="inline", category="output", outputs={"rendered": "component"})
def component_preview(
    component: Annotated[Any, Port(type="any")], props: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A component with its properties, for the host to render."""
    return {"component": component, "props": props or {}}
