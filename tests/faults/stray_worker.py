"""A worker for tests: prints in every way there is, then does what it is told."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys

from demandport.workers.child import Channel
from stray import print_in_every_way


def main() -> None:
    channel = Channel(int(sys.argv[1]))
    if "mute" not in sys.argv:
        channel.send(["ready", {"os_pid": os.getpid()}])
    while True:
        message = channel.receive()
        assert message is not None
        if message[0] == "print":
            print_in_every_way("a worker")
            channel.send(["printed"])
        elif message[0] == "echo":
            channel.send(message)
        elif message[0] == "sleep_in_c":  # as a load: the main thread is in C, its lock is free
            channel.send(["sleeping"])
            ctypes.CDLL(None).sleep(1000)
        elif message[0] == "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            channel.send(["deaf"])
        elif message[0] == "garbage":
            os.write(channel._fd_out, b"\xff\xff\xff\xffgarbage")
        elif message[0] == "grandchild":
            child = subprocess.Popen(["sleep", "1000"])
            channel.send(["grandchild", child.pid])
        elif message[0] == "exit":
            channel.send(["last words"])
            os._exit(message[1])


if __name__ == "__main__":
    main()
