"""Fixtures: a service per module, and a folder with the test nodes' package."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from support import ServiceProcess, node_package

settings.register_profile("quick", deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
settings.register_profile("soak", deadline=None, max_examples=5000, suppress_health_check=list(HealthCheck))
settings.load_profile("soak" if os.environ.get("DEMANDPORT_SOAK") else "quick")


@pytest.fixture(scope="session")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the package that declares the test nodes."""
    return node_package(tmp_path_factory.mktemp("nodes"))


@pytest.fixture
def service(nodes: Path) -> Iterator[ServiceProcess]:
    """A fresh service with the test nodes."""
    with ServiceProcess(nodes=nodes) as process:
        yield process


@pytest.fixture(scope="module")
def shared(nodes: Path) -> Iterator[ServiceProcess]:
    """One service for all tests of a module; each uses sessions of its own."""
    with ServiceProcess(nodes=nodes) as process:
        yield process
