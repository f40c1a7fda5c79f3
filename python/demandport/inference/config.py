"""Which models there are and how each is run: a TOML file, environment variables, and what a request may say itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from demandport.errors import TypeMismatch
from demandport.inference.requests import to_options
from demandport.settings import Tables, known_options, placed, require, whole, wrong

#: The model that comes with the package.
TINY = "tiny"
OLLAMA_URL = "http://127.0.0.1:11434"
_LLAMA = {"context_length", "gpu_layers", "threads", "replicas", "balance"}
_SERVER = {"url", "timeout_ms"}
#: What can be said of a model, by backend, besides `model` and `backend`.
BACKENDS: Mapping[str, set[str]] = {
    "llama.cpp": _LLAMA,
    "llama-server": _LLAMA | {"mmproj", "binary", "arguments"},
    "openai": _SERVER | {"api_key_env"},
    "ollama": _SERVER | {"keep_alive"},
}
#: Backends whose model is a file here.
FILES = ("llama.cpp", "llama-server")
BALANCES = ("least_loaded", "round_robin")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model and how it is run.

    Attributes:
        model: for llama.cpp and llama-server ``tiny``, the path of a GGUF file, or an id of the model library; for the
            others what the server calls it.
        backend: ``llama.cpp`` (embedded), ``llama-server``, ``openai`` (any server of that API), ``ollama``.
        context_length: tokens of context; None: what the model was trained with, at most 4096.
        gpu_layers: layers to put on a GPU; 0: none, -1: all.
        threads: threads that compute; None: one per core, and one alone where that is faster (a model too small to
            share out; other programs take the cores).
        replicas: how many workers run it at once. balance: how one is chosen, ``least_loaded`` or ``round_robin``.
        mmproj: the file of a vision model's projector. binary: the llama-server program. arguments: more for it.
        url: where the server is; for openai up to and including ``/v1``.
        api_key_env: the environment variable that holds the key.
        keep_alive: how long Ollama keeps the model, as it writes that: ``5m``, ``-1``.
        timeout_ms: how long a server may be silent.
    """

    model: str
    backend: str = "llama.cpp"
    context_length: int | None = None
    gpu_layers: int = 0
    threads: int | None = None
    replicas: int = 1
    balance: str = "least_loaded"
    mmproj: str | None = None
    binary: str = "llama-server"
    arguments: tuple[str, ...] = ()
    url: str | None = None
    api_key_env: str | None = None
    keep_alive: str | None = None
    timeout_ms: int = 60_000

    def __post_init__(self) -> None:
        for name in ("model", "backend", "balance", "binary", "mmproj", "url", "api_key_env", "keep_alive"):
            value = getattr(self, name)
            if value is not None:
                require(name, value, str, "a string")
                if not value or "\0" in value:
                    raise wrong(name, "must not be empty")
        if self.backend not in BACKENDS:
            raise wrong("backend", f"must be one of {', '.join(BACKENDS)}, not {self.backend!r}")
        whole(self, "context_length", 8, 2**22, optional=True)
        whole(self, "gpu_layers", -1, 10_000)
        whole(self, "threads", 1, 512, optional=True)
        whole(self, "replicas", 1, 64)
        whole(self, "timeout_ms", 1, 2**31)
        if self.balance not in BALANCES:
            raise wrong("balance", f"must be {' or '.join(BALANCES)}")
        require("arguments", self.arguments, tuple, "a list of strings")
        for argument in self.arguments:
            require("arguments", argument, str, "a list of strings")
        for one in fields(self):
            if one.name not in {"model", "backend"} | BACKENDS[self.backend] and getattr(self, one.name) != one.default:
                raise wrong(one.name, f"says nothing to the backend {self.backend}")
        if self.backend == "openai" and self.url is None:
            raise wrong("url", "must say where the server is, as in http://127.0.0.1:8000/v1")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise wrong("url", "must begin with http:// or https://")

    @property
    def settings(self) -> dict[str, Any]:
        """How it is run: what differs from the defaults, without the model itself."""
        return {name: value for name, value in to_options(self).items() if name != "model"}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> ModelSpec:
        """The spec that a map describes; nil stands for the default.

        Raises:
            TypeMismatch: a field is unknown, missing, or of the wrong type or range; the message names it.
        """
        given = known_options(cls, options)
        if "model" not in given:
            raise wrong("model", "must be given")
        if isinstance(given.get("arguments"), list):
            given["arguments"] = tuple(given["arguments"])
        return cls(**given)


@dataclass(frozen=True, slots=True)
class Config:
    """The models of a service.

    Attributes:
        default_model: what a request without a model gets.
        model_directories: where the model library looks.
        memory_limit_bytes: what model workers may hold together; None: four fifths of the machine's memory.
        cache_directory: where saved KV caches are; None: nothing can be saved.
        ollama_url: where Ollama is, for models that no entry describes.
        models: entries by name; a request that names one gets it.
    """

    default_model: str = TINY
    model_directories: tuple[Path, ...] = ()
    memory_limit_bytes: int | None = None
    cache_directory: Path | None = None
    ollama_url: str = OLLAMA_URL
    models: Mapping[str, ModelSpec] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        require("default_model", self.default_model, str, "a string")
        whole(self, "memory_limit_bytes", 1 << 20, 1 << 60, optional=True)
        if not str(self.ollama_url).startswith(("http://", "https://")):
            raise wrong("ollama_url", "must begin with http:// or https://")


#: Environment variables and what they say; each stands above the file.
_ENVIRONMENT = {
    "DEMANDPORT_DEFAULT_MODEL": "default_model",
    "DEMANDPORT_MODEL_DIRECTORIES": "model_directories",
    "DEMANDPORT_MEMORY_LIMIT_BYTES": "memory_limit_bytes",
    "DEMANDPORT_CACHE_DIRECTORY": "cache_directory",
    "DEMANDPORT_OLLAMA_URL": "ollama_url",
}


def load_config(tables: Tables | None = None, environment: Mapping[str, str] = os.environ) -> Config:
    """The configuration of models: what the environment says, else the file, else the defaults.

    The file has a table ``[inference]`` with the fields of `Config`, and a table ``[models.NAME]`` per entry with the
    fields of `ModelSpec`. Relative paths in it are relative to it.

    Raises:
        TypeMismatch: a key is unknown or has a wrong value; the message names the file or the variable, and the key.
    """
    tables = tables or Tables()
    base = tables.base
    options = _inference(tables.take("inference"), base, tables.place("inference"))
    models = tables.take("models")
    if not isinstance(models, dict):
        raise TypeMismatch(f"{tables.place('models')} must be tables, such as [models.assistant]")
    options["models"] = {name: _model(entry, base, tables.place(f"models.{name}")) for name, entry in models.items()}
    for variable, name in _ENVIRONMENT.items():
        if variable in environment:
            options |= _inference({name: _from_text(name, environment[variable], variable)}, Path(), variable)
    return Config(**options)


def _from_text(name: str, text: str, variable: str) -> Any:
    if name == "model_directories":
        return [part for part in text.split(os.pathsep) if part]
    if name == "memory_limit_bytes":
        if not text.isdecimal():
            raise TypeMismatch(f"{variable} must be a number of bytes, not {text!r}")
        return int(text)
    return text


def _inference(table: Any, base: Path, place: str) -> dict[str, Any]:
    """The options of one source, checked by making a `Config` of them alone."""
    if not isinstance(table, dict):
        raise TypeMismatch(f"{place} must be a table")
    with placed(place):
        options = known_options(Config, table)
        if "models" in options:
            raise wrong("models", "is a table of its own: [models.NAME]")
        if "model_directories" in options:
            require("model_directories", options["model_directories"], list, "a list of paths")
            for path in options["model_directories"]:
                require("model_directories", path, str, "a list of paths")
            options["model_directories"] = tuple(
                base / Path(path).expanduser() for path in options["model_directories"]
            )
        if "cache_directory" in options:
            require("cache_directory", options["cache_directory"], str, "a path")
            options["cache_directory"] = base / Path(options["cache_directory"]).expanduser()
        Config(**options)
    return options


def _model(entry: Any, base: Path, place: str) -> ModelSpec:
    if not isinstance(entry, dict):
        raise TypeMismatch(f"{place} must be a table")
    with placed(place):
        spec = ModelSpec.from_options(entry)
    beside = base / spec.model
    if spec.backend in FILES and beside.is_file():
        spec = replace(spec, model=str(beside))
    return spec if spec.mmproj is None else replace(spec, mmproj=str(base / Path(spec.mmproj).expanduser()))
