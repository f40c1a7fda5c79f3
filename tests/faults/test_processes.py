"""Programs that the node `process` runs: however they behave and however the demand ends, the whole group is gone."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from support import (
    END_S,
    Gate,
    ServiceProcess,
    command,
    environment,
    eventually,
    family,
    gone,
    is_terminal,
    kill,
    lives,
    settle,
)

#: Started by the shell, it ignores TERM and keeps the pipes open, and then goes to the gate and hangs.
STUBBORN = "(trap '' TERM; : > {gate}; while :; do sleep 1000; done) & "
#: Leaves the process group, and writes without end.
RUNAWAY = "setsid sh -c ': > {gate}; echo $$ > {pid}; exec yes' & "


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "config.toml"
    file.write_text('[process]\nallow = ["sh"]\nmax_output_bytes = 100_000_000\n')
    return file


@pytest.fixture
def service(config: Path) -> Iterator[ServiceProcess]:
    with ServiceProcess("--config", str(config)) as process:
        yield process


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path)


def start(service: ServiceProcess, gate: Gate, script: str, data: Any = None, **options: Any) -> list[psutil.Process]:
    """Demand a node that runs `script`; returns the processes there are once it has come to the gate."""
    shell = {"command": "sh", "args": ["-c", script.format(gate=gate.path)]}
    service.open("s", ("p", "process", shell | (data or {})))
    service.send(["demand", 1, "s", "p", options])
    gate.wait()
    started = family(service.pid)[1:]
    assert started
    return started


def end_of(service: ServiceProcess, id: int = 1) -> list[Any]:
    return service.until(is_terminal(id))[-1]


def nothing_is_left(service: ServiceProcess, started: list[psutil.Process]) -> None:
    assert gone(started, 5 * END_S)
    assert eventually(lambda: service.request("health")[2]["nodes_running"] == 0, 5 * END_S)
    service.ping()


WAITS = {
    "a grandchild that ignores TERM": STUBBORN + "wait",
    "a program that ignores TERM": "trap '' TERM; : > {gate}; while :; do sleep 1000; done",
    "a program that writes without end": "yes & : > {gate}; wait",
}


@pytest.mark.parametrize("script", WAITS.values(), ids=WAITS)
def test_a_cancel_ends_the_whole_group(service: ServiceProcess, gate: Gate, script: str) -> None:
    started = start(service, gate, script, credit=1)
    assert service.request("cancel", 1)[2] is True
    nothing_is_left(service, started)


@pytest.mark.parametrize("script", WAITS.values(), ids=WAITS)
def test_a_deadline_ends_the_whole_group(service: ServiceProcess, gate: Gate, script: str) -> None:
    started = start(service, gate, script, credit=1, deadline_ms=1500)
    assert end_of(service)[2]["code"] == "deadline_exceeded"
    nothing_is_left(service, started)


@pytest.mark.parametrize("script", WAITS.values(), ids=WAITS)
def test_a_timeout_ends_the_whole_group(service: ServiceProcess, gate: Gate, script: str) -> None:
    started = start(service, gate, script, {"timeout_ms": 1500}, credit=1)
    error = end_of(service)[2]
    assert error["code"] == "deadline_exceeded" and error["message"] == "sh was ended after 1500 ms"
    nothing_is_left(service, started)


def test_a_stopped_program_is_ended_too(service: ServiceProcess, gate: Gate) -> None:
    started = start(service, gate, STUBBORN + "wait")
    for process in started:
        process.send_signal(signal.SIGSTOP)
    assert service.request("cancel", 1)[2] is True
    nothing_is_left(service, started)


def test_a_program_that_is_killed_has_a_status(service: ServiceProcess, gate: Gate) -> None:
    leader, *others = start(service, gate, "echo before; " + STUBBORN + "wait")
    assert others
    leader.kill()
    end = end_of(service)
    assert end[0] == "demand_complete" and end[2] == {"stdout": "before\n", "stderr": "", "exit_status": 137}
    nothing_is_left(service, [leader, *others])


def test_the_end_of_the_program_is_the_end_of_the_group(service: ServiceProcess, gate: Gate, tmp_path: Path) -> None:
    go = tmp_path / "go"
    os.mkfifo(go)
    started = start(service, gate, STUBBORN + f"read line < {go}; echo done; exit 5")
    go.write_text("go\n")
    assert end_of(service)[2] == {"stdout": "done\n", "stderr": "", "exit_status": 5}
    nothing_is_left(service, started)


def test_a_runaway_does_not_hold_the_node(service: ServiceProcess, gate: Gate, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    go = tmp_path / "go"
    os.mkfifo(go)
    script = RUNAWAY.format(gate=gate.path, pid=pid) + f"read line < {go}; exit 6"
    service.open("s", ("p", "process", {"command": "sh", "args": ["-c", script]}))
    service.send(["demand", 1, "s", "p", {"credit": 1}])
    gate.wait()
    leader, runaway = family(service.pid)[1], []
    try:
        assert eventually(lambda: pid.exists() and pid.read_text().strip() != "", END_S)
        runaway.append(psutil.Process(int(pid.read_text())))
        go.write_text("go\n")
        assert gone([leader])
        service.send(["credit", 1, 1000])
        end = end_of(service)
        assert end[0] == "demand_complete" and end[2]["exit_status"] == 6 and set(end[2]["stdout"]) <= set("y\n")
        assert eventually(lambda: not lives(runaway[0]), END_S), "it writes to a pipe that nobody has open"
    finally:
        kill(runaway)


ENDS = [ServiceProcess.end, ServiceProcess.terminate, ServiceProcess.hang_up]


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
@pytest.mark.parametrize("script", WAITS.values(), ids=WAITS)
def test_none_outlives_the_service(service: ServiceProcess, gate: Gate, script: str, end: Any) -> None:
    started = start(service, gate, script, credit=1)
    end(service)
    assert service.process.wait(END_S) == 0
    assert gone(started, 0.2)


def test_the_program_does_not_outlive_a_service_that_is_killed(service: ServiceProcess, gate: Gate) -> None:
    started = start(service, gate, ": > {gate}; read line < {gate}")
    service.process.kill()
    assert gone(started)


def test_text_is_held_up_at_its_source_for_lack_of_credit(service: ServiceProcess, gate: Gate, tmp_path: Path) -> None:
    """64 MiB are to be written; the shell tells after each 64 KiB, so what it could write is known, and so is who has
    it: not the service."""
    told = tmp_path / "told"
    write = f"head -c 65536 /dev/zero && printf . >> {told}"
    script = f"{write}; : > {{gate}}; n=1; while [ $n -lt 1024 ]; do {write}; n=$((n + 1)); done"
    process = psutil.Process(service.pid)
    before = settle(process)
    start(service, gate, script, credit=1)
    most = settle(process)
    assert 1 <= told.stat().st_size <= 5
    assert most - before < 16 << 20
    assert lives(family(service.pid)[1])
    service.send(["credit", 1, 1 << 40])
    end = end_of(service)
    assert end[0] == "demand_complete" and len(end[2]["stdout"]) == 64 << 20 and told.stat().st_size == 1024


def test_a_demand_that_wants_no_stream_holds_nothing_up(service: ServiceProcess) -> None:
    service.open("s", ("p", "process", {"command": "sh", "args": ["-c", "yes | head -c 1000000"]}))
    service.send(["demand", 1, "s", "p", {"credit": 0}])
    message = service.receive()
    assert message[0] == "demand_complete" and len(message[2]["stdout"]) == 1_000_000


def test_a_service_says_what_is_wrong_with_its_configuration(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('[process]\nallow = ["there-is-no-such"]\n')
    done = subprocess.run(command("--config", str(file)), input=b"", capture_output=True, env=environment(), timeout=60)
    assert done.returncode == 64 and done.stdout == b""
    assert b"config.toml: process: parameter allow names 'there-is-no-such', which is not on the PATH" in done.stderr
