"""The watchdog: a thread that notices when the event loop stands, says what holds it up, and answers pings meanwhile.

The loop stands when a node that should wait blocks instead, or computes: one turn of the loop goes on and on. While the
loop turns, the thread only looks at a number now and then; it reads and writes nothing. While the loop stands, it reads
in its place: pings are answered, all else is kept, in order, for the loop. It ends that as soon as the loop turns.

A call that keeps the interpreter's lock (a long regular expression, a C library that does not let it go) stops this
thread too.
"""

from __future__ import annotations

import asyncio
import contextlib
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
#: Under steady traffic it is looked at this often, which costs nothing that can be measured.
LOOK_S = 0.025
#: Looks that a quiet time has saved, up to so many, are spent in shorter time: so a stall after it is noticed at once.
SAVED_LOOKS, SOON_S = 20, 0.005
#: While the loop stands, the thread looks this often whether it still does.
STEP_S = 0.01
#: The interpreter's switch interval while the loop stands: a node that computes keeps each ping waiting for a few.
SWITCH_S = 0.0005
#: What lasts shorter is no stall worth a word.
REPORT_S = 0.25
#: The stacks in the log are cut off here.
STACKS_BYTES = 32 << 10

_select = selectors.DefaultSelector.select


class LoopClock(selectors.DefaultSelector):
    """The selector of the loop, which also counts its turns; another thread may read both attributes.

    Attributes:
        turn: number of the loop's turn.
        waiting: the loop has nothing to do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.turn = 0
        self.waiting = False

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.waiting = True
        try:
            return _select(self, timeout)
        finally:
            self.waiting = False
            self.turn += 1

    def close(self) -> None:
        self.waiting = True  # for ever: a loop that has ended does not stand
        super().close()


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
        loop, turns: the event loop, and its selector.
        reader, writer: the way in and the way out.
        outbox: knows how large a message may be.
        codec: one of its own, since threads cannot share one.
        clock: tells the time.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        turns: LoopClock,
        reader: Reader,
        writer: Writer,
        service: Served,
        outbox: Outbox,
        codec: Codec,
        clock: Clock = time,
    ) -> None:
        self._loop, self._turns, self._reader, self._writer = loop, turns, reader, writer
        self._service, self._outbox, self._codec, self._clock = service, outbox, codec, clock
        self._inbox = service.inbox
        self._loop_thread = threading.get_ident()
        self._stopped = threading.Event()
        self._looks, self._looked = 0.0, clock.monotonic()
        self._input_over = self._output_full = self._output_broken = False
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
                since, turn = self._look()
                if turn is not None:
                    self._stand_in(since, turn)
        except Exception:  # the service does its work without a watchdog, too
            log.exception("a bug in the watchdog; the loop is not watched any more")

    def _look(self) -> tuple[float, int | None]:
        """Look at the loop twice; returns when it was looked at first, and the turn in which it stands, or None."""
        turns, read = self._turns, self._inbox.read
        if turns.waiting:
            self._reader.wait(IDLE_S)
        since, turn, left = self._clock.monotonic(), turns.turn, len(read)
        self._clock.sleep(self._until_next(since))
        # A long turn that handles one message after the other is busy, and does not stand.
        stands = turn == turns.turn and not turns.waiting and left == len(read)
        return since, turn if stands else None

    def _until_next(self, now: float) -> float:
        """How long to wait between two looks, in seconds."""
        self._looks = min(SAVED_LOOKS, self._looks + (now - self._looked) / LOOK_S)
        self._looked = now
        if self._looks < 1:
            return LOOK_S
        self._looks -= 1
        return SOON_S

    # --------------------------------------------------------------------------------- standing in

    def _stand_in(self, since: float, turn: int) -> None:
        """Do what the loop cannot until it turns again."""
        interval = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_S)
        self._tell_loop()  # the first that it does once it turns
        reported = False
        try:
            self._answer(self._inbox.standing_pings())
            while self._turns.turn == turn and not self._stopped.is_set():
                self._step()
                if not reported and self._clock.monotonic() - since >= REPORT_S and self._turns.turn == turn:
                    reported = True
                    self._report(since)
        finally:
            sys.setswitchinterval(interval)
            self._tell_loop()

    def _step(self) -> None:
        """Wait for a pipe, for a moment, and go on with it. While answers stand in line, nothing is read."""
        if self._output_full:
            if self._writer.wait(STEP_S):
                self._push(b"")
        elif self._output_broken or self._input_over or self._inbox.full:
            self._clock.sleep(STEP_S)
        elif self._reader.wait(STEP_S):
            self._input_over = self._reader.take(self._take) is False

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
        self._reported = since
        node = node_on(self._loop_thread)
        where = "" if node is None else f" in the node {node[:100]!r}"
        advice = "no async or inline node may block or compute for long; a plain function runs in a thread"
        # The thread cannot cut a message into parts: it fits in one.
        limit = min(STACKS_BYTES, self._outbox.part_bytes - 2048)
        text = f"the event loop stands{where}: {advice}\n{stacks(self._loop_thread, limit)}"
        metadata = {} if node is None else {"node": node[:100]}
        self._push(frame(self._codec.encode(["log", "warning", log.name, text, metadata])))

    # ---------------------------------------------------------------------------------- on the loop

    def _tell_loop(self) -> None:
        with contextlib.suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(self._back)

    def _back(self) -> None:
        """On the loop: it turns again."""
        self._service.work()
        self._writer.wake()
        since, self._reported = self._reported, None
        if since is not None:
            log.warning("the event loop turns again, after %.2f s", self._clock.monotonic() - since)
