"""A real BEAM has the service as its port: `relay.exs` hands frames on between this test and the service.

Whatever is killed, and whenever, the other side learns of it and no process is left after the promised time.
"""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from history import Fact
from recording import Recorder
from support import END_S, LIBRARY, Gate, ServiceProcess, count, family, framed, gone, lives, settle

pytestmark = pytest.mark.skipif(not shutil.which("elixir"), reason="Elixir is not installed")
# With one thread of each kind and no busy waiting, a BEAM starts in time on a busy machine, too.
CALM = "+S 1:1 +SDcpu 1:1 +SDio 1 +A 1 +sbwt none +sbwtdcpu none +sbwtdio none"
RELAY = ["elixir", "--erl", f"-noinput {CALM}", str(Path(__file__).with_name("relay.exs"))]
ENDLESS = 1 << 40


def beam(*arguments: str, **options: Any) -> Recorder:
    """A BEAM with the service as its port, whose history is judged. Its `pid` is that of the BEAM."""
    return Recorder(*arguments, through=RELAY, **options)


def service_of(host: ServiceProcess) -> psutil.Process:
    assert host.ready
    return psutil.Process(host.ready[1]["os_pid"])


def is_end(message: list[Any]) -> bool:
    """The BEAM was told of the end of its port."""
    return message[0] in ("exit_status", "port_closed")


@pytest.mark.parametrize("when", ["idle", "stream", "load", "prompt"])
@pytest.mark.parametrize("victim", ["beam", "service"])
def test_nothing_is_left_after_a_kill(victim: str, when: str, nodes: Path, tmp_path: Path) -> None:
    # In load and prompt the worker hangs in C and hears nothing, so the moment is certain and is the worst there is.
    stall = {"load": "llama_model_load_from_file:1", "prompt": "llama_decode:1"}.get(when, "")
    for number in range(count(1, 50)):
        (tmp_path / str(number)).mkdir()
        gate = Gate(tmp_path / str(number))
        with beam(nodes=nodes, folders=[LIBRARY], env=gate.at(stall)) as host:
            llm = {"model_path": "tiny", "prompt": "Tell me about cats.", "grammar": "root ::= [a-z ]{450}"}
            flood, child = ("flood", "t-objects", {"count": ENDLESS}), ("child", "t-child", {"how": "exec"})
            host.open("s", ("llm", "llamacpp-inference", llm), flood, child)
            if victim == "beam":
                assert host.request("demand", "s", "child")[0] == "demand_complete"
            if when != "idle":
                host.send(["demand", 1, "s", "llm"])
            if stall:
                gate.wait()
            if when == "stream":
                host.until(lambda m: m[0] == "node_stream")
                host.send(["demand", 2, "s", "flood"])
                host.until(lambda m: m[0] == "node_stream" and m[1] == "flood")
            service = service_of(host)
            left = family(host.pid if victim == "beam" else service.pid)
            assert service in left and len(family(service.pid)) == 1 + (when != "idle") + (victim == "beam")
            if victim == "beam":
                host.process.kill()
            else:
                service.kill()
            assert gone(left)
            if victim == "service":
                assert host.until(is_end)[-1] == ["exit_status", 128 + signal.SIGKILL]


def test_a_torn_frame_never_reaches_the_owner(nodes: Path) -> None:
    for _ in range(count(1, 1000)):
        with beam(nodes=nodes) as host:
            host.open("s", ("a", "t-objects", {"count": ENDLESS, "padding": "x" * 50_000}))
            host.send(["demand", 1, "s", "a"])
            found = host.until(lambda m: m[0] == "node_stream")
            host.process.send_signal(signal.SIGSTOP)
            settle(service_of(host))  # the pipe is full, and holds no whole number of frames
            service_of(host).kill()
            host.process.send_signal(signal.SIGCONT)
            found += host.until(is_end)
            assert found.pop() == ["exit_status", 128 + signal.SIGKILL]
            assert [(m[0], m[4], m[2]["n"]) for m in found] == [("node_stream", n, n) for n in range(len(found))]


def test_a_service_that_is_killed_with_much_in_flight_keeps_its_promises_up_to_the_end(nodes: Path) -> None:
    for number in range(count(2, 200)):
        with beam(nodes=nodes) as host:
            host.open("s", *((f"n{n}", "t-objects", {"count": 200}) for n in range(20)), ("w", "t-wait", {}))
            host.send(*(["demand", n + 1, "s", f"n{n}", {"credit": 150 + 10 * n}] for n in range(20)))
            host.send(["demand", 21, "s", "w", {}], ["cancel", 22, 3])
            host.until(lambda m, number=number: m[0] == "node_stream" and m[4] == number % 150)
            service_of(host).kill()
            host.hear_the_end()
            assert host.history[-1] == Fact("ended") and not host.judge.finish()


def test_floods_and_large_values_pass_both_ways_at_once(nodes: Path) -> None:
    with beam(nodes=nodes) as host:
        host.open("s", ("in", "linked-input", {}), ("flood", "t-objects", {"count": 5_000}))
        value = bytes(range(256)) * (20 << 10)
        ids = [host.new_id() for _ in range(20_000)]
        host.send(
            ["demand", 1, "s", "flood"],
            *(["ping", id] for id in ids[:10_000]),
            ["edit", 2, "s", [{"op": "set_input", "node": "in", "port": "value", "value": value}]],
            ["demand", 3, "s", "in"],
            *(["ping", id] for id in ids[10_000:]),
        )
        found = [host.receive() for _ in range(len(ids) + 1 + 1 + 5_000 + 1)]
        # In any order: the watchdog answers some that stand behind work that takes long.
        assert sorted(m for m in found if m[0] == "ok" and m[1] != 2) == [["ok", id, "pong"] for id in ids]
        assert [m[2] for m in found if m[0] == "demand_complete" and m[3] == 3] == [{"value": value}]
        assert [m[4] for m in found if m[0] == "node_stream"] == list(range(5_000))
        host.says_nothing_more()


def test_frames_on_descriptors_3_and_4(nodes: Path) -> None:
    with beam("--fd", "3,4", nodes=nodes) as host:
        host.open("s", ("a", "t-stray", {}))
        assert host.request("demand", "s", "a")[0] == "demand_complete"
        host.says_nothing_more()
        service = service_of(host)
        host.process.kill()
        assert gone([service])


@pytest.mark.parametrize(("how", "fds"), [("exec", []), ("exec", ["--fd", "3,4"]), ("fork", [])])
def test_the_beam_is_told_of_the_end_though_a_child_of_a_node_lives_on(nodes: Path, how: str, fds: list[str]) -> None:
    with beam(*fds, nodes=nodes) as host:
        host.open("s", ("a", "t-child", {"how": how}))
        child = psutil.Process(host.request("demand", "s", "a")[2]["output"])
        try:
            service_of(host).kill()
            assert host.receive(END_S) == ["exit_status", 128 + signal.SIGKILL]
            assert lives(child)
        finally:
            child.kill()


def test_a_frame_over_the_limit_is_answered_though_the_beam_is_still_writing_it() -> None:
    with beam("--max-frame-bytes", "4096") as host:
        host.write(framed(bytes(8 << 20)))
        *before, end = host.until(is_end)
        assert [(m[0], m[1]["code"]) for m in before] == [("goodbye", "bad_frame")]
        assert end == ["exit_status", 65]
