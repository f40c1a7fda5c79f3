"""All node types that this process can run: the built-in ones, and those of installed packages.

A package registers its nodes by an entry point of the group ``demandport.nodes`` that names a module; importing the
module declares them.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import EntryPoint, distributions

from demandport.engine.node import DECLARED
from demandport.graph.spec import NodeSpec

GROUP = "demandport.nodes"
log = logging.getLogger(__name__)


def load_specs(modules: Iterable[str], left_out: list[str] | None = None) -> dict[str, NodeSpec]:
    """Import `modules` and the installed packages' entry points; returns every node type declared by then.

    A package whose module fails to import is logged and left out as a whole: it must not keep the service from
    starting. Its name is added to `left_out`.
    """
    left_out = [] if left_out is None else left_out
    for module in modules:
        importlib.import_module(module)
    for package, entry in _entry_points():
        before = dict(DECLARED)
        try:
            entry.load()
        except BaseException:  # also SystemExit
            DECLARED.clear()
            DECLARED.update(before)
            left_out.append(package)
            log.exception("the nodes of the package %s (%s) could not be loaded", package, entry.value)
    return dict(DECLARED)


def runnable(specs: Mapping[str, NodeSpec]) -> dict[str, NodeSpec]:
    """The node types that run where no host claims any."""
    return {name: spec for name, spec in specs.items() if spec.runs != "host"}


def _entry_points() -> Iterator[tuple[str, EntryPoint]]:
    for package in distributions():
        try:
            found = list(package.entry_points.select(group=GROUP))
        except Exception:
            log.exception("the nodes of a package could not be loaded: its entry points cannot be read")
            continue
        for entry in found:
            yield package.name, entry


def hash_of(specs: dict[str, NodeSpec]) -> str:
    """A short hash that changes when any descriptor does, for hosts that keep them."""
    text = json.dumps([specs[name].describe() for name in sorted(specs)], default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
