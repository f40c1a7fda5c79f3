"""Models by name, and the settings that come with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from demandport.engine.node import Context, node
from demandport.errors import DemandportError, MissingInput, TypeMismatch
from demandport.graph.spec import Port, converter
from demandport.inference.library import Library, LibraryEntry

#: The settings that have ports: what llamacpp-inference takes.
SETTINGS: Mapping[str, str] = {
    "context_length": "integer",
    "gpu_layers": "integer",
    "threads": "integer",
    "max_tokens": "integer",
    "temperature": "number",
    "top_p": "number",
    "top_k": "integer",
    "min_p": "number",
    "repeat_penalty": "number",
    "repeat_last_n": "integer",
    "frequency_penalty": "number",
    "presence_penalty": "number",
    "seed": "integer",
    "stop": "any",
}
Json = Annotated[Any, Port(type="json")]
Setting = Annotated[Any, Port(type="any")]
_OPTIONS = ("allowed_values", "options")


@node(
    "model-provider",
    runs="thread",
    category="inference",
    outputs={"model_name": "string", "model_info": "json", "model_path": "string"},
)
def model_provider(ctx: Context, model_name: str = "", search_query: str = "") -> dict[str, Any]:
    """Finds a model in the model library by its name, else the only one that the search query fits.

    `model_name` comes out as the model's id, `model_info` as all that is known of it without loading it.
    """
    entry = _found(ctx, "model_name", model_name, "search_query", search_query)
    return {"model_name": entry.id, "model_info": entry.describe(), "model_path": str(entry.path)}


_PUMA_LIB_OUTPUTS = {
    "model_path": "string",
    "model_ref": "model_handle",
    "inference_settings": "json",
    "metadata": "json",
    "model_id": "string",
}


@node("puma-lib", runs="thread", category="inference", outputs=_PUMA_LIB_OUTPUTS)
def puma_lib(ctx: Context, model_id: str = "", query: str = "") -> dict[str, Any]:
    """Resolves a model of the configured directories to the file to load, by its id, else by the only fit of a query.

    A model is a GGUF file, a directory with one model in it, or a folder of a Pumas library. `model_ref` stands for the
    file, however it is loaded. `inference_settings` is what Pumas knows of its parameters, an empty list for nothing.
    """
    entry = _found(ctx, "model_id", model_id, "query", query)
    path = str(entry.path)
    return {
        "model_path": path,
        "model_ref": {"id": path, "model": path, "backend": "llama.cpp"},
        "inference_settings": entry.inference_settings,
        "metadata": entry.describe(),
        "model_id": entry.id,
    }


def _found(ctx: Context, name_port: str, name: str, query_port: str, query: str) -> LibraryEntry:
    library: Library = ctx.resources["library"]
    if name:
        return library.resolve(name)
    if query:
        return library.find(query)
    raise MissingInput(f"{ctx.node_type} needs a model: give {name_port} or {query_port}")


@node("expand-settings", runs="inline", category="inference", outputs={"inference_settings": "json", **SETTINGS})
def expand_settings(
    inference_settings: Json,
    context_length: Setting = None,
    gpu_layers: Setting = None,
    threads: Setting = None,
    max_tokens: Setting = None,
    temperature: Setting = None,
    top_p: Setting = None,
    top_k: Setting = None,
    min_p: Setting = None,
    repeat_penalty: Setting = None,
    repeat_last_n: Setting = None,
    frequency_penalty: Setting = None,
    presence_penalty: Setting = None,
    seed: Setting = None,
    stop: Setting = None,
) -> dict[str, Any]:
    """Gives each setting of a model a port: what the port of that name is given, else the setting's value, or default.

    Labels become the values they stand for. A setting that the model does not have is nil, which stands for "no value".
    `inference_settings` comes out in the form it came in, with the values that hold; settings without a port are there.
    """
    given = {name: value for name, value in locals().items() if name in SETTINGS and value is not None}
    values = setting_values(inference_settings, given)
    ports = {name: _fitting(name, values.get(name)) for name in SETTINGS}
    values |= {name: value for name, value in ports.items() if value is not None}
    return {"inference_settings": _with_values(inference_settings, values), **ports}


def setting_values(settings: Any, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The values of a model's settings by key; those without one are left out.

    Args:
        settings: a list of descriptors, as Pumas writes them: ``{key, default, constraints: {min, max,
            allowed_values}}``, with a ``value`` or ``override`` where one was chosen; a map from key to value or
            descriptor; or None. An allowed value may have a label: ``{label, value}``, or a map from label to value.
        given: values or labels that come before those of the settings.

    Raises:
        TypeMismatch: the settings have another form, or a value is none of those allowed.
    """
    found = {key: _value(key, about, (given or {}).get(key)) for key, about in _descriptors(settings).items()}
    return {key: value for key, value in (dict(given or {}) | found).items() if value is not None}


def _descriptors(settings: Any) -> dict[str, Mapping[str, Any]]:
    if settings is None:
        return {}
    if isinstance(settings, dict):
        return {key: about if _is_descriptor(about) else {"value": about} for key, about in settings.items()}
    if not isinstance(settings, list):
        raise TypeMismatch(f"inference_settings must be a list or a map, not {type(settings).__name__}")
    found: dict[str, Mapping[str, Any]] = {}
    for position, about in enumerate(settings):
        key = about.get("key") if isinstance(about, dict) else None
        if not isinstance(key, str) or key in found:
            raise TypeMismatch(f"inference_settings[{position}] must be a map with a key of its own")
        found[key] = about
    return found


def _is_descriptor(about: Any) -> bool:
    return isinstance(about, dict) and bool(about.keys() & {"default", "value", "override"})


def _value(key: str, about: Mapping[str, Any], given: Any) -> Any:
    chosen = (given, about.get("override"), about.get("value"), about.get("default"))
    value = next((one for one in chosen if one is not None), None)
    if isinstance(value, dict) and "label" in value:
        value = value.get("value", value["label"])
    constraints = about.get("constraints")
    limits = constraints if isinstance(constraints, dict) else about
    options = _options(limits)
    if value is None or not options:
        _check_bounds(key, value, limits)
        return value
    if any(_same(value, allowed) for _, allowed in options):
        return value
    for label, allowed in options:
        if label == value:
            return allowed
    labels = ", ".join(str(allowed if label is None else label) for label, allowed in options)
    raise TypeMismatch(f"setting {key} must be one of {labels:.500}, not {value!r:.60}")


def _options(limits: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """Labels, None where there is none, and the values they stand for."""
    allowed: Any = next((limits[name] for name in _OPTIONS if limits.get(name)), None)
    if isinstance(allowed, dict):
        return list(allowed.items())
    if not isinstance(allowed, list):
        return []
    return [(_label(one), one["value"]) if isinstance(one, dict) and "value" in one else (None, one) for one in allowed]


def _label(option: Mapping[str, Any]) -> Any:
    return next((option[name] for name in ("label", "name", "key") if name in option), None)


def _same(one: Any, other: Any) -> bool:
    """Equal, and true is not 1."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _check_bounds(key: str, value: Any, limits: Mapping[str, Any]) -> None:
    if not _is_number(value):
        return
    low, high = limits.get("min"), limits.get("max")
    if _is_number(low) and value < low:
        raise TypeMismatch(f"setting {key} must be at least {low}, not {value}")
    if _is_number(high) and value > high:
        raise TypeMismatch(f"setting {key} must be at most {high}, not {value}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _fitting(name: str, value: Any) -> Any:
    """A setting's value as its port wants it."""
    convert = converter(SETTINGS[name])
    try:
        return value if convert is None else convert(value)
    except DemandportError as refused:
        raise TypeMismatch(f"setting {name} {refused.message}") from None


def _with_values(settings: Any, values: Mapping[str, Any]) -> Any:
    """The settings in the form they came in, with the values that hold."""
    if not isinstance(settings, list):
        return dict(values)
    known = [about | {"value": values[about["key"]]} if about["key"] in values else about for about in settings]
    keys = {about["key"] for about in settings}
    return [*known, *({"key": key, "value": value} for key, value in values.items() if key not in keys)]
