"""The service as a process: whatever a node, a peer or a signal does, the port's stream and others' work live."""

from __future__ import annotations

import fcntl
import os
import random
import select
import socket
import struct
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest

from demandport.wire.codec import MsgpackCodec
from stray import WAYS
from support import (
    END_S,
    LIBRARY,
    TIMEOUT_S,
    Ended,
    Gate,
    ServiceProcess,
    command,
    count,
    environment,
    family,
    framed,
    gone,
    is_terminal,
    kill,
    parent_of_service,
    settle,
)

# --------------------------------------------------------------------------------------------------- ends


def test_nothing_outlives_a_killed_parent(nodes: Path, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    load = framed(MsgpackCodec().encode(["load_model", 1, {"model": "tiny"}]))
    with parent_of_service(load, environment(LIBRARY, nodes) | gate.at("llama_model_load_from_file:1")) as parent:
        try:
            gate.wait()
            left = family(parent.pid)
        finally:
            parent.kill()
    assert len(left) == 3 and gone(left)


ENDS = [ServiceProcess.end, ServiceProcess.terminate, ServiceProcess.hang_up]


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
def test_it_ends_well_whatever_is_under_way(end: Any, nodes: Path, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    closed = tmp_path / "closed"
    os.mkfifo(closed)
    with ServiceProcess(nodes=nodes, folders=[LIBRARY], env=gate.at("llama_model_load_from_file:1")) as service:
        service.open(
            "s",
            ("wait", "t-wait", {}),
            ("thread", "t-block", {"path": str(closed)}),
            ("load", "llamacpp-inference", {"model_path": "tiny", "prompt": "a"}),
            ("flood", "t-objects", {"count": 1 << 40}),
        )
        service.send(*(["demand", id, "s", node] for id, node in enumerate(("wait", "thread", "load"), 1)))
        gate.wait()
        while service.request("health")[2]["nodes_running"] < 3:
            pass
        service.send(["demand", 4, "s", "flood"])
        left = family(service.pid)
        settle(left[0])  # its output is full
        end(service)
        assert service.process.wait(END_S) == 0
        assert len(left) == 2 and gone(left)


@pytest.mark.parametrize("end", ENDS[:2], ids=lambda end: end.__name__)
def test_it_ends_while_an_inline_node_blocks(end: Any, service: ServiceProcess, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    service.open("s", ("a", "t-spin", {"gate": str(gate.path)}))
    service.send(["demand", 1, "s", "a"])
    gate.wait()
    end(service)
    assert service.process.wait(END_S) == 0


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
def test_what_nodes_have_started_goes_with_the_service(end: Any, service: ServiceProcess) -> None:
    service.open("s", ("exec", "t-child", {"how": "exec"}), ("fork", "t-child", {"how": "fork"}))
    for node in ("exec", "fork"):
        assert service.request("demand", "s", node)[0] == "demand_complete"
    children = family(service.pid)[1:]
    try:
        end(service)
        assert service.wait() == 0
        assert len(children) == 2 and gone(children, 0.2)  # nobody is left who could end them later
    finally:
        kill(children)


def test_a_torn_frame_is_dropped(service: ServiceProcess) -> None:
    service.write(b"\0\0\1\0half")
    service.end()
    assert service.wait() == 0


# ---------------------------------------------------------------------------------------------- the pipes


def test_nothing_that_is_printed_reaches_the_port(nodes: Path) -> None:
    rounds, pings = count(5, 200), count(200, 5_000)
    with ServiceProcess(nodes=nodes, folders=[LIBRARY]) as service:
        llm = {"model_path": "tiny", "prompt": "Tell me about cats.", "temperature": 0, "max_tokens": 20}
        service.open("s", ("node", "t-stray", {}), ("worker", "llamacpp-inference", llm))
        texts = set()
        for _ in range(rounds):
            service.send(["edit", 1, "s", [{"op": "invalidate", "node": node} for node in ("node", "worker")]])
            demands = {service.new_id(): node for node in ("node", "worker")}
            service.send(*(["demand", id, "s", node] for id, node in demands.items()))
            ids = [service.new_id() for _ in range(pings)]
            service.send(*(["ping", id] for id in ids))
            assert service.receive()[:2] == ["ok", 1]
            streamed = ""
            while demands or ids:
                message = service.receive()
                if message[0] == "ok":
                    assert message[1] == ids.pop(0)
                elif message[0] == "node_stream":
                    streamed += message[2]
                else:
                    assert message[0] == "demand_complete", message
                    if demands.pop(message[3]) == "worker":
                        assert message[2]["response"] == streamed
                        texts.add(streamed)
        service.end()
        with pytest.raises(Ended):
            service.receive()
        assert service.raw == b"" and service.wait() == 0 and len(texts) == 1
        printed = service.stderr()
        assert [way for way in WAYS for who in ("a node", "a worker") if f"{who} by {way}\n" not in printed] == []
        assert not fcntl.fcntl(service.errors, fcntl.F_GETFL) & os.O_NONBLOCK, "whoever else holds it has it, too"


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


def test_a_frame_of_the_limit_is_read_and_a_byte_more_is_the_end() -> None:
    with ServiceProcess("--max-frame-bytes", "4096") as service:
        payloads = [service.codec.encode(["validate", 1, {"": "x" * size}]) for size in range(4000, 4096)]
        service.write(framed(next(payload for payload in payloads if len(payload) == 4096)))
        assert service.receive()[:2] == ["ok", 1]
        service.write(struct.pack(">I", 4097))
        assert service.receive()[0] == "goodbye" and service.wait() == 65


@pytest.mark.parametrize("role", ["input", "output"])
@pytest.mark.parametrize("kind", ["file", "tty", "socket", "null"])
def test_what_is_no_pipe_is_refused_with_64(kind: str, role: str, tmp_path: Path) -> None:
    if kind == "file":
        fds = [os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)]
    elif kind == "tty":
        fds = [*os.openpty()]
    elif kind == "socket":
        fds = [end.detach() for end in socket.socketpair()]
    else:
        fds = [os.open(os.devnull, os.O_RDWR)]
    stdin, stdout = (fds[-1], subprocess.PIPE) if role == "input" else (subprocess.PIPE, fds[-1])
    done = subprocess.run(
        command(), stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, env=environment(), timeout=TIMEOUT_S
    )
    for fd in fds:
        os.close(fd)
    assert done.returncode == 64 and not done.stdout
    assert f"({role}) is not a pipe" in done.stderr.decode()


def test_frames_on_other_descriptors() -> None:
    (in_r, in_w), (out_r, out_w) = os.pipe(), os.pipe()
    script = f'exec 3<&{in_r} 4>&{out_w} {in_w}>&- {out_r}<&-; exec "$@"'
    with subprocess.Popen(
        ["bash", "-c", script, "-", *command("--fd", "3,4")], pass_fds=(in_r, out_w), env=environment(),
        stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        os.close(in_r)
        os.close(out_w)
        assert select.select([out_r], [], [], TIMEOUT_S)[0] and len(os.read(out_r, 4)) == 4
        os.close(in_w)
        assert process.wait(TIMEOUT_S) == 0
    os.close(out_r)


def test_both_ways_flooded(shared: ServiceProcess) -> None:
    ids = [shared.new_id() for _ in range(50_000)]
    shared.send(*(["ping", id] for id in ids))
    assert [shared.receive() for _ in ids] == [["ok", id, "pong"] for id in ids]


def test_a_host_that_only_writes_is_held_up_and_loses_nothing(service: ServiceProcess) -> None:
    service.open("s", ("a", "linked-input", {}))
    value = bytes(200 << 10)
    input = {"op": "set_input", "node": "a", "port": "value", "value": value}
    pairs = [[["edit", 2 * n, "s", [input]], ["demand", 2 * n + 1, "s", "a"]] for n in range(1, 451)]
    process = psutil.Process(service.pid)
    before = settle(process)
    rest = service.write_alone(b"".join(framed(service.codec.encode(message)) for pair in pairs for message in pair))
    assert len(rest) > 16 << 20, "it reads on although nobody reads its answers"
    assert settle(process) - before < 100 << 20
    service.write(rest)
    found = [service.receive() for _ in range(900)]
    assert [m[1] for m in found if m[0] == "ok"] == [pair[0][1] for pair in pairs]
    ended = {m[3]: m[2] for m in found if m[0] == "demand_complete"}
    assert ended == {pair[1][1]: {"value": value} for pair in pairs}


def test_small_requests_for_large_values_do_not_fill_the_memory(service: ServiceProcess) -> None:
    service.open("s", ("a", "t-large", {"size": 1 << 20}))
    assert service.request("demand", "s", "a")[0] == "demand_complete"
    process = psutil.Process(service.pid)
    before = settle(process)
    service.send(*(["demand", id, "s", "a"] for id in range(1, 151)))
    assert settle(process) - before < 100 << 20
    assert {service.receive()[3] for _ in range(150)} == set(range(1, 151))


@pytest.mark.parametrize(("kind", "number"), [("t-flood", 500_000), ("t-objects", 40_000)])
def test_a_reader_that_stops_costs_little_memory(service: ServiceProcess, kind: str, number: int) -> None:
    service.open("s", ("a", kind, {"count": number} | ({"padding": "x" * 1000} if kind == "t-objects" else {})))
    process = psutil.Process(service.pid)
    before = settle(process)
    service.send(["demand", 1, "s", "a"])
    assert settle(process) - before < 20 << 20
    *streamed, end = service.until(is_terminal(1))
    assert [m[4] for m in streamed] == list(range(len(streamed)))
    if kind == "t-flood":
        assert "".join(m[2] for m in streamed) == end[2]["text"] == "x" * number
    else:
        assert [m[2]["n"] for m in streamed] == list(range(number))


def test_a_large_value_lets_others_pass(service: ServiceProcess) -> None:
    service.open("s", ("a", "t-large", {"size": 5 << 20}))
    service.send(["demand", 1, "s", "a"])
    part = service.codec.decode(service.payload())  # from here on only what the pipe holds leaves without a reader
    assert part[:3] == ["part", 1, False]
    service.parts[1] = bytearray(part[3])
    service.ping()
    assert 0 < len(service.parts[1]) < 5 << 20
    assert len(service.receive()[2]["output"]) == 5 << 20


# ------------------------------------------------------------------------------------------------- demands


def test_who_is_told_that_all_is_drained_has_every_terminal(service: ServiceProcess) -> None:
    service.open("s", *((f"t{n}", "text-input", {"text": "x" * 3_000_000}) for n in range(3)))
    demands, drain = [service.new_id() for _ in range(3)], service.new_id()
    service.send(*(["demand", id, "s", f"t{n}", {}] for n, id in enumerate(demands)), ["drain", drain, 60_000])
    seen = service.until(lambda m: m[0] == "ok" and m[1] == drain)
    assert sorted(m[3] for m in seen if m[0] == "demand_complete") == demands


def test_a_session_is_opened_with_its_edits_or_not_at_all(service: ServiceProcess) -> None:
    graph = {"nodes": [{"id": "t", "node_type": "text-input", "data": {"text": "a"}}]}
    edits: list[Any] = [{"op": "set_input", "node": "t", "port": "text", "value": "b"}]
    wrong = [*edits, {"op": "remove_node", "node": "nobody"}]
    refused = service.request("open", "s", graph, {"edits": wrong})
    assert refused[0] == "error" and refused[2]["code"] == "unknown_node"
    assert service.request("demand", "s", "t")[2]["code"] == "unknown_session"
    added = {"op": "add_node", "node": {"id": "u", "node_type": "text-input"}}
    assert service.request("open", "s", graph, {"edits": [*edits, added]})[2]["nodes"] == 2
    assert service.request("demand", "s", "t")[2] == {"text": "b"}


def test_credit_is_never_overdrawn_and_the_terminal_waits(shared: ServiceProcess) -> None:
    texts = [chr(97 + n % 26) for n in range(50)]
    shared.open("credit", ("a", "t-chunks", {"chunks": texts}))
    id = shared.new_id()
    shared.send(["demand", id, "credit", "a", {"credit": 2}])
    found = [shared.receive(), shared.receive()]
    state = ""
    while state != "fresh":  # until the node is done
        shared.send(["snapshot", shared.new_id(), "credit"])
        reply = shared.receive()
        assert reply[0] == "ok", "nothing leaves without credit"
        state = reply[2]["states"]["a"]
    shared.says_nothing_more()
    shared.send(["credit", id, 1])
    found += shared.until(is_terminal(id))
    shared.says_nothing_more()
    assert [m[0] for m in found] == ["node_stream"] * 3 + ["demand_complete"]
    assert "".join(m[2] for m in found[:3]) == "".join(texts) == found[3][2]["text"]


@pytest.mark.parametrize(("kind", "data"), [("t-chunks", {"chunks": ["a"] * 5}), ("t-objects", {"count": 5})])
def test_credit_0_has_no_stream_and_no_wait(service: ServiceProcess, kind: str, data: dict[str, Any]) -> None:
    service.open("s", ("a", kind, data))
    service.send(["demand", 1, "s", "a", {"credit": 0}])
    assert service.receive()[0] == "demand_complete"


def test_a_consumer_without_credit_holds_up_no_other(shared: ServiceProcess) -> None:
    data = {"model_path": "tiny", "prompt": "Tell a story.", "grammar": "root ::= [a-z ]{200}", "seed": 3}
    shared.open("parked", *((name, "llamacpp-inference", data) for name in ("parked", "other")))
    parked, other = shared.new_id(), shared.new_id()
    shared.send(["demand", parked, "parked", "parked", {"credit": 1}], ["demand", other, "parked", "other", {}])
    heard = shared.until(is_terminal(other))
    chunks = [message for message in heard if message[0] == "node_stream" and message[3] == parked]
    assert len(chunks) <= 1 and not any(is_terminal(parked)(message) for message in heard)
    shared.send(["credit", parked, 2])
    rest = shared.until(is_terminal(parked))
    chunks += [message for message in rest if message[0] == "node_stream" and message[3] == parked]
    assert "".join(chunk[2] for chunk in chunks) == rest[-1][2]["response"] == heard[-1][2]["response"]


@pytest.mark.parametrize("kind", ["t-exit", "t-exit-inline", "t-cancelled", "t-stop", "t-raise"])
def test_whatever_a_node_raises_fails_its_demand_alone(service: ServiceProcess, kind: str) -> None:
    service.open("s", ("a", kind, {}))
    service.send(["demand", 1, "s", "a"])
    message = service.until(is_terminal(1))[-1]
    assert message[0] == "demand_error" and message[2]["code"] == "node_failed"
    service.ping()


@pytest.mark.parametrize("value", ["surrogate", "intkey", "set", "object", "complex", "deep", "datetime", "class"])
def test_a_value_that_cannot_travel_fails_its_demand_alone(shared: ServiceProcess, value: str) -> None:
    shared.open(f"v-{value}", ("a", "t-value", {"kind": value}))
    reply = shared.request("demand", f"v-{value}", "a")
    assert reply[0] == "demand_error" and reply[2]["code"] == "type_mismatch"


@pytest.mark.parametrize("codec", ["msgpack", "etf"])
def test_what_the_host_does_not_accept_is_too_large_for_its_demand_alone(nodes: Path, codec: str) -> None:
    with ServiceProcess("--codec", codec, nodes=nodes) as host:
        assert host.request("hello", {"protocol": [1, 1], "max_frame_bytes": 200_000})[0] == "ok"
        host.open("s", ("large", "t-large", {"size": 300_000}), ("fits", "t-large", {"size": 100_000}))
        host.open("t", ("streams", "t-chunks", {"chunks": ["a", "b" * 300_000]}))
        for session, node in (("s", "large"), ("t", "streams")):
            end = host.request("demand", session, node)
            assert (end[0], end[2]["code"], end[2]["node"]) == ("demand_error", "too_large", node)
        assert host.request("get_output", "s", "large", "output")[2]["code"] == "too_large"
        assert host.request("demand_many", "s", ["large", "fits"])[2]["code"] == "too_large"
        assert host.request("demand", "s", "fits")[0] == "demand_complete"
        host.says_nothing_more()


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
    while shared.request("snapshot", "block")[2]["states"]["a"] != "running":
        pass
    for _ in range(20):
        shared.says_nothing_more()
    gate.write_text("open")
    assert shared.until(is_terminal(id))[-1][2] == {"output": "open"}


def test_streamed_text_equals_whole(shared: ServiceProcess) -> None:
    rng = random.Random(3)
    for number in range(count(50, 100_000)):
        chars = [chr(c) for c in (rng.randrange(0x110000) for _ in range(300)) if not 0xD800 <= c < 0xE000]
        chunks = ["".join(chars[at : at + 7]) for at in range(0, len(chars), 7)]
        shared.open(f"u{number}", ("a", "t-chunks", {"chunks": chunks}))
        id = shared.new_id()
        shared.send(["demand", id, f"u{number}", "a"])
        *streamed, end = shared.until(is_terminal(id))
        assert "".join(m[2] for m in streamed) == end[2]["text"] == "".join(chars)
        assert shared.request("close", f"u{number}")[0] == "ok"


def test_a_killed_model_worker_is_a_crash_of_its_demand_alone(nodes: Path, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with ServiceProcess(nodes=nodes, folders=[LIBRARY], env=gate.at("llama_decode:10")) as service:
        llm = {"model_path": "tiny", "prompt": "Tell me about cats.", "grammar": "root ::= [a-z ]{60}"}
        service.open("s", ("a", "llamacpp-inference", llm), ("b", "t-wait", {}), ("c", "text-input", {"text": "c"}))
        service.send(["demand", 1, "s", "a"], ["demand", 2, "s", "b"])
        service.until(lambda m: m[0] == "node_stream")
        gate.wait()  # in the middle of the text, and there it stays
        (worker,) = service.request("health")[2]["workers"]
        assert worker["in_flight"] == 1
        psutil.Process(worker["os_pid"]).kill()
        end = service.until(is_terminal(1))[-1]
        assert (end[0], end[2]["code"], end[2]["retryable"]) == ("demand_error", "worker_crash", True)
        assert end[2]["details"] == {"reason": "killed by SIGKILL"}
        service.says_nothing_more()
        assert service.request("demand", "s", "c")[2] == {"text": "c"}
        service.send(["edit", 5, "s", [{"op": "update_node_data", "node": "a", "data": {"max_tokens": 4}}]])
        assert service.request("demand", "s", "a")[0] == "demand_complete"
        (after,) = service.request("health")[2]["workers"]
        assert after["os_pid"] != worker["os_pid"]
        assert (after["restarts"], after["in_flight"], after["state"]) == (1, 0, "ready")
