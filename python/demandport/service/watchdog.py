"""The watchdog: a thread that notices when the event loop stands, says what holds it up, and answers pings meanwhile.

The loop stands when a node that should wait blocks instead, or computes: one turn of the loop goes on and on. While the
loop turns, the thread only looks at a number now and then; it reads and writes nothing. While the loop stands, it reads
in its place: pings are answered, all else is kept, in order, for the loop. It ends that as soon as the loop turns.

A call that keeps the interpreter's lock (a long regular expression, a C library that does not let it go) stops this
thread too.
"""

from __future__ import annotations

import asyncio
import logging
import selectors
import sys
import threading
import time
from typing import Protocol

from demandport.pipes import Reader, Writer
from demandport.service.inbox import Inbox
from demandport.service.stacks import node_on, stacks
from demandport.wire.codec import Codec
from demandport.wire.framing import frame
from demandport.wire.outbox import Outbox

log = logging.getLogger(__name__)

#: While the loop waits and nothing comes, it is looked at this often.
IDLE_S = 0.25
#: Under steady traffic it is looked at this often, which costs small demands a hundredth on one core.
LOOK_S = 0.05
#: Looks that a quiet time has saved, up to so many, are spent in shorter time: so a stall after it is noticed at once.
SAVED_LOOKS, SOON_S = 20, 0.004
#: While the loop stands, the thread looks this often whether it still does.
STEP_S = 0.01
#: A pipe that the loop itself is at is left alone for so long.
BUSY_S = 0.001
#: The interpreter's switch interval while the loop stands: a node that computes keeps each ping waiting for a few.
SWITCH_S = 0.0005
#: What lasts shorter is no stall worth a word.
REPORT_S = 0.25
#: The stacks in the log are cut off here.
STACKS_BYTES = 32 << 10

#: Where the loop's thread is while the loop has nothing to do.
_WAITS = selectors.DefaultSelector.select.__code__


class Clock(Protocol):
    """Time, as the watchdog needs it; tests have one of their own."""

    def monotonic(self) -> float: ...
    def sleep(self, seconds: float) -> None: ...


class Served(Protocol):
    """What the loop serves, as the watchdog needs it: what was read, who handles it, and whether a log may be sent."""

    inbox: Inbox

    def work(self) -> None: ...
    def has_room(self) -> bool: ...


class Watchdog:
    """Watches one loop and the pipes that it serves. Made on the loop's thread.

    Args:
        loop: the event loop; one with a selector, as asyncio's is by default.
        reader, writer: the way in and the way out.
        outbox: knows how large a message may be.
        codec: one of its own, since threads cannot share one.
        clock: tells the time.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        reader: Reader,
        writer: Writer,
        service: Served,
        outbox: Outbox,
        codec: Codec,
        clock: Clock = time,
    ) -> None:
        self._loop, self._reader, self._writer = loop, reader, writer
        self._service, self._outbox, self._codec, self._clock = service, outbox, codec, clock
        self._inbox = service.inbox
        self._loop_thread = threading.get_ident()
        self._stopped = threading.Event()
        #: The loop has turned since `_ask`.
        self._turned = True
        self._looks, self._looked = float(SAVED_LOOKS), clock.monotonic()
        self._input_over = self._output_full = self._output_broken = False
        #: The thread has stood in since the loop turned last.
        self._standing = False
        #: When the stall began that was reported and whose end is still to be told.
        self._reported: float | None = None

    def start(self) -> None:
        """Watch from now on."""
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        """Read and write no more than what is being read or written; does not block."""
        self._stopped.set()

    # ------------------------------------------------------------------------------------- watching

    def _watch(self) -> None:
        try:
            while not self._stopped.is_set():
                taken = self._inbox.taken
                self._clock.sleep(self._until_next(self._clock.monotonic()))
                # While it takes in what the host sends, it turns; that is told without a word to it.
                if taken == self._inbox.taken and not self._idle():
                    since = self._clock.monotonic()
                    if self._stands():
                        self._stand_in(since)
        except Exception:  # the service does its work without a watchdog, too
            log.exception("a bug in the watchdog; the loop is not watched any more")

    def _idle(self) -> bool:
        """The loop has nothing to do, and nothing comes for a while."""
        at = sys._current_frames().get(self._loop_thread)
        return at is not None and at.f_code is _WAITS and not self._reader.wait(IDLE_S)

    def _stands(self) -> bool:
        """Ask the loop, and give it a moment: it has not turned.

        A long turn that handles one message after the other is busy, and does not stand.
        """
        left = len(self._inbox.read)
        self._ask()
        self._clock.sleep(SOON_S)
        return self._still() and left == len(self._inbox.read)

    def _still(self) -> bool:
        """It has not turned since `_ask`, and is to be watched at all."""
        return not self._turned and not self._stopped.is_set() and not self._loop.is_closed()

    def _ask(self) -> None:
        """Have the loop say when it turns."""
        self._turned = False
        try:
            self._loop.call_soon_threadsafe(self._turns)
        except RuntimeError:  # it has ended
            self.stop()

    def _until_next(self, now: float) -> float:
        """How long to wait between two looks, in seconds."""
        saved = min(SAVED_LOOKS, self._looks + (now - self._looked) / LOOK_S)
        self._looks, self._looked = max(0.0, saved - 1), now
        return SOON_S if self._looks >= 1 else LOOK_S

    # --------------------------------------------------------------------------------- standing in

    def _stand_in(self, since: float) -> None:
        """Do what the loop cannot until it turns again."""
        interval = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_S)
        self._standing, reported = True, False
        try:
            self._answer(self._inbox.standing_pings())
            while self._still():
                self._step()
                if not reported and self._clock.monotonic() - since >= REPORT_S and self._still():
                    reported = True
                    self._report(since)
        finally:
            sys.setswitchinterval(interval)
            self._standing = True
            self._ask()

    def _step(self) -> None:
        """Wait for a pipe, for a moment, and go on with it. While answers stand in line, nothing is read."""
        if self._output_full:
            if self._writer.wait(STEP_S):
                self._push(b"")
            if self._output_full:  # or the loop writes
                self._clock.sleep(BUSY_S)
        elif self._output_broken or self._input_over or self._inbox.full:
            self._clock.sleep(STEP_S)
        elif self._reader.wait(STEP_S):
            taken = self._reader.take(self._take)
            self._input_over = taken is False
            if taken is None:  # the loop reads, which may be what takes long
                self._clock.sleep(BUSY_S)

    def _take(self, data: bytes) -> None:
        self._answer(self._inbox.keep(data))

    def _answer(self, pings: list[int]) -> None:
        encode = self._codec.encode
        self._push(b"".join(frame(encode(["ok", id, "pong"])) for id in pings))

    def _push(self, data: bytes) -> None:
        try:
            self._output_full = not self._writer.push(data)
        except OSError:
            self._output_full, self._output_broken = False, True

    # ------------------------------------------------------------------------------------ reporting

    def _report(self, since: float) -> None:
        if not log.isEnabledFor(logging.WARNING) or not self._service.has_room():
            return
        node = node_on(self._loop_thread)
        where = "" if node is None else f" in the node {node[:100]!r}"
        advice = "no async or inline node may block or compute for long; a plain function runs in a thread"
        # The thread cannot cut a message into parts: it fits in one.
        limit = min(STACKS_BYTES, self._outbox.part_bytes - 2048)
        text = f"the event loop stands{where}: {advice}\n{stacks(self._loop_thread, limit)}"
        metadata = {} if node is None else {"node": node[:100]}
        self._push(frame(self._codec.encode(["log", "warning", log.name, text, metadata])))
        self._reported = since

    # ---------------------------------------------------------------------------------- on the loop

    def _turns(self) -> None:
        """On the loop: it turns. After a stall it goes on where the thread has stopped."""
        self._turned = True
        if not self._standing:
            return
        self._standing = False
        self._service.work()
        self._writer.take_over()
        since, self._reported = self._reported, None
        if since is not None:
            log.warning("the event loop turns again, after %.2f s", self._clock.monotonic() - since)
