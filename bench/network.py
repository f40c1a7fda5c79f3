"""Hosts on one machine, and the cables between them: network namespaces, whose packets this process carries.

    python bench/network.py HOSTS

Each host is a namespace with an address, 10.77.0.1 and so on, on a TUN device. What `ip netns exec NAME PROGRAM` starts
runs there as on a machine of its own, with its own ports and its own loopback interface. Between hosts, packets take as
long as is said, get lost as is said, or do not pass at all. Those of one host to another stay in order.

It writes `ready NAME…`, then takes lines from stdin and answers each, with `ok` or `error TEXT`:

    link DELAY JITTER LOSS RATE    of every cable: seconds one way; seconds more, at random, at most; the part of the
                                   packets that is lost; bits a second that a host can send, 0 for no limit
    cut HOST [OTHER]               nothing passes to and from this host, or between these two
    mend                           all that was cut is whole again
    end

At the end, also of stdin, or by SIGINT or SIGTERM, every process on the hosts is killed, and nothing is left.
Needs Linux, root and iproute2.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import os
import random
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PREFIX = "demandport-network"
MTU = 1500
# What waits in a host for its cable, at a limited rate; more is dropped, as a full buffer does.
BUFFER_S = 0.05
# Packets of one host that are read before the others have their turn.
BATCH = 64
ENDING = (signal.SIGINT, signal.SIGTERM)

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000


class Namespaces:
    """Network namespaces that end with this object, and the processes in them."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def add(self) -> tuple[str, int]:
        """A new one, with a device that is up; returns its name and the device's descriptor."""
        host = len(self.names) + 1
        name = f"{PREFIX}-{os.getpid()}-{host}"
        _ip("netns", "add", name)
        self.names.append(name)
        device, fd = _tun()
        _ip("link", "set", device, "netns", name)
        _ip("-n", name, "address", "add", f"10.77.0.{host}/24", "dev", device)
        _ip("-n", name, "link", "set", "lo", "up")
        # This process may be late: packets wait for it rather than being dropped, as they would not be by a real card.
        _ip("-n", name, "link", "set", device, "mtu", str(MTU), "txqueuelen", "10000", "up")
        return name, fd

    def remove(self) -> None:
        """Kill every process in them, and remove them."""
        for name in self.names:
            remove(name)


def remove(name: str) -> None:
    """Kill every process in this namespace, and remove it."""
    while pids := _ip("netns", "pids", name).split():
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.01)
    _ip("netns", "delete", name)


def stale() -> Iterator[str]:
    """Names of what a run left that was itself killed by force."""
    for line in _ip("netns", "list").splitlines():
        name = line.split()[0]
        if name.startswith(PREFIX) and not Path("/proc", name.split("-")[2]).exists():
            yield name


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


def _tun() -> tuple[str, int]:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    request = struct.pack("16sH22x", b"dp%d", IFF_TUN | IFF_NO_PI)
    answer = fcntl.ioctl(fd, TUNSETIFF, request)
    return answer[:16].rstrip(b"\0").decode(), fd


@dataclass(frozen=True)
class Link:
    """What every cable is like."""

    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    bits_per_s: float = 0.0


class Cables:
    """What is on its way between the hosts.

    Args:
        devices: each host's number and the descriptor of its device.
    """

    def __init__(self, devices: dict[int, int]) -> None:
        self.link = Link()
        self.cut: set[frozenset[int]] = set()
        self._devices = devices
        self._waiting: list[tuple[float, int, int, int, bytes]] = []  # due, number, source, target, packet
        self._number = 0
        self._sent = dict.fromkeys(devices, 0.0)  # when the last packet of a host has left it
        self._arrived: dict[tuple[int, int], float] = {}

    def read(self, source: int) -> None:
        """Take what a host sends."""
        device = self._devices[source]
        for _ in range(BATCH):
            try:
                packet = os.read(device, MTU)
            except BlockingIOError:
                return
            # Version 4, to 10.77.0.N; what is said to all hosts concerns none.
            if packet[0] >> 4 == 4 and (target := packet[19]) in self._devices:
                self._send(source, target, packet)

    def _send(self, source: int, target: int, packet: bytes) -> None:
        link, now = self.link, time.monotonic()
        if link.loss and random.random() < link.loss:
            return
        left = now
        if link.bits_per_s:
            left = max(now, self._sent[source]) + len(packet) * 8 / link.bits_per_s
            if left - now > BUFFER_S:
                return
            self._sent[source] = left
        due = left + link.delay_s + (random.random() * link.jitter_s if link.jitter_s else 0.0)
        due = self._arrived[source, target] = max(due, self._arrived.get((source, target), 0.0))
        if due <= now and not self._waiting:
            self._deliver(source, target, packet)
        else:
            self._number += 1
            heapq.heappush(self._waiting, (due, self._number, source, target, packet))

    def deliver(self) -> float | None:
        """Hand over what has arrived; returns the seconds until the next does, None when nothing is on its way."""
        waiting = self._waiting
        while waiting:
            if (left := waiting[0][0] - time.monotonic()) > 0:
                return left
            _due, _number, source, target, packet = heapq.heappop(waiting)
            self._deliver(source, target, packet)
        return None

    def _deliver(self, source: int, target: int, packet: bytes) -> None:
        if any(ends <= {source, target} for ends in self.cut):
            return
        with contextlib.suppress(OSError):  # full, or down: the packet is lost
            os.write(self._devices[target], packet)


class Network:
    """The hosts and their cables, and who says what they are like: lines of stdin.

    Args:
        devices: each host's number and the descriptor of its device.
    """

    def __init__(self, devices: dict[int, int]) -> None:
        self._cables = Cables(devices)
        self._hosts = set(devices)
        # Not epoll, which waits whole milliseconds.
        self._selector = selectors.SelectSelector()
        for host, device in devices.items():
            self._selector.register(device, selectors.EVENT_READ, host)
        self._selector.register(sys.stdin, selectors.EVENT_READ)

    def run(self) -> None:
        """Carry packets until the end is said, or stdin ends."""
        while True:
            for key, _ in self._selector.select(self._cables.deliver()):
                if key.data is not None:
                    self._cables.read(key.data)
                elif (line := sys.stdin.buffer.raw.readline().decode()) in ("", "end\n"):
                    return
                else:
                    print(self._told(line), flush=True)

    def _told(self, line: str) -> str:
        try:
            match line.split():
                case ["link", *numbers]:
                    self._cables.link = Link(*map(float, numbers))
                case ["cut", *hosts] if 1 <= len(hosts) <= 2 and self._hosts.issuperset(ends := set(map(int, hosts))):
                    self._cables.cut.add(frozenset(ends))
                case ["mend"]:
                    self._cables.cut.clear()
                case _:
                    return f"error there is no such command, or no such host: {line.strip()}"
        except (TypeError, ValueError) as error:
            return f"error {error}"
        return "ok"


def missing() -> str | None:
    """What this machine lacks."""
    if sys.platform != "linux" or not Path("/dev/net/tun").exists():
        return "Linux with TUN devices (/dev/net/tun)"
    if shutil.which("ip") is None:
        return "iproute2 (Debian: apt-get install iproute2)"
    if os.geteuid() != 0:
        return "root, to make network namespaces"
    return None


def main(count: int) -> None:
    """Make so many hosts, and carry their packets until stdin ends."""
    if what := missing():
        sys.exit(f"a network of several hosts needs {what}")
    for number in ENDING:
        signal.signal(number, lambda *_: sys.exit(1))
    for name in stale():
        remove(name)
    # The cables do not wait until the hosts leave them a core, and keep time better than to 50 µs.
    os.nice(-10)
    Path("/proc/self/timerslack_ns").write_text("1000")
    namespaces = Namespaces()
    try:
        devices = {host: namespaces.add()[1] for host in range(1, count + 1)}
        print("ready", *namespaces.names, flush=True)
        Network(devices).run()
    finally:
        for number in ENDING:
            signal.signal(number, signal.SIG_IGN)
        namespaces.remove()


if __name__ == "__main__":
    main(int(sys.argv[1]))
