"""The node `process`: what may be started, what it is given, what comes of it, and that it is held up by a full sink.

Real programs run, in the real engine with no wire around it.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest

from demandport.engine.executor import Executor
from demandport.engine.registry import load_specs
from demandport.engine.session import Session
from demandport.errors import DemandportError
from demandport.nodes import BUILT_IN
from demandport.nodes.process import ProcessConfig, Processes
from demandport.workers.command import STDERR_BYTES, Ends
from demandport.workers.process import live_workers
from sink import TIMEOUT_S, Sink
from support import Gate, settle

SPECS = load_specs(BUILT_IN)
Script = Callable[[Session, Executor], Awaitable[None]]


def node(id: str = "it", **data: Any) -> dict[str, Any]:
    return {"id": id, "node_type": "process", "data": data}


def sh(script: str, **data: Any) -> dict[str, Any]:
    return node(command="sh", args=["-c", script], **data)


def run(script: Script, *nodes: dict[str, Any], **config: Any) -> None:
    """Run a test in an engine that may start `sh` and Python."""

    async def main() -> None:
        processes = Processes(ProcessConfig(**{"allow": ("sh", sys.executable)} | config))
        async with anyio.create_task_group() as tasks:
            executor = Executor(tasks, {"process": processes})
            with anyio.fail_after(TIMEOUT_S):
                await script(Session({"nodes": list(nodes), "edges": []}, SPECS, executor), executor)
                while live_workers():
                    await anyio.sleep(0)
        assert processes._wanted == 0

    anyio.run(main)


def demand(session: Session, id: str = "it", sink: Sink | None = None) -> Sink:
    sink = sink or Sink()
    sink.demand = session.demand(id, sink, lambda _: None)
    return sink


def heard(one: dict[str, Any], **config: Any) -> Sink:
    sinks: list[Sink] = []

    async def script(session: Session, _: Executor) -> None:
        sinks.append(demand(session))
        await sinks[0].done.wait()

    run(script, one, **config)
    return sinks[0]


def outputs(one: dict[str, Any], **config: Any) -> dict[str, Any]:
    sink = heard(one, **config)
    assert sink.failure is None, sink.failure
    return sink.outputs


def refusal(one: dict[str, Any], **config: Any) -> DemandportError:
    sink = heard(one, **config)
    assert sink.failure is not None, sink.outputs
    return sink.failure


# ------------------------------------------------------------------------------------------- what comes of it


def test_what_it_writes_and_how_it_ends() -> None:
    found = outputs(sh("printf 'häl'; printf lo; echo oops >&2; exit 3"))
    assert found == {"stdout": "hällo", "stderr": "oops\n", "exit_status": 3}


def test_a_program_that_says_nothing() -> None:
    assert outputs(sh("exit 0")) == {"stdout": "", "stderr": "", "exit_status": 0}


def test_a_signal_is_told_as_a_shell_tells_it() -> None:
    assert outputs(sh("kill -9 $$"))["exit_status"] == 137


@pytest.mark.parametrize("input", ["", "text: ä\n", b"\0\xff", "x" * 3_000_000])
def test_input_arrives_whole_and_ends(input: str | bytes) -> None:
    found = outputs(sh("cat", stdin=input, output="bytes"))
    assert found["stdout"] == (input.encode() if isinstance(input, str) else input)


def test_a_program_need_not_read_its_input() -> None:
    assert outputs(sh("exec <&-; echo done", stdin="x" * 3_000_000))["stdout"] == "done\n"


def test_without_input_it_reads_none() -> None:
    assert outputs(sh("cat; echo end"))["stdout"] == "end\n"


def test_no_shell_reads_the_arguments() -> None:
    args = ["-c", "import sys; print(sys.argv[1:])", "$HOME", "a b", "*", "; echo x", "`id`", "", "-c", "ä"]
    assert outputs(node(command=sys.executable, args=args))["stdout"] == f"{args[2:]}\n"


def test_chunks_come_as_they_are_written_and_are_the_output(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    go_on = os.open(gate, os.O_RDWR)

    class Answering(Sink):
        def chunk(self, node: str, port: str, value: Any) -> None:
            super().chunk(node, port, value)
            if len(self.chunks) == 1:
                os.write(go_on, b"go\n")

    async def script(session: Session, _: Executor) -> None:
        sink = demand(session, sink=Answering())
        assert (await sink.result())["stdout"] == "one\ntwo\n"
        assert sink.chunks == [("stdout", "one\n"), ("stdout", "two\n")]

    run(script, sh(f"echo one; read line < {gate}; echo two"))
    os.close(go_on)


def test_a_character_in_two_pieces_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    code = "import os; os.write(1, b'\\xf0\\x9f'); input(); os.write(1, b'\\x98\\x80 \\xff \\xe2\\x82')"
    gate = tmp_path / "gate"
    os.mkfifo(gate)

    async def script(session: Session, _: Executor) -> None:
        sink = demand(session)
        fd = await anyio.to_thread.run_sync(lambda: os.open(gate, os.O_WRONLY))
        os.write(fd, b"\n")
        os.close(fd)
        assert (await sink.result())["stdout"] == "😀 \ufffd \ufffd"
        assert "".join(value for _, value in sink.chunks) == sink.outputs["stdout"]

    run(script, sh(f"exec {shlex.quote(sys.executable)} -c {shlex.quote(code)} < {gate}"))


def test_bytes_where_they_are_asked_for() -> None:
    sink = heard(sh("printf '\\377\\000x'", output="bytes"))
    assert sink.outputs["stdout"] == b"\xff\0x" and b"".join(value for _, value in sink.chunks) == b"\xff\0x"
    assert outputs(sh("exit 0", output="bytes"))["stdout"] == b""


def test_of_a_long_stderr_the_ends_are_kept() -> None:
    stderr = outputs(sh("echo first >&2; yes | head -c 1000000 >&2; echo last >&2; echo out"))["stderr"]
    assert stderr.startswith("first\ny\n") and stderr.endswith("y\nlast\n")
    assert f"… {1_000_011 - 2 * STDERR_BYTES} bytes left out …" in stderr and len(stderr) < 2 * STDERR_BYTES + 100


@pytest.mark.parametrize("size", [1, 3, 7])
def test_two_ends(size: int) -> None:
    for length in range(30):
        data, ends = bytes(range(65, 65 + length)), Ends(5)
        for start in range(0, length, size):
            ends.add(data[start : start + size])
        whole = data.decode()
        left = f"{whole[:5]}\n… {length - 10} bytes left out …\n{whole[-5:]}"
        assert ends.text() == (whole if length <= 10 else left)


def test_its_variables_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "s3cret")
    monkeypatch.setenv("WANTED", "yes")
    lines = outputs(sh("env"), environment={"GREETING": "hä llo"}, pass_environment=("WANTED",))["stdout"].splitlines()
    said = dict(line.split("=", 1) for line in lines)
    assert "SECRET_KEY" not in said and "PYTHONPATH" not in said
    assert (said["WANTED"], said["GREETING"], said["PATH"]) == ("yes", "hä llo", os.environ["PATH"])


def test_the_directory_is_the_configured_one(tmp_path: Path) -> None:
    assert outputs(sh("pwd -P"), directory=tmp_path)["stdout"] == f"{tmp_path.resolve()}\n"


def test_it_inherits_the_three_descriptors_alone() -> None:
    code = "import os; print(sorted(map(int, os.listdir('/proc/self/fd')))[:-1])"
    assert outputs(node(command=sys.executable, args=["-c", code]))["stdout"] == "[0, 1, 2]\n"


# ------------------------------------------------------------------------------------------- what may be started


@pytest.fixture
def bin(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("tool", "other"):
        (folder / name).write_text(f"#!/bin/sh\necho {name} as $0\n")
        (folder / name).chmod(0o700)
    (folder / "link").symlink_to("tool")
    (folder / "plain").write_text("no program")
    return folder


ALLOWED: list[Any] = [
    ("{bin}/tool", "{bin}/tool", "{bin}/tool"),
    ("{bin}/tool", "tool", "{bin}/tool"),
    ("{bin}/tool", "{bin}/link", "{bin}/tool"),
    ("{bin}/tool", "{bin}/../bin/tool", "{bin}/tool"),
    ("{bin}/tool", "/{bin}/tool", "{bin}/tool"),
    ("{bin}/link", "{bin}/tool", "{bin}/link"),  # never a name that was not allowed: a program may heed its name
    ("{bin}/link", "{bin}/link", "{bin}/link"),
    ("tool", "tool", "{bin}/tool"),
    ("tool", "{bin}/tool", "{bin}/tool"),
]


@pytest.mark.parametrize(("allow", "command", "started"), ALLOWED)
def test_what_is_allowed(bin: Path, monkeypatch: pytest.MonkeyPatch, allow: str, command: str, started: str) -> None:
    monkeypatch.setenv("PATH", str(bin), prepend=os.pathsep)
    found = outputs(node(command=command.format(bin=bin)), allow=(allow.format(bin=bin),))
    assert found["stdout"] == f"tool as {started.format(bin=bin)}\n"


# fmt: off
OTHERS = (
    "other", "{bin}/other", "./tool", "bin/tool", "../tool", "", " tool", "tool ", "tool\0", "{bin}/tool\0", "TOOL",
    "{bin}", "{bin}/nothing", "sh", "/bin/sh", "tool; sh", "{bin}/plain", "~/tool", "$HOME",
)
# fmt: on


@pytest.mark.parametrize("command", OTHERS)
def test_anything_else_is_forbidden(bin: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setenv("PATH", str(bin), prepend=os.pathsep)
    monkeypatch.chdir(bin)
    error = refusal(node(command=command.format(bin=bin)), allow=(str(bin / "tool"),))
    assert (error.code, error.node) == ("forbidden", "it") and "`allow` of the configuration's table" in error.message


def test_nothing_is_allowed_by_default() -> None:
    assert refusal(sh("echo x"), allow=()).code == "forbidden"

    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            sink = demand(Session({"nodes": [sh("echo x")]}, SPECS, Executor(tasks, {})))
            await sink.done.wait()
        assert sink.failure and sink.failure.code == "forbidden"

    anyio.run(main)


def test_a_name_is_looked_up_once(bin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(bin), prepend=os.pathsep)
    config = ProcessConfig(allow=("tool",))
    monkeypatch.setenv("PATH", "/nowhere")
    assert Processes(config).program("tool") == str(bin / "tool")


# --------------------------------------------------------------------------------------------------- what is wrong

BAD: list[Any] = [
    (sh("exit 0", output="lines"), "type_mismatch", "output must be text or bytes, not 'lines'"),
    (sh("exit 0", timeout_ms=0), "type_mismatch", "timeout_ms must be at least 1, not 0"),
    (sh("exit 0", stdin={"a": 1}), "type_mismatch", "stdin takes text or bytes, not dict"),
    (node(command="sh", args={"a": 1}), "type_mismatch", "args must be a list of strings, not dict"),
    (node(command="sh", args=["-c", 5]), "type_mismatch", r"args\[1\] must be a string without NUL, not 5"),
    (node(command="sh", args=["a\0"]), "type_mismatch", r"args\[0\] must be a string without NUL"),
    (node(command="sh", args=["x" * 4_000_000]), "too_large", "arguments of sh are longer than the system takes"),
    (node(command="sh", args=["\ud800"]), "node_failed", "sh cannot be started"),
    (sh("exit 4", check=True), "node_failed", "sh ended with status 4"),
]


@pytest.mark.parametrize(("one", "code", "says"), BAD, ids=[says for *_, says in BAD])
def test_what_is_wrong_is_said(one: dict[str, Any], code: str, says: str) -> None:
    error = refusal(one)
    assert (error.code, error.node) == (code, "it")
    assert re.search(says, error.message)


def test_a_status_that_is_an_error_comes_with_what_was_said() -> None:
    assert refusal(sh("echo why >&2; exit 4", check=True)).details == {"stderr": "why\n", "exit_status": 4}
    assert outputs(sh("exit 0", check=True))["exit_status"] == 0


def test_what_the_system_cannot_run(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/there/is/no/such/interpreter\n")
    broken.chmod(0o700)
    error = refusal(node(command="broken"), allow=(str(broken),))
    assert error.code == "node_failed" and error.message == f"{broken} cannot be run: No such file or directory"


def test_a_program_that_went_away(tmp_path: Path) -> None:
    tool = tmp_path / "tool"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o700)

    async def script(session: Session, _: Executor) -> None:
        tool.unlink()
        sink = demand(session)
        await sink.done.wait()
        assert sink.failure and sink.failure.code == "node_failed" and "cannot be run" in sink.failure.message

    run(script, node(command="tool"), allow=(str(tool),))


def test_a_status_of_127_is_the_programs_own() -> None:
    assert outputs(sh("exit 127"))["exit_status"] == 127


def test_output_over_the_limit() -> None:
    assert len(outputs(sh("yes | head -c 100000"), max_output_bytes=100_000)["stdout"]) == 100_000
    error = refusal(sh("yes | head -c 100001"), max_output_bytes=100_000)
    assert error.code == "too_large" and "max_output_bytes of [process] sets the limit" in error.message


def test_a_program_without_end_is_ended_by_the_limit_and_by_the_timeout() -> None:
    assert refusal(sh("yes")).code == "too_large"
    error = refusal(sh("echo waiting >&2; sleep 1000", timeout_ms=300))
    assert error.code == "deadline_exceeded" and error.message == "sh was ended after 300 ms"
    assert error.details and error.details["timeout_ms"] == 300


# ----------------------------------------------------------------------------------------------- held up, in turns


def test_a_program_is_held_up_while_nobody_takes_its_output(tmp_path: Path) -> None:
    """It tells how much it could write by a byte each to a file; the pipe holds 64 KiB and the node one read."""
    told, gate = tmp_path / "told", Gate(tmp_path)
    code = (
        "import os, sys; told = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND); open(sys.argv[2], 'w')\n"
        "for _ in range(4096): os.write(1, bytes(16384)); os.write(told, b'.')"
    )

    async def script(session: Session, _: Executor) -> None:
        has_room = anyio.Event()
        sink = demand(session, sink=Sink(has_room))
        await sink.asked_for_room.wait()
        await anyio.to_thread.run_sync(gate.wait)
        (child,) = live_workers()
        await anyio.to_thread.run_sync(settle, psutil.Process(child.pid))
        assert 0 < told.stat().st_size * 16384 <= 3 * 65536
        has_room.set()
        assert len((await sink.result())["stdout"]) == 64 << 20
        assert told.stat().st_size == 4096

    run(script, node(command=sys.executable, args=["-c", code, str(told), str(gate.path)]), max_output_bytes=64 << 20)


def test_no_more_than_allowed_run_at_once_and_all_get_their_turn(tmp_path: Path) -> None:
    script_of = f"mkdir {tmp_path}/$$ && set -- {tmp_path}/*/ && echo $#; rmdir {tmp_path}/$$"
    nodes = [node(str(n), command="sh", args=["-c", script_of]) for n in range(12)]

    async def script(session: Session, _: Executor) -> None:
        sinks = [demand(session, str(n)) for n in range(12)]
        assert {int((await sink.result())["stdout"]) for sink in sinks} <= {1, 2}

    run(script, *nodes, max_running=2)


def test_too_many_that_wait_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("demandport.nodes.process.MAX_WAITING", 1)
    nodes = [node(str(n), command="sh", args=["-c", "read line; echo $line"], stdin="x\n") for n in range(3)]

    async def script(session: Session, _: Executor) -> None:
        sinks = [demand(session, str(n)) for n in range(3)]
        for sink in sinks:
            await sink.done.wait()
        assert [sink.failure and sink.failure.code for sink in sinks] == [None, None, "queue_full"]

    run(script, *nodes, max_running=1)


def test_a_cancelled_one_leaves_its_place() -> None:
    nodes = [node(str(n), command="sh", args=["-c", "sleep 1000"]) for n in range(3)]

    async def script(session: Session, executor: Executor) -> None:
        sinks = [demand(session, str(n)) for n in range(3)]
        for sink in sinks:
            await anyio.sleep(0)
            session.cancel(sink.demand)
        for sink in sinks:
            await sink.done.wait()
        while executor.running:
            await anyio.sleep(0)

    run(script, *nodes, max_running=1)
