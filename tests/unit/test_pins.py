"""What `mix demand_port.install` installs is what the package asks for."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("pins", ROOT / "tools" / "pins.py")
assert _spec and _spec.loader
pins = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(pins)


def pinned(extra: str) -> dict[str, str]:
    lines = pins.file_of(extra).read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


@pytest.mark.parametrize("extra", pins.declared())
def test_every_dependency_has_a_pin_that_it_allows(extra: str) -> None:
    there = pinned("") | pinned(extra)
    for text in pins.declared()[extra]:
        requirement = Requirement(text)
        version = there.get(canonicalize_name(requirement.name))
        assert version, f"{text}: run tools/pins.py"
        assert requirement.specifier.contains(version), f"{text} is pinned to {version}: run tools/pins.py"


def test_an_extra_pins_nothing_that_the_service_has() -> None:
    for extra in ("llama", "test"):
        assert not pinned("").keys() & pinned(extra).keys()
