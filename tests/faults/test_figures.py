"""The figures to reach, at the wire: many demands at once, many kills, many cancels, judged by the history checker.

Small by `make test`, whole by `make soak`; what times are met is printed, since a test must not depend on the machine.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from history import TERMINALS, Fact
from recording import Recorder
from support import TIMEOUT_S, count, eventually

TINY = {"model_path": "tiny", "prompt": "Tell me about cats."}
#: Does not end by itself before it is ended.
LONG = TINY | {"grammar": "root ::= [a-z ]{450}", "temperature": 1.0}


@pytest.fixture
def host(nodes: Path) -> Iterator[Recorder]:
    with Recorder(nodes=nodes) as process:
        yield process


def _ms(times: list[float]) -> str:
    ordered = sorted(times)
    return f"p50 {ordered[len(ordered) // 2] * 1e3:.1f} ms, most {ordered[-1] * 1e3:.1f} ms"


# --------------------------------------------------------------------------------------------- in flight


class InFlight:
    """So many demands at any time: each takes its stream chunk by chunk, and when it ends another takes its place."""

    #: Of each stream. Values wait for their credit; texts are merged while there is none.
    CHUNKS = 20

    def __init__(self, host: Recorder, number: int) -> None:
        self._host = host
        self._nodes = [f"n{n}" for n in range(number)]
        self.ended = 0
        data = {"count": self.CHUNKS}
        listed = [(name, "t-objects" if n % 2 else "t-flood", data) for n, name in enumerate(self._nodes)]
        host.open("s", *listed, max_running=number)
        self._node_of: dict[int, str] = {}
        self._owed: list[int] = []
        self.keep_going = True

    def run(self, seconds: float) -> None:
        """For so long; then until all have ended."""
        for name in self._nodes:
            self._demand(name)
        end = time.monotonic() + seconds
        while not self._host.judge.settled:
            self._hear(self._host.receive())
            self.keep_going = time.monotonic() < end

    def _demand(self, name: str) -> None:
        id = self._host.new_id()
        self._node_of[id] = name
        self._host.send(["demand", id, "s", name, {"credit": 1}])

    def _hear(self, message: list[Any]) -> None:
        if message[0] == "node_stream":
            self._owed.append(message[3])
        elif message[0] in TERMINALS:
            name = self._node_of.pop(message[3])
            outputs = {"items": [{"n": n, "padding": ""} for n in range(self.CHUNKS)]}
            assert message[2] == (outputs if "items" in message[2] else {"text": "x" * self.CHUNKS}), message
            self.ended += 1
            if self.keep_going:
                self._host.send(["edit", self._host.new_id(), "s", [{"op": "invalidate", "node": name}]])
                self._demand(name)
        if len(self._owed) * 2 > len(self._node_of):  # not at once: what comes without credit shall be seen
            self._host.send(*(["credit", id, 1] for id in self._owed))
            self._owed.clear()


def test_of_many_demands_in_flight_none_is_lost_doubled_or_reordered(host: Recorder) -> None:
    flight = InFlight(host, count(200, 1000))
    flight.run(count(1, 600))
    host.verdict()
    print(f"{flight.ended} demands")
    demands = host.request("health")[2]["demands"]
    assert (demands["open"], demands["ended"]) == (0, flight.ended)


# -------------------------------------------------------------------------------------------------- kills


def _worker(host: Recorder) -> dict[str, Any]:
    (worker,) = host.request("health")[2]["workers"]
    return worker


def test_each_kill_of_a_worker_ends_its_demands_once_and_no_other(host: Recorder) -> None:
    models = [f"model{n}" for n in range(4)]
    listed = [(name, "llamacpp-inference", LONG | {"seed": n}) for n, name in enumerate(models)]
    host.open("s", *listed, ("short", "llamacpp-inference", TINY | {"max_tokens": 2}), ("person", "human-input", {}))
    bystander = host.new_id()
    host.send(["demand", bystander, "s", "person", {}])
    told, back = [], []
    for restarts in range(1, 1 + count(3, 1000)):
        ids = [host.new_id() for _ in models]
        host.send(*(["demand", id, "s", name, {}] for id, name in zip(ids, models, strict=True)))
        host.until(lambda message: message[0] == "node_stream")
        host.record(Fact("worker_killed"))
        psutil.Process(_worker(host)["os_pid"]).kill()
        killed = time.monotonic()
        ended = host.hear_until(lambda ids=ids: not any(map(host.judge.is_open, ids)))
        told.append(time.monotonic() - killed)
        codes = {message[2]["code"] for message in ended if message[0] == "demand_error"}
        assert codes == {"worker_crash"} and host.judge.is_open(bystander)
        # What comes next works, and so the worker is not taken for one that always dies.
        assert host.request("edit", "s", [{"op": "invalidate", "node": "short"}])[0] == "ok"
        assert host.request("demand", "s", "short")[0] == "demand_complete"
        back.append(time.monotonic() - killed)
        found = _worker(host)
        assert (found["in_flight"], found["restarts"], found["state"]) == (0, restarts, "ready")
    host.send(
        ["edit", host.new_id(), "s", [{"op": "set_input", "node": "person", "port": "user_response", "value": 1}]]
    )
    host.verdict()
    print(f"{len(told)} kills: told after {_ms(told)}; next answer after {_ms(back)}")


# ------------------------------------------------------------------------------------------------ cancels


def test_cancels_with_a_model_leave_nothing_behind(host: Recorder) -> None:
    models = [f"model{n}" for n in range(8)]
    listed = [(name, "llamacpp-inference", LONG | {"seed": n}) for n, name in enumerate(models)]
    greedy = TINY | {"temperature": 0, "max_tokens": 30}
    host.open("s", *listed, ("greedy", "llamacpp-inference", greedy))
    text = host.request("demand", "s", "greedy")[2]["response"]
    cancelled, times = 0, []
    for turn in range(count(6, 10_000 // len(models))):
        ids = [host.new_id() for _ in models]
        host.send(*(["demand", id, "s", name, {}] for id, name in zip(ids, models, strict=True)))
        for _ in range(turn % 4):  # from before the first token to well into the texts
            host.until(lambda message: message[0] == "node_stream")
        start = time.monotonic()
        host.send(*(["cancel", host.new_id(), id] for id in ids))
        found = host.settle()
        times.append(time.monotonic() - start)
        cancelled += sum(message[0] == "demand_error" for message in found)
        assert eventually(lambda: _worker(host)["in_flight"] == 0, TIMEOUT_S)
    assert cancelled >= len(models)
    host.send(["edit", host.new_id(), "s", [{"op": "invalidate", "node": "greedy"}]])
    assert host.request("demand", "s", "greedy")[2]["response"] == text
    host.verdict()
    print(f"{cancelled} cancels: {len(models)} at once are answered after {_ms(times)}")
