"""The child's side of a worker process: a channel of frames that nothing else in the process can write to.

A worker must never outlive the service. Three things see to it, since each alone has a hole: the kernel
kills it when the service dies (Linux), a check right afterwards catches a service that died before that was
set, and a thread that needs no event loop ends the process at end of input, also while a model loads.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

from demandport.errors import DemandportError, TooLarge
from demandport.pipes import protect_stdio
from demandport.wire.codec import MsgpackCodec
from demandport.wire.framing import MAX_FRAME_BYTES, FrameDecoder, frame
from demandport.workers.exec import die_with

Message = list[Any]

_READ_BYTES = 1 << 16
#: Exit status of a worker whose service sent something that is no message.
EXIT_BAD_INPUT = 65


class Channel:
    """Messages from and to the service. Make it before anything else happens in the process.

    Args:
        parent_pid: process id of the service; the process ends at once if that is not its parent.
        on_message: called on the reader thread with each message before it is queued, for what must not wait
            until the main thread looks (a cancel). It must not block and must not raise.
        niceness: added to the process's nice value, so that the service's event loop keeps its share of the cores.
        max_frame_bytes: largest frame accepted.
    """

    def __init__(
        self,
        parent_pid: int,
        *,
        on_message: Callable[[Message], None] | None = None,
        niceness: int = 5,
        max_frame_bytes: int = MAX_FRAME_BYTES,
    ) -> None:
        self._fd_in, self._fd_out = protect_stdio()
        die_with(parent_pid)
        # Ctrl-C goes to the whole foreground group of a terminal; the service decides when its workers end.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with contextlib.suppress(OSError):
            os.nice(niceness)
        self.on_message = on_message
        self._max_frame_bytes = max_frame_bytes
        self._codec = MsgpackCodec()
        self._writing = threading.Lock()
        self._queue: SimpleQueue[Message] = SimpleQueue()
        # A fork of this process is not the worker: it must neither write frames nor hold the pipes open.
        os.register_at_fork(after_in_child=self._forget)
        threading.Thread(target=self._read, name="channel-reader", daemon=True).start()

    def send(self, message: Message) -> None:
        """Write `message`; blocks while the pipe is full. May be called from any thread.

        Raises:
            TypeMismatch: the message holds a value that cannot travel; nothing was written.
            TooLarge: it is larger than a frame may be; nothing was written.
        """
        self.send_measured(message)

    def send_measured(self, message: Message) -> int:
        """`send`; returns how many bytes the message's payload has."""
        with self._writing:
            payload = self._codec.encode(message)
            if len(payload) > self._max_frame_bytes:
                raise TooLarge(
                    f"a message of {len(payload)} bytes is over the limit of {self._max_frame_bytes}; send less at once"
                )
            rest = memoryview(frame(payload))
            try:
                while rest:
                    rest = rest[os.write(self._fd_out, rest) :]
            except OSError:
                os._exit(0)  # nobody listens any more
        return len(payload)

    def receive(self, block: bool = True) -> Message | None:
        """The next message in order; None when there is none and `block` is false."""
        if not block and self._queue.empty():
            return None
        try:
            return self._queue.get(block)
        except Empty:
            return None

    def _forget(self) -> None:
        os.close(self._fd_in)
        os.close(self._fd_out)
        self._fd_in = self._fd_out = -1
        self._writing = threading.Lock()  # some other thread may have held it

    def _read(self) -> None:
        decoder, codec = FrameDecoder(self._max_frame_bytes), MsgpackCodec()
        while True:
            try:
                data = os.read(self._fd_in, _READ_BYTES)
            except OSError:
                data = b""
            if not data:
                os._exit(0)
            try:
                for payload in decoder.feed(data):
                    self._accept(codec.decode(payload))
            except DemandportError as failed:
                print(f"worker {os.getpid()}: bad input: {failed}", file=sys.stderr, flush=True)
                os._exit(EXIT_BAD_INPUT)

    def _accept(self, message: Message) -> None:
        if self.on_message is not None:
            self.on_message(message)
        self._queue.put(message)
