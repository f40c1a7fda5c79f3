"""Programs of the operator's choice (the table ``[process]`` of the configuration); none by default."""

from __future__ import annotations

import asyncio
import codecs
import os
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from demandport.engine.node import Context, node
from demandport.errors import DeadlineExceeded, Forbidden, NodeFailed, QueueFull, TooLarge, TypeMismatch
from demandport.graph.spec import Port
from demandport.settings import Tables, known_options, placed, require, strings, whole, wrong
from demandport.workers.command import Command

#: Between the request to end and the end by force.
GRACE_S = 1.0
#: Nodes that may wait for a place among those that run.
MAX_WAITING = 1000
#: What a program has of the service's environment without being told; keys of servers stand there too.
PASSED = ("PATH", "HOME", "USER", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "LD_LIBRARY_PATH")
#: Of stderr, in the details of an error.
_TOLD_CHARACTERS = 2000


# ------------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True, slots=True)
class ProcessConfig:
    """What `process` may start, and how.

    Attributes:
        allow: programs: absolute paths, or names that are looked up on the PATH once, now.
        environment: variables to set, by name.
        pass_environment: names of variables of the service that programs have too, besides `PASSED`.
        directory: where they run; None: where the service does.
        max_output_bytes: most that one may write to stdout.
        max_running: how many may run at once; others wait.
        programs: what may be asked for (names and paths), and the path that is started for it.
    """

    allow: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    pass_environment: tuple[str, ...] = ()
    directory: Path | None = None
    max_output_bytes: int = 16 << 20
    max_running: int = 16
    programs: Mapping[str, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        whole(self, "max_output_bytes", 1, 1 << 30)
        whole(self, "max_running", 1, 1024)
        require("environment", self.environment, dict, "a table of strings")
        for name, value in self.environment.items():
            require(f"environment.{name}", value, str, "a string")
            if "\0" in value:
                raise wrong(f"environment.{name}", "must not hold a NUL")
        for name in (*self.environment, *self.pass_environment):
            if not name or "=" in name or "\0" in name:
                raise wrong("environment", f"cannot have a variable {name!r}")
        if self.directory is not None and not self.directory.is_dir():
            raise wrong("directory", f"{str(self.directory)!r} is no directory")
        object.__setattr__(self, "programs", _programs(self.allow))


def load_config(tables: Tables, environment: Mapping[str, str] = os.environ) -> ProcessConfig:
    """What the table ``[process]`` says, and above it ``DEMANDPORT_PROCESS_ALLOW`` (separated as the PATH is). Looks at
    the file system; blocks.

    Raises:
        TypeMismatch: a key is unknown or has a wrong value, or a program is not there; the message names the key.
    """
    with placed(tables.place("process")):
        config = _from_table(tables.take("process"), tables.base)
    if (allow := environment.get("DEMANDPORT_PROCESS_ALLOW")) is not None:
        with placed("DEMANDPORT_PROCESS_ALLOW"):
            config = replace(config, allow=tuple(part for part in allow.split(os.pathsep) if part))
    return config


def _from_table(table: Any, base: Path) -> ProcessConfig:
    if not isinstance(table, dict):
        raise TypeMismatch("must be a table")
    options = known_options(ProcessConfig, table)
    options["allow"] = strings(options, "allow")
    options["pass_environment"] = strings(options, "pass_environment")
    if "directory" in options:
        require("directory", options["directory"], str, "a path")
        options["directory"] = base / Path(options["directory"]).expanduser()
    return ProcessConfig(**options)


def _programs(allow: tuple[str, ...]) -> dict[str, str]:
    """What may be asked for, and what is started for it: always the path that the operator meant.

    So a path that leads to an allowed file by another link starts it under its allowed name: of a program that does
    different things by different names, only the allowed one is done.
    """
    programs: dict[str, str] = {}
    for entry in allow:
        path = _path_of(entry)
        for asked in (entry, path, os.path.basename(path), os.path.realpath(path)):
            programs.setdefault(asked, path)
    return programs


def _path_of(entry: str) -> str:
    if not entry or "\0" in entry or ("/" in entry and not os.path.isabs(entry)):
        raise wrong("allow", f"must hold absolute paths, or names on the PATH, not {entry!r}")
    path = shutil.which(entry)
    if path is None:
        where = "that is no program" if "/" in entry else "which is not on the PATH"
        raise wrong("allow", f"names {entry!r}, {where}")
    return os.path.abspath(path)


# ------------------------------------------------------------------------------------------------------- the node


class Processes:
    """What nodes are lent (``ctx.resources["process"]``): what may be started, and a place to run in."""

    def __init__(self, config: ProcessConfig) -> None:
        self.config = config
        self._places = asyncio.Semaphore(config.max_running)
        self._wanted = 0

    def program(self, command: str) -> str:
        """The path to start for `command`.

        Raises:
            Forbidden: it is not allowed.
        """
        asked = os.path.realpath(command) if os.path.isabs(command) and "\0" not in command else command
        path = self.config.programs.get(command) or self.config.programs.get(asked)
        if path is None:
            raise Forbidden(f"the command {command!r:.80} is not among `allow` of the configuration's table [process]")
        return path

    def environment(self) -> dict[str, str]:
        """The variables of a program."""
        passed = (*PASSED, *self.config.pass_environment)
        return {name: os.environ[name] for name in passed if name in os.environ} | dict(self.config.environment)

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Hold one of the `max_running` places; waits for it.

        Raises:
            QueueFull: as many wait already as may.
        """
        running = self.config.max_running
        if self._wanted >= running + MAX_WAITING:
            raise QueueFull(f"the pool 'process' has {running} running and {MAX_WAITING} waiting; try later")
        self._wanted += 1
        try:
            async with self._places:
                yield
        finally:
            self._wanted -= 1


_OUTPUTS = {
    "stdout": Port(type="any", description="Text, what is no UTF-8 replaced, or bytes, as `output` says."),
    "stderr": Port(type="string", description="Of much the beginning and the end."),
    "exit_status": Port(type="integer", description="128 + n when signal n ended it."),
}


@node("process", category="data", outputs=_OUTPUTS)
async def process(
    ctx: Context,
    command: str,
    args: Annotated[list[str], Port(type="json", description="A list of strings; no shell reads them.")] = [],  # noqa: B006 - read only
    stdin: Annotated[Any, Port(type="any", description="Text or bytes; nothing by default.")] = None,
    timeout_ms: Annotated[int | None, Port(type="integer", description="How long it may take; no limit.")] = None,
    output: Annotated[str, Port(type="string", description="What stdout is: text or bytes.")] = "text",
    check: Annotated[bool, Port(type="boolean", description="A status other than 0 is an error.")] = False,
) -> dict[str, Any]:
    """Runs a program that the configuration allows, without a shell, and streams its stdout.

    While a consumer has not taken what was streamed, the program is held up. A status other than 0 is an output. When
    the node ends, by timeout or cancel too, its whole process group is ended: SIGTERM, after a second SIGKILL; when the
    program itself ends, what is left of the group is killed at once.
    """
    if output not in ("text", "bytes"):
        raise TypeMismatch(f"output must be text or bytes, not {output!r:.40}")
    if timeout_ms is not None and timeout_ms < 1:
        raise TypeMismatch(f"timeout_ms must be at least 1, not {timeout_ms}")
    processes: Processes | None = ctx.resources.get("process")
    if processes is None:
        raise Forbidden("no command is allowed here; name it in `allow` of the configuration's table [process]")
    argv, content = [processes.program(command), *_arguments(args)], _input(stdin)
    async with processes.place():
        run = Command.start(
            argv,
            name=command,
            stdin=content,
            environment=processes.environment(),
            directory=processes.config.directory,
        )
        try:
            async with _limited(run, timeout_ms):
                stdout = await _stream(ctx, run, output, processes.config.max_output_bytes)
        finally:
            await run.stop(GRACE_S)
    if check and run.status:
        raise NodeFailed(f"{command} ended with status {run.status}", details=_told(run) | {"exit_status": run.status})
    return {"stdout": stdout, "stderr": run.stderr, "exit_status": run.status}


def _arguments(args: Any) -> list[str]:
    if not isinstance(args, list):
        raise TypeMismatch(f"args must be a list of strings, not {type(args).__name__}")
    for position, argument in enumerate(args):
        if not isinstance(argument, str) or "\0" in argument:
            raise TypeMismatch(f"args[{position}] must be a string without NUL, not {argument!r:.40}")
    return args


def _input(stdin: Any) -> bytes | None:
    if stdin is None or isinstance(stdin, bytes):
        return stdin
    if not isinstance(stdin, str):
        raise TypeMismatch(f"stdin takes text or bytes, not {type(stdin).__name__}")
    return stdin.encode()


async def _stream(ctx: Context, run: Command, output: str, limit_bytes: int) -> str | bytes:
    """Stream stdout until the program has ended; returns all of it."""
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    size = 0
    chunks: list[Any] = []
    while True:
        await ctx.room()
        data = await run.read()
        size += len(data)
        if size > limit_bytes:
            raise TooLarge(
                f"{run.name} writes more than {limit_bytes} bytes; max_output_bytes of [process] sets the limit",
                details=_told(run) | {"max_output_bytes": limit_bytes},
            )
        chunk = data if output == "bytes" else decode(data, final=not data)
        if chunk:
            chunks.append(chunk)
            await ctx.emit(chunk)
        if not data:
            return b"".join(chunks) if output == "bytes" else "".join(chunks)


@asynccontextmanager
async def _limited(run: Command, timeout_ms: int | None) -> AsyncIterator[None]:
    limit = asyncio.timeout(None if timeout_ms is None else timeout_ms / 1000)
    try:
        async with limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise DeadlineExceeded(
            f"{run.name} was ended after {timeout_ms} ms", details=_told(run) | {"timeout_ms": timeout_ms}
        ) from None


def _told(run: Command) -> dict[str, Any]:
    return {"stderr": run.stderr[-_TOLD_CHARACTERS:]}
