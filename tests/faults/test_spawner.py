"""Programs that the service starts: what they say is heard, their end is told, and none outlives the service."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from functools import partial

import psutil
import pytest

from demandport.workers.group import read_rest
from demandport.workers.process import kill_all, live_workers
from demandport.workers.spawner import MAX_LINE_BYTES, LocalSpawner
from support import gone, run_within

LIMIT_S = 60.0
run = partial(run_within, LIMIT_S)


class Spawned:
    """A program of the shell or of Python, its lines and its end."""

    def __init__(self, *command, **options):
        self.lines, self.ends = [], []
        self.heard = asyncio.Event()
        self.program = LocalSpawner().spawn(
            command, name="test", on_line=self._on_line, on_exit=self.ends.append, **options
        )

    def _on_line(self, line):
        self.lines.append(line)
        self.heard.set()

    async def end(self):
        await self.program.wait()
        assert len(self.ends) == 1
        return self.ends[0]


def test_lines_of_both_streams_come_in_order_before_the_end():
    async def main():
        one = Spawned(
            "sh", "-c", 'echo one; echo two >&2; printf "$MORE"; exit 3', environment={"MORE": "th\\303\\251"}
        )
        assert await one.end() == "exited with status 3"
        assert one.lines == ["one", "two", "thé"]
        assert not one.program.alive

    run(main())


def test_a_line_without_end_is_cut():
    async def main():
        one = Spawned(sys.executable, "-c", "print('x' * 3_000_000); print('y')")
        await one.end()
        assert one.lines == ["x" * MAX_LINE_BYTES, "y"]

    run(main())


def test_it_inherits_no_descriptor_and_reads_nothing():
    async def main():
        read, write = os.pipe()
        os.set_inheritable(write, True)
        code = "import os, sys; print(sorted(map(int, os.listdir('/proc/self/fd')))[:-1], sys.stdin.read() == '')"
        one = Spawned(sys.executable, "-c", code)
        await one.end()
        os.close(read)
        os.close(write)
        assert one.lines == ["[0, 1, 2] True"]

    run(main())


def test_signals_have_their_defaults_again():
    async def main():
        one = Spawned("sh", "-c", "grep -E 'SigIgn|SigBlk' /proc/self/status")
        await one.end()
        # Signals 32 and 33 are the C library's own: whoever inherits them blocked cannot change that.
        reserved = 0b11 << 31
        assert [int(line.split()[1], 16) & ~reserved for line in one.lines] == [0, 0]

    run(main())


def test_no_such_program_is_an_error():
    async def main():
        with pytest.raises(FileNotFoundError, match="there-is-no-such"):
            Spawned("there-is-no-such-program")
        assert live_workers() == []

    run(main())


def test_what_cannot_be_executed_says_so(tmp_path):
    async def main():
        broken = tmp_path / "broken"
        broken.write_text("#!/there/is/no/such/interpreter\n")
        broken.chmod(0o700)
        one = Spawned(str(broken))
        assert await one.end() == "exited with status 127"
        assert "cannot be run" in one.lines[0]

    run(main())


@pytest.mark.parametrize("stubborn", [False, True])
def test_stopping_asks_first_and_then_kills_with_all_it_started(stubborn):
    async def main():
        trap = "trap '' TERM; " if stubborn else ""
        one = Spawned("sh", "-c", f"{trap}sleep 1000 & echo $!; while :; do wait; done")
        await one.heard.wait()
        started = psutil.Process(int(one.lines[0]))
        await one.program.stop(0.2)
        assert await one.end() == ("killed by SIGKILL" if stubborn else "killed by SIGTERM")
        assert gone([started])

    run(main())


def test_kill_all_kills_programs_too():
    async def main():
        one = Spawned("sh", "-c", "sleep 1000 & echo $!; wait")
        await one.heard.wait()
        started = psutil.Process(int(one.lines[0]))
        assert [worker.pid for worker in live_workers()] == [one.program.pid]
        kill_all()
        assert await one.end() == "killed by SIGKILL"
        assert gone([started])

    run(main())


SERVICE = """
import asyncio
from demandport.workers.spawner import LocalSpawner

async def main():
    program = LocalSpawner().spawn(["sleep", "1000"], name="sleep", on_line=print, on_exit=print)
    print(program.pid, flush=True)
    await asyncio.sleep(1000)

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's promise is Linux's")
def test_it_does_not_outlive_a_service_that_is_killed():
    with subprocess.Popen([sys.executable, "-c", SERVICE], stdout=subprocess.PIPE, text=True) as service:
        program = psutil.Process(int(service.stdout.readline()))
        while program.name() != "sleep":  # until the shim has become it
            pass
        os.kill(service.pid, signal.SIGKILL)
        service.wait()
        assert gone([program])


def test_whoever_writes_on_into_the_pipe_of_a_program_that_ended_is_not_heard_for_ever():
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    heard = 0

    def feed(data):
        nonlocal heard
        heard += len(data)
        assert heard < 100 << 20
        os.write(writer, data)

    os.write(writer, bytes(60_000))
    read_rest(reader, feed)
    os.close(reader)
    os.close(writer)
    assert 60_000 < heard < 2 << 20


def test_the_shim_imports_next_to_nothing():
    code = "import sys; sys.argv = ['', '0', '--', 'x']; import demandport.workers.exec; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"asyncio", "subprocess", "msgpack", "demandport.pipes"} & set(out) == set()
