"""What a user configures: one TOML file, read once and handed out by table, and checks whose errors name the key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from demandport.errors import DemandportError, TypeMismatch


class Tables:
    """The tables of a configuration file. Whom one concerns takes it; `require_known` refuses what nobody took.

    Args:
        tables: by name. file: where they stand; None: nowhere.
    """

    def __init__(self, tables: Mapping[str, Any] | None = None, file: Path | None = None) -> None:
        self._tables, self._file = dict(tables or {}), file
        self._taken: list[str] = []

    @classmethod
    def read(cls, file: Path | None) -> Tables:
        """The tables of `file`; none without a file. Reads it; blocks.

        Raises:
            TypeMismatch: it cannot be read; the message names it.
        """
        if file is None:
            return cls()
        import tomllib  # only now: a service without a file starts sooner

        try:
            return cls(tomllib.loads(file.read_text(encoding="utf-8")), file)
        except (OSError, ValueError) as failed:
            raise TypeMismatch(f"{file}: {failed}") from None

    def take(self, name: str) -> Any:
        """What stands under `name`, which ought to be a table; an empty one where nothing does."""
        self._taken.append(name)
        return self._tables.get(name, {})

    def place(self, name: str) -> str:
        """How messages call the table of that name."""
        return f"{self._file}: {name}"

    @property
    def base(self) -> Path:
        """The directory that relative paths start from: the file's."""
        return Path() if self._file is None else self._file.parent

    def require_known(self) -> None:
        """Refuse a table that nobody has taken.

        Raises:
            TypeMismatch: there is one; the message names it, and those there are.
        """
        for name in self._tables:
            if name not in self._taken:
                *others, last = self._taken
                raise TypeMismatch(
                    f"{self._file}: there is no table {name}; there are {', '.join(others)} and {last}"
                    if others
                    else f"{self._file}: there is no table {name}; there is {last}"
                )


@contextmanager
def placed(place: str) -> Iterator[None]:
    """Put the place before the message of what is raised in the block."""
    try:
        yield
    except DemandportError as refused:
        raise TypeMismatch(f"{place}: {refused.message}", details=refused.details) from None


# ---------------------------------------------------------------------------------------------------------- checks


def wrong(parameter: str, what: str) -> TypeMismatch:
    """The error for a parameter: its name, then what is wrong with it."""
    return TypeMismatch(f"parameter {parameter} {what}", details={"parameter": parameter})


def known_options(cls: type[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are not nil; refuses names that are no field of the dataclass `cls`."""
    known = {field.name for field in fields(cls) if field.init}
    for name in options:
        if name not in known:
            raise wrong(str(name), f"is not known; known are {', '.join(sorted(known))}")
    return {name: value for name, value in options.items() if value is not None}


def require(name: str, value: Any, kind: type | tuple[type, ...], word: str) -> None:
    """Refuse a value of another type; booleans are no integers."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise wrong(name, f"must be {word}, not {type(value).__name__}")


def whole(owner: Any, name: str, low: int, high: int, *, optional: bool = False) -> None:
    """Refuse a field that is no integer from `low` to `high`."""
    value = getattr(owner, name)
    if value is None and optional:
        return
    require(name, value, int, "an integer")
    if not low <= value <= high:
        raise wrong(name, f"must be {low} to {high}, not {value}")


def strings(options: Mapping[str, Any], name: str, word: str = "a list of strings") -> tuple[str, ...]:
    """The list of strings that stands under `name`, as a tuple, which cannot be changed; empty where nothing does."""
    values = options.get(name, [])
    require(name, values, (list, tuple), word)
    for value in values:
        require(name, value, str, word)
    return tuple(values)
