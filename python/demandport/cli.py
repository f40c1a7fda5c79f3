"""The command `demandport`: serve a host, run a graph from a shell, list node types, draw a graph."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from typing import Any, NoReturn

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
    serve.add_argument("--model", default="tiny", help="model for nodes that name none (tiny)")
    serve.add_argument("--log-level", choices=("DEBUG", "INFO", "WARNING", "ERROR"), default="INFO")
    serve.set_defaults(function=_serve)

    run = commands.add_parser("run", help="run one node of a graph and stream to the terminal")
    run.add_argument("graph", metavar="GRAPH.json")
    run.add_argument("node")
    run.add_argument("--set", action="append", default=[], metavar="NODE.PORT=VALUE", dest="inputs", type=_assignment)
    run.add_argument("--events", action="store_true", help="show what happens, on stderr")
    run.add_argument("--files", metavar="DIR", help="directory that file nodes may use (none)")
    run.set_defaults(function=_run)

    nodes = commands.add_parser("nodes", help="list node types with their ports")
    nodes.add_argument("--json", action="store_true")
    nodes.set_defaults(function=_nodes)

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
    from demandport.service.main import Settings, serve

    settings = Settings(
        arguments.codec, arguments.max_frame_bytes, arguments.model, arguments.files, arguments.log_level
    )
    serve(*fds, settings)
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from demandport.headless import run

    return run(
        _read_json(arguments.graph), arguments.node, arguments.inputs, events=arguments.events, files=arguments.files
    )


def _nodes(arguments: argparse.Namespace) -> int:
    from demandport.engine.registry import load_specs
    from demandport.nodes import BUILT_IN

    specs = load_specs(BUILT_IN)
    if arguments.json:
        print(json.dumps([spec.describe() for spec in specs.values()], indent=2))
        return 0
    for spec in sorted(specs.values(), key=lambda spec: (spec.category, spec.node_type)):
        inputs = [f"{port.name}{'!' if port.required else ''}" for port in spec.inputs.values()]
        inputs += ["…"] if spec.open_inputs else []
        print(f"{spec.category:<10} {spec.node_type}: {', '.join(inputs)} -> {', '.join(spec.outputs)}")
        print(f"{'':<10}   {spec.description}")
    return 0


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
