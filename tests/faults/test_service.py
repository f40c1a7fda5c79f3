"""The service as a process: whatever a node, a peer or a signal does, the port's stream and others' work live."""

from __future__ import annotations

import os
import random
import select
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from support import Ended, ServiceProcess, command, environment, framed, gone, is_terminal

PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-m", "demandport", "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
from demandport.wire.codec import MsgpackCodec
for message in (["load_model", 1, {"model": "tiny"}], ["ping", 2]):
    payload = MsgpackCodec().encode(message)
    child.stdin.write(len(payload).to_bytes(4, "big") + payload)
child.stdin.flush()
child.stdout.read(4)
print(child.pid, flush=True)
time.sleep(1000)
"""


def test_nothing_outlives_a_killed_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, env=environment()) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        pids = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
        parent.kill()
    assert gone(pids)


def test_end_of_input_and_sigterm_end_it_well(nodes: Path) -> None:
    for end in (ServiceProcess.end, ServiceProcess.terminate):
        with ServiceProcess(nodes=nodes) as service:
            service.open("s", ("a", "t-wait", {}))
            service.send(["demand", 1, "s", "a"])
            service.ping()
            end(service)
            assert service.wait() == 0


def test_a_torn_frame_is_dropped(service: ServiceProcess) -> None:
    service.write(b"\0\0\1\0half")
    service.end()
    assert service.wait() == 0


def test_sigterm_ends_it_while_an_inline_node_blocks(service: ServiceProcess) -> None:
    service.open("s", ("a", "t-spin", {}))
    service.send(["demand", 1, "s", "a"])
    service.terminate()
    assert gone([service.pid])


def test_nothing_that_is_printed_reaches_the_port(service: ServiceProcess) -> None:
    service.open("s", ("a", "t-stray", {}))
    reply = service.request("demand", "s", "a")
    assert reply[0] == "demand_complete", reply
    service.ping()
    service.end()
    with pytest.raises(Ended):
        service.receive()
    assert service.raw == b"" and service.wait() == 0
    printed = service.stderr()
    assert all(f"stray from {way}" in printed for way in ("print", "write", "C", "a child"))


@pytest.mark.parametrize("length", [(64 << 20) + 1, 1 << 31, (1 << 32) - 1])
def test_a_length_over_the_limit_ends_it_with_65(service: ServiceProcess, length: int) -> None:
    service.write(struct.pack(">I", length))
    message = service.receive()
    assert message[0] == "goodbye" and message[1]["code"] == "bad_frame"
    assert service.wait() == 65


def test_a_frame_of_length_0_is_an_error(shared: ServiceProcess) -> None:
    shared.write(bytes(4))
    message = shared.receive()
    assert message[:2] == ["error", 0] and message[2]["code"] == "bad_frame"
    shared.ping()


def test_100_000_bad_frames_then_a_good_one(service: ServiceProcess) -> None:
    rng = random.Random(5)
    good = service.codec.encode(["get_output", 5, "s", "n", "p"])
    out = bytearray()
    for _ in range(100_000):
        bad = bytearray(good if rng.random() < 0.5 else rng.randbytes(rng.randrange(1, 30)))
        bad[rng.randrange(len(bad))] = rng.randrange(256)
        out += framed(bytes(bad))
    service.write(bytes(out))
    service.send(["ping", 1 << 50])
    assert service.until(lambda m: m[:2] == ["ok", 1 << 50])


@pytest.mark.parametrize("kind", ["file", "tty", "socket", "null"])
def test_what_is_no_pipe_is_refused_with_64(kind: str, tmp_path: Path) -> None:
    extra: Any = None
    if kind == "file":
        fd = os.open(tmp_path / "in", os.O_RDWR | os.O_CREAT)
    elif kind == "tty":
        extra, fd = os.openpty()
    elif kind == "socket":
        extra, other = socket.socketpair()
        fd = other.detach()
    else:
        fd = os.open(os.devnull, os.O_RDWR)
    done = subprocess.run(command(), stdin=fd, capture_output=True, env=environment(), timeout=20)
    os.close(fd)
    if isinstance(extra, int):
        os.close(extra)
    elif extra:
        extra.close()
    assert done.returncode == 64 and b"not a pipe" in done.stderr and done.stdout == b""


def test_frames_on_other_descriptors() -> None:
    (in_r, in_w), (out_r, out_w) = os.pipe(), os.pipe()
    script = f'exec 3<&{in_r} 4>&{out_w} {in_w}>&- {out_r}<&-; exec "$@"'
    with subprocess.Popen(
        ["bash", "-c", script, "-", *command("--fd", "3,4")], pass_fds=(in_r, out_w), env=environment(),
        stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        os.close(in_r)
        os.close(out_w)
        assert select.select([out_r], [], [], 20)[0] and len(os.read(out_r, 4)) == 4
        os.close(in_w)
        assert process.wait(20) == 0
    os.close(out_r)


def test_both_ways_flooded(shared: ServiceProcess) -> None:
    ids = [shared.new_id() for _ in range(50_000)]
    shared.send(*(["ping", id] for id in ids))
    assert [shared.receive()[1] for _ in ids] == ids


def test_a_reader_that_stops_costs_no_memory(service: ServiceProcess) -> None:
    service.open("s", ("a", "t-flood", {"count": 500_000}), ("b", "text-input", {}))
    before = psutil.Process(service.pid).memory_info().rss
    service.send(["demand", 1, "s", "a"])
    process, peak, idle = psutil.Process(service.pid), 0, 0
    while idle < 3:  # until it has done all it can
        used = sum(process.cpu_times()[:2])
        select.select([], [], [], 0.2)
        peak = max(peak, process.memory_info().rss)
        idle = idle + 1 if sum(process.cpu_times()[:2]) - used < 0.02 else 0
    found = service.until(is_terminal(1), 60)
    streamed = [m for m in found if m[0] == "node_stream"]
    assert [m[4] for m in streamed] == list(range(len(streamed)))
    assert "".join(m[2] for m in streamed) == found[-1][2]["text"] == "x" * 500_000
    assert peak - before < 60 << 20


def test_a_large_value_lets_others_pass(service: ServiceProcess) -> None:
    service.open("s", ("a", "t-large", {"size": 5 << 20}))
    service.send(["demand", 1, "s", "a"])
    pings = 0
    while True:
        service.send(["ping", service.new_id()])
        message = service.receive()
        pings += message[0] == "ok"
        if message[0] == "demand_complete":
            break
    assert len(message[2]["output"]) == 5 << 20 and pings and len(service.part_numbers) >= 80


def test_credit_is_never_overdrawn_and_the_terminal_waits(shared: ServiceProcess) -> None:
    texts = [chr(97 + n % 26) for n in range(50)]
    shared.open("credit", ("a", "t-chunks", {"chunks": texts}))
    id = shared.new_id()
    shared.send(["demand", id, "credit", "a", {"credit": 2}])
    found = [shared.receive(), shared.receive()]
    shared.ping()
    with pytest.raises(TimeoutError):
        shared.receive(0.1)
    shared.send(["credit", id, 1])
    found += shared.until(is_terminal(id))
    assert [m[0] for m in found] == ["node_stream"] * 3 + ["demand_complete"]
    assert "".join(m[2] for m in found[:3]) == "".join(texts) == found[3][2]["text"]


@pytest.mark.parametrize(("kind", "data"), [("t-chunks", {"chunks": ["a"] * 5}), ("t-objects", {"count": 5})])
def test_credit_0_has_no_stream_and_no_wait(service: ServiceProcess, kind: str, data: dict[str, Any]) -> None:
    service.open("s", ("a", kind, data))
    service.send(["demand", 1, "s", "a", {"credit": 0}])
    assert service.receive(5)[0] == "demand_complete"


@pytest.mark.parametrize("kind", ["t-exit", "t-exit-inline", "t-cancelled", "t-stop", "t-raise"])
def test_whatever_a_node_raises_fails_its_demand_alone(service: ServiceProcess, kind: str) -> None:
    service.open("s", ("a", kind, {}))
    service.send(["demand", 1, "s", "a"])
    message = service.until(is_terminal(1), 5)[-1]
    assert message[0] == "demand_error" and message[2]["code"] in ("node_failed", "cancelled")
    service.ping()


@pytest.mark.parametrize("value", ["surrogate", "intkey", "set", "object", "complex", "deep", "datetime", "class"])
def test_a_value_that_cannot_travel_fails_its_demand_alone(shared: ServiceProcess, value: str) -> None:
    shared.open(f"v-{value}", ("a", "t-value", {"kind": value}))
    reply = shared.request("demand", f"v-{value}", "a")
    assert reply[0] == "demand_error" and reply[2]["code"] == "type_mismatch"


def test_a_strict_queue_answers_thousands_in_order(service: ServiceProcess) -> None:
    service.open("s", ("a", "human-input", {}), max_running=1)
    service.send(*(["demand", id, "s", "a"] for id in range(1, 3001)))
    service.send(["edit", 9000, "s", [{"op": "set_input", "node": "a", "port": "user_response", "value": 1}]])
    found: list[int] = []
    while len(found) < 3000:
        message = service.receive()
        found += [message[3]] if message[0] == "demand_complete" else []
    assert found == list(range(1, 3001))


def test_a_blocking_node_does_not_delay_a_ping(shared: ServiceProcess, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    shared.open("block", ("a", "t-block", {"path": str(gate)}))
    id = shared.new_id()
    shared.send(["demand", id, "block", "a"])
    for _ in range(20):
        shared.ping()
    gate.write_text("open")
    assert shared.until(is_terminal(id))[-1][2] == {"output": "open"}


def test_streamed_text_equals_whole(shared: ServiceProcess) -> None:
    rng = random.Random(3)
    for number in range(50):
        chars = [chr(c) for c in (rng.randrange(0x110000) for _ in range(300)) if not 0xD800 <= c < 0xE000]
        chunks = ["".join(chars[at : at + 7]) for at in range(0, len(chars), 7)]
        shared.open(f"u{number}", ("a", "t-chunks", {"chunks": chunks}))
        id = shared.new_id()
        shared.send(["demand", id, f"u{number}", "a"])
        *streamed, end = shared.until(is_terminal(id))
        assert "".join(m[2] for m in streamed) == end[2]["text"] == "".join(chars)


def test_a_killed_model_worker_is_a_crash_of_its_demand_alone(service: ServiceProcess) -> None:
    service.open("s", ("a", "llamacpp-inference", {"model_path": "tiny", "prompt": "a", "max_tokens": 60, "seed": 1}))
    service.send(["demand", 1, "s", "a", {"credit": 1}])
    assert service.until(lambda m: m[0] in ("node_stream", "demand_error", "demand_complete"))[-1][0] == "node_stream"
    workers = psutil.Process(service.pid).children(recursive=True)
    assert workers
    for worker in workers:
        worker.kill()
    service.send(["credit", 1, 1 << 20])
    end = service.until(is_terminal(1))[-1]
    assert end[0] == "demand_complete" or (end[2]["code"] == "worker_crash" and end[2]["retryable"])
    service.send(["edit", 5, "s", [{"op": "update_node_data", "node": "a", "data": {"max_tokens": 4}}]])
    assert service.request("demand", "s", "a")[0] == "demand_complete"
