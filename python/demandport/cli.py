"""The command `demandport`: serve a host, run a graph from a shell, list node types and models, draw a graph."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

if TYPE_CHECKING:
    from demandport.inference.config import Config
    from demandport.inference.library import LibraryEntry
    from demandport.nodes.http import HttpConfig
    from demandport.nodes.process import ProcessConfig

USAGE_ERROR = 64


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status. `serve` does not return."""
    arguments = _parser().parse_args(argv)
    try:
        status = int(arguments.function(arguments))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # who read has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="demandport", description=__doc__)
    commands = parser.add_subparsers(title="commands", required=True)

    serve = commands.add_parser("serve", help="serve the program that opened this one as a port")
    serve.add_argument("--fd", type=_fds, default=(0, 1), metavar="IN,OUT", help="file descriptors of the frames (0,1)")
    serve.add_argument("--codec", choices=("msgpack", "etf"), default="msgpack")
    serve.add_argument("--max-frame-bytes", type=_frame_bytes, default=64 * 1024 * 1024, metavar="N")
    serve.add_argument("--files", metavar="DIR", help="directory that file nodes may use (none)")
    serve.add_argument("--cpu-workers", type=_count, metavar="N", help="processes for nodes that compute (one a core)")
    serve.add_argument("--cpu-memory-bytes", type=_count, metavar="N", help="memory that each of them may take (any)")
    serve.add_argument("--model", help="model for nodes that name none (tiny)")
    serve.add_argument("--config", metavar="FILE.toml", help="models, and what nodes may start and ask")
    serve.add_argument("--log-level", choices=("DEBUG", "INFO", "WARNING", "ERROR"), default="INFO")
    serve.set_defaults(function=_serve)

    run = commands.add_parser("run", help="run one node of a graph and stream to the terminal")
    run.add_argument("graph", metavar="GRAPH.json")
    run.add_argument("node")
    run.add_argument("--set", action="append", default=[], metavar="NODE.PORT=VALUE", dest="inputs", type=_assignment)
    run.add_argument("--events", action="store_true", help="show what happens, on stderr")
    run.add_argument("--files", metavar="DIR", help="directory that file nodes may use (none)")
    run.add_argument("--model", help="model for nodes that name none (tiny)")
    run.add_argument("--config", metavar="FILE.toml", help="models, and what nodes may start and ask")
    run.set_defaults(function=_run)

    nodes = commands.add_parser(
        "nodes", help="list node types with their ports; exit status 1 when a package's could not be loaded"
    )
    nodes.add_argument("--json", action="store_true")
    nodes.set_defaults(function=_nodes)

    models = commands.add_parser("models", help="list the models of the library")
    models.add_argument("directories", nargs="*", type=Path, metavar="DIR", help="look here, not where is configured")
    models.add_argument("--config", metavar="FILE.toml", help="which models there are, and how each is run")
    models.add_argument("--json", action="store_true")
    models.set_defaults(function=_models)

    graph = commands.add_parser("graph", help="validate a graph and print it as Mermaid")
    graph.add_argument("graph", metavar="GRAPH.json")
    graph.set_defaults(function=_graph)
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(USAGE_ERROR, f"{self.prog}: {message}\n")


def _fds(text: str) -> tuple[int, int]:
    try:
        fd_in, fd_out = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError("two numbers, such as 3,4") from None
    return fd_in, fd_out


def _frame_bytes(text: str) -> int:
    if not text.isdigit() or not 4096 <= int(text) < 1 << 32:
        raise argparse.ArgumentTypeError("a number from 4096 to 4294967295")
    return int(text)


def _count(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) < 1 << 63:
        raise argparse.ArgumentTypeError("a number from 1")
    return int(text)


def _assignment(text: str) -> tuple[str, str, Any]:
    place, equals, value = text.partition("=")
    node, dot, port = place.rpartition(".")
    if not equals or not dot or not node or not port:
        raise argparse.ArgumentTypeError(f"{text!r} is not NODE.PORT=VALUE")
    try:
        return node, port, json.loads(value)
    except ValueError:
        return node, port, value  # plain text needs no quotes


def _serve(arguments: argparse.Namespace) -> int:
    from demandport import pipes

    try:
        fds = pipes.claim(*arguments.fd)
    except pipes.NotAPipe as wrong:
        print(f"demandport serve: {wrong}", file=sys.stderr)
        return USAGE_ERROR
    # Only now: nothing that these import can print onto the port.
    configured = _configured(arguments.config, arguments.model)
    from demandport.service.main import Settings, serve

    settings = Settings(
        arguments.codec,
        arguments.max_frame_bytes,
        files=arguments.files,
        log_level=arguments.log_level,
        cpu_workers=arguments.cpu_workers,
        cpu_memory_bytes=arguments.cpu_memory_bytes,
        **configured._asdict(),
    )
    serve(*fds, settings)
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from demandport.headless import run

    return run(
        _read_json(arguments.graph),
        arguments.node,
        arguments.inputs,
        events=arguments.events,
        files=arguments.files,
        **_configured(arguments.config, arguments.model)._asdict(),
    )


class _Configured(NamedTuple):
    models: Config
    process: ProcessConfig
    http: HttpConfig


def _configured(file: str | None, default_model: str | None = None) -> _Configured:
    """The configuration, each part read by whom it concerns; one that is wrong ends the command."""
    from demandport.errors import DemandportError
    from demandport.inference import config as models
    from demandport.nodes import http, process
    from demandport.settings import Tables

    try:
        tables = Tables.read(None if file is None else Path(file))
        found = _Configured(models.load_config(tables), process.load_config(tables), http.load_config(tables))
        tables.require_known()
    except DemandportError as wrong:
        print(f"demandport: {wrong.message}", file=sys.stderr)
        raise SystemExit(USAGE_ERROR) from None
    if default_model is None:
        return found
    return found._replace(models=replace(found.models, default_model=default_model))


def _nodes(arguments: argparse.Namespace) -> int:
    from demandport.engine.registry import load_specs
    from demandport.nodes import BUILT_IN

    left_out: list[str] = []
    specs = load_specs(BUILT_IN, left_out)
    if arguments.json:
        print(json.dumps([spec.describe() for spec in specs.values()], indent=2))
        return 1 if left_out else 0
    for spec in sorted(specs.values(), key=lambda spec: (spec.category, spec.node_type)):
        inputs = [f"{port.name}{'!' if port.required else ''}" for port in spec.inputs.values()]
        inputs += ["…"] if spec.open_inputs else []
        print(f"{spec.category:<10} {spec.node_type}: {', '.join(inputs)} -> {', '.join(spec.outputs)}")
        print(f"{'':<10}   {spec.description}")
    return 1 if left_out else 0


def _models(arguments: argparse.Namespace) -> int:
    from demandport.inference.library import Library

    for directory in arguments.directories:
        if not directory.is_dir():
            print(f"demandport: {directory}: no such directory", file=sys.stderr)
            return USAGE_ERROR
    directories = arguments.directories or _configured(arguments.config).models.model_directories
    entries = Library(directories).entries()
    if arguments.json:
        print(json.dumps([entry.describe() for entry in entries], indent=2))
    else:
        _print_table(entries)
    return 0


def _print_table(entries: Sequence[LibraryEntry]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # What reads a pipe wants whole lines; and neither a file nor its name may talk to the terminal.
    console = Console(width=None if sys.stdout.isatty() else 10_000, highlight=False)
    table = Table(box=None, pad_edge=False)
    for title in ("id", "name", "arch", "params", "quant", "size", "context", "template", "notes"):
        table.add_column(title, overflow="fold", no_wrap=title in ("params", "quant", "size"))
    for entry in entries:
        table.add_row(*(Text(_printable(cell)) for cell in _row(entry)), style="dim" if entry.unusable else None)
    console.print(table)
    for entry in entries:
        if entry.unusable:
            console.print(Text(_printable(f"{entry.id} {entry.unusable}")), soft_wrap=True)


def _row(entry: LibraryEntry) -> Iterator[str]:
    about = entry.describe()
    yield from (entry.id, entry.name, about["architecture"] or "")
    yield _short(entry.parameters, ("", "K", "M", "B", "T"), 1000)
    yield about["quantization"] or ""
    yield _short(entry.size_bytes, ("B", "KiB", "MiB", "GiB", "TiB"), 1024)
    yield str(about["context_length"] or "")
    yield "yes" if about["has_chat_template"] else "no"
    yield "; ".join(_notes(entry))


def _notes(entry: LibraryEntry) -> Iterator[str]:
    if entry.unusable:
        yield "unusable"
    if entry.metadata and entry.metadata.split_count > 1:
        yield f"{entry.metadata.split_count} files"
    if entry.metadata and entry.metadata.embedding_only:
        yield "reranker" if entry.metadata.pooling == "rank" else "embeddings"
    if entry.mmproj:
        yield f"sees with {entry.mmproj.name}"
    if entry.pumas:
        yield "Pumas"
    yield from entry.notes


def _short(number: float | None, units: Sequence[str], step: int) -> str:
    """A number with three digits or so, and its unit."""
    if number is None:
        return ""
    for unit in units:
        if number < step or unit == units[-1]:
            break
        number /= step
    return f"{number:.3g} {unit}".strip()


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "�" for character in text)


def _graph(arguments: argparse.Namespace) -> int:
    from demandport.engine.registry import load_specs
    from demandport.errors import DemandportError
    from demandport.graph.loading import load
    from demandport.graph.mermaid import mermaid
    from demandport.graph.validation import problems_of
    from demandport.nodes import BUILT_IN

    try:
        graph = load(_read_json(arguments.graph))
    except DemandportError as wrong:
        print(f"{wrong.code}: {wrong.message}", file=sys.stderr)
        return 1
    problems = problems_of(graph, load_specs(BUILT_IN))
    for problem in problems:
        print(f"{problem.code}: {problem.message}; {problem.hint}", file=sys.stderr)
    print(mermaid(graph))
    return 1 if problems else 0


def _read_json(path: str) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as failed:
        print(f"demandport: {path}: {failed}", file=sys.stderr)
        raise SystemExit(USAGE_ERROR) from None
