"""Every way there is to write where a program's output usually goes; for test nodes, workers and libraries."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import warnings

WAYS = ("print", "sys.__stdout__", "bytes", "write", "/dev/stdout", "C", "a child", "a shell", "a warning")


def print_in_every_way(who: str) -> None:
    """One line each, naming who writes it, and how."""
    line = {way: f"{who} by {way}\n" for way in WAYS}
    print(line["print"], end="", flush=True)
    assert sys.__stdout__
    sys.__stdout__.write(line["sys.__stdout__"])
    sys.__stdout__.flush()
    sys.stdout.buffer.write(line["bytes"].encode())
    sys.stdout.flush()
    os.write(1, line["write"].encode())
    with open("/dev/stdout", "a") as stdout:
        stdout.write(line["/dev/stdout"])
    libc = ctypes.CDLL(None)
    libc.printf(b"%s", line["C"].encode())
    libc.fflush(None)
    subprocess.run(["echo", line["a child"]], check=True)
    os.system(f"echo '{line['a shell']}'")
    warnings.warn(line["a warning"], stacklevel=2)
