"""Write `python/requirements*.txt`: what `mix demand_port.install` installs, each package in the version that is here.

Run it with the interpreter of an environment in which all tests have passed. `requirements.txt` is what the service
needs; each `requirements-EXTRA.txt` what the extra needs beyond that.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent


def declared() -> dict[str, list[str]]:
    """Extra → what it asks for, as `pyproject.toml` has it; the service itself is the extra ""."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return {"": project["dependencies"], "llama": extras["llama"], "test": extras["test"]}


def file_of(extra: str) -> Path:
    return ROOT / "python" / (f"requirements-{extra}.txt" if extra else "requirements.txt")


def closure(wanted: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(name, version) of the installed packages that `wanted` ask for, and of what those ask for."""
    seen: set[str] = set()
    waiting = [Requirement(text) for text in wanted]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in seen:
            continue
        seen.add(name)
        found = distribution(name)
        yield name, found.version
        further = (Requirement(text) for text in found.requires or ())
        extras = ["", *requirement.extras]
        waiting += [r for r in further if not r.marker or any(r.marker.evaluate({"extra": e}) for e in extras)]


def main() -> None:
    base = dict(closure(declared()[""]))
    for extra, wanted in declared().items():
        pins = dict(closure(wanted)).items() - (base.items() if extra else ())
        lines = [f"{name}=={version}\n" for name, version in sorted(pins)]
        file_of(extra).write_text("# Written by tools/pins.py.\n" + "".join(lines))


if __name__ == "__main__":
    main()
